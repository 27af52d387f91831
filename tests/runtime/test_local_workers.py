"""Workers of this machine: what goes wrong when they are started is said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from daggc.errors import RunError
from daggc.runtime.local_workers import local_workers

pytestmark = pytest.mark.timeout(120)

SCRIPT = """
from daggc.runtime.local_workers import local_workers

with local_workers(1) as client:
    print(client.run(int))
"""


def test_a_script_that_starts_workers_as_it_is_imported_is_told_what_to_do(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "RunError" in last and "__main__" in last
    assert "imports your script" in done.stderr


@pytest.mark.parametrize("count, threads", [(0, 1), (1, 0)])
def test_there_is_a_worker_and_a_thread(count: int, threads: int) -> None:
    with pytest.raises(RunError, match="at least 1"), local_workers(count, threads):
        pass
