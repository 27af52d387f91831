"""How much memory a worker's process holds, and held at most.

Counted is what the process has for itself: pages of files, which are the code of libraries, come in as they are
used, are shared with other processes, and go when memory is short.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

from daggc.runtime import channel
from daggc.runtime.devices import own_device

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_SMALL = 1 << 20  # bytes


def held_now() -> float:
    """Bytes that this process holds: resident memory without files, or what torch has allocated on its GPU."""
    device = own_device()
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    fields = _status()
    return fields["VmRSS"] - fields["RssFile"] if fields else _high_water()


def start_counting() -> float:
    """From now on :func:`held_at_most` counts; returns what is held now, without what is free but not given back."""
    device = own_device()
    give_back()
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
    fields = _status()
    return fields["VmHWM"] - fields["RssFile"] if fields else _high_water()


def count_again() -> float:
    """What :func:`held_at_most` gives, and start over."""
    most = held_at_most()
    start_counting()
    return most


def resident_now() -> float:
    """Bytes that this process has in memory, pages of files too, without what is free: what a limit on it counts."""
    give_back()
    return _status().get("VmRSS") or _high_water()


def give_back() -> None:
    """Return free memory to the system, that of glibc and of the channel; workers are set up to keep it, for speed."""
    gc.collect()
    channel.trim()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def give_back_after(capture_of: torch.nn.Module) -> None:
    """Return what capturing a model took, unless the model is so small that it is not worth the time."""
    if sum(x.numel() * x.element_size() for x in capture_of.parameters()) > _SMALL:
        give_back()


def _status() -> dict[str, float]:
    """Bytes by field; empty on systems that do not have it."""
    if not _STATUS.exists():
        return {}
    fields = [line.split() for line in _STATUS.read_text().splitlines() if line.endswith(" kB")]
    return {field[0].rstrip(":"): float(field[1]) * 1024 for field in fields}


def _high_water() -> float:
    import resource  # not there on every system

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else most * 1024)
