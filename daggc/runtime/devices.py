"""Which torch device things run on."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def own_device() -> torch.device:
    """The device tasks run on in this process when it is a worker: the first visible GPU, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def device_of(tensors: Iterable[torch.Tensor]) -> torch.device:
    """The accelerator that any of the tensors is on, else the CPU."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return tensor.device
    return torch.device("cpu")
