"""Calibrations on disk: JSON files under the user's cache directory, one for each environment that was measured.

What is read is data only, and checked: a file that is damaged, of another version, or of another environment than its
name says is as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

VERSION = 3  # of the files, and of the programs that are measured
_LARGEST = 32 << 20  # bytes of a file that is read


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/daggc/calibration``, by default under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache"
    return root / "daggc" / "calibration"


def read_entry(kind: str, identity: Any) -> Any:
    """What was kept of this kind (``device``, ``links``) under an identity; None if there is nothing sound."""
    try:
        path = _path(kind, identity)
        if path.stat().st_size > _LARGEST:
            return None
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(entry, Mapping) or entry.get("version") != VERSION or entry.get("identity") != _plain(identity):
        return None
    return entry.get("data")


def write_entry(kind: str, identity: Any, data: Any) -> None:
    """Keep data; where nothing can be written, nothing is kept."""
    entry = {"version": VERSION, "identity": identity, "data": data}
    with suppress(OSError):
        path = _path(kind, identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}")  # another process may write the same
        draft.write_text(json.dumps(entry, sort_keys=True, allow_nan=False), encoding="utf-8")
        os.replace(draft, path)


def _path(kind: str, identity: Any) -> Path:
    digest = hashlib.sha256(json.dumps([VERSION, identity], sort_keys=True).encode()).hexdigest()[:24]
    return cache_directory() / f"{kind}-{digest}.json"


def _plain(identity: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(identity))
