"""Checkpoints of a training: one safetensors file with every tensor, and what a step needs beside them."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from daggc.errors import RunError

_FORMAT = "1"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after some step.

    Attributes:
        tensors: by port ref: ``param:fc.weight``, ``buffer:bn.running_mean``, ``state:exp_avg:fc.weight``.
        meta: plain data: the number of steps, the seed of random ops, learning rates, updates of each parameter.
    """

    tensors: Mapping[str, torch.Tensor]
    meta: Mapping[str, Any]

    def check(self, path: str | Path, own: Mapping[str, torch.Tensor], groups: int) -> None:
        """Raises RunError if this is not of a training that has these tensors and so many parameter groups."""
        wrong = f"{path} is a checkpoint of another model or optimizer: "
        for ref in sorted({*own, *self.tensors}):
            mine, its = own.get(ref), self.tensors.get(ref)
            if mine is None or its is None:
                raise RunError(f"{wrong}{ref!r} is {'not in it' if its is None else 'in it alone'}")
            if (mine.dtype, mine.shape) != (its.dtype, its.shape):
                raise RunError(f"{wrong}{ref!r} is {_described(its)} there, {_described(mine)} here")
        if len(self.meta["learning_rates"]) != groups:
            raise RunError(f"{wrong}it has {len(self.meta['learning_rates'])} parameter groups, not {groups}")


_META = {"steps": int, "seed": int, "learning_rates": list, "updates": dict}


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def write_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a file whole or not at all: it is made beside its place and moved there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        tensors = {ref: tensor.detach().cpu().contiguous().clone() for ref, tensor in checkpoint.tensors.items()}
        save_file(tensors, temporary, {"daggc.checkpoint": _FORMAT, "meta": json.dumps(checkpoint.meta)})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file that :func:`write_checkpoint` wrote. Raises RunError if it is none; runs nothing from it."""
    try:
        with safe_open(str(path), "pt") as file:
            meta = file.metadata() or {}
            if meta.get("daggc.checkpoint") != _FORMAT:
                raise RunError(f"{path} is no checkpoint of this version of daggc")
            plain = json.loads(meta["meta"])
            if not isinstance(plain, dict) or any(not isinstance(plain.get(key), of) for key, of in _META.items()):
                raise RunError(f"{path} is no checkpoint of this version of daggc: its metadata are not those")
            return Checkpoint({ref: file.get_tensor(ref) for ref in list(file.keys())}, plain)
    except (OSError, SafetensorError, ValueError, KeyError) as wrong:
        raise RunError(f"cannot read a checkpoint from {path}: {wrong}") from wrong
