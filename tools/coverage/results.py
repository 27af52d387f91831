"""Rows of a coverage table: kept in a file as they are made, so that a run can stop, go on, and be shared out.

A row holds while the code it was measured on is the same: the package, the tool and torch.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "coverage"

Row = dict[str, Any]


def fingerprint(*tools: str) -> str:
    """Of everything a row depends on."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in [*sorted((ROOT / "daggc").rglob("*.py")), *(Path(__file__).parent / tool for tool in tools)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Store:
    """The rows of one tool by name, in ``.cache/coverage/TOOL.jsonl``; the last one of a name counts.

    A row is begun before it is made: what was begun and never ended took the process with it.
    """

    def __init__(self, tool: str, code: str) -> None:
        self.path = FOLDER / f"{tool}.jsonl"
        self.code = code
        FOLDER.mkdir(parents=True, exist_ok=True)

    def read(self, stale: bool = False) -> dict[str, Row]:
        """Rows of this code; with ``stale`` also of other code."""
        rows: dict[str, Row] = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                row = json.loads(line)
                if stale or row["code"] == self.code:
                    rows[row["name"]] = row
        return rows

    def write(self, row: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({**row, "code": self.code}) + "\n")


def make_rows(
    store: Store, names: Iterable[str], make: Callable[[str], Row], fresh: bool, show: Callable[[Row], None]
) -> None:
    """Make the rows that are not there yet, one after the other."""
    known = {} if fresh else store.read()
    for name in names:
        row = known.get(name)
        if row is None or row.get("status") == "begun":
            if row is not None:  # it was begun, and the process ended
                row = {"name": name, "status": "crashed", "reason": "the process ended while it was measured"}
            else:
                store.write({"name": name, "status": "begun"})
                start = time.perf_counter()
                row = make(name)
                row["seconds"] = round(time.perf_counter() - start, 2)
            store.write(row)
        show(row)


def guarded(measure: Callable[[str], Row], name: str, seconds: int) -> Row:
    """A row, within a time limit; what goes wrong while it is made is a row as well."""
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return measure(name)
    except TimeoutError:
        return {"name": name, "status": "failed", "reason": f"longer than {seconds} seconds"}
    except Exception as wrong:
        return {"name": name, "status": "failed", "reason": text_of(wrong)}
    finally:
        signal.alarm(0)


def _stop(*_: object) -> None:
    raise TimeoutError


def text_of(wrong: BaseException) -> str:
    """The first line of an error; its traceback is printed where ``--errors`` was asked for."""
    if "--errors" in sys.argv:
        traceback.print_exception(wrong)
    return f"{type(wrong).__name__}: {' '.join(str(wrong).split())}"[:300]


def in_processes(jobs: int, arguments: Sequence[str]) -> None:
    """Run this script so many times side by side, each with its ``--shard``; again where one died."""
    for _ in range(20):  # each time a process dies its entry is marked, and the rest goes on
        commands = [[sys.executable, sys.argv[0], *arguments, "--shard", f"{part}/{jobs}"] for part in range(jobs)]
        running = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
        codes = [process.wait() for process in running]
        if min(codes) >= 0:  # negative: killed by a signal
            return
        arguments = [argument for argument in arguments if argument != "--fresh"]


def part_of(names: Sequence[str], shard: str | None) -> list[str]:
    """The names of a shard ``i/n``: every n-th, from the i-th."""
    if shard is None:
        return list(names)
    index, count = map(int, shard.split("/"))
    return list(names[index::count])
