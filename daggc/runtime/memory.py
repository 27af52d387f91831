"""How much memory a worker's process holds, and held at most."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

from daggc.runtime.devices import own_device

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def held_now() -> float:
    """Bytes that this process holds: resident memory, or what torch has allocated on its GPU."""
    device = own_device()
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    return _status("VmRSS") or _high_water()


def start_counting() -> float:
    """From now on :func:`held_at_most` counts; returns what is held now, without what is free but not given back."""
    device = own_device()
    gc.collect()
    _give_back()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # the high-water mark is set back to what is resident now
    return held_now()


def held_at_most() -> float:
    """The most bytes held since :func:`start_counting`; since the process began where that cannot be set back."""
    device = own_device()
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM") or _high_water()


def count_again() -> float:
    """What :func:`held_at_most` gives, and start over."""
    most = held_at_most()
    start_counting()
    return most


def _give_back() -> None:
    """Have glibc return free memory to the system; workers are set up to keep it, for speed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _status(field: str) -> float:
    if not _STATUS.exists():
        return 0.0
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return float(line.split()[1]) * 1024
    return 0.0


def _high_water() -> float:
    import resource  # not there on every system

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else most * 1024)
