"""Processes that train together through torch.distributed, with gloo on this machine."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def join() -> tuple[str, int, int]:
    """Meet the others; gives the name of the case, this process's rank and how many there are.

    The arguments of the process are the case, the rank, how many there are, and a file where they meet (so that no
    port has to be free); gloo takes ports that the system gives it.
    """
    case, rank, count, file = sys.argv[1:]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=int(rank), world_size=int(count), timeout=timedelta(minutes=5)
    )
    return case, int(rank), int(count)
