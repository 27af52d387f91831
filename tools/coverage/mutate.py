"""Mutation check of the tests: small wrong changes to the rules of ops and to passes, and whether tests notice.

Each mutant is imported in a forked process in place of the module, and the tests that matter to it are run: for an op
the tests of the op table on the ops that call the changed function, for a pass its tests and generated programs.
Survivors are explained in survivors.toml: why the change makes no difference, or why nothing can see it.
"""

from __future__ import annotations

import difflib
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import narrow
import torch
from mutations import Mutant, mutants
from results import FOLDER, ROOT, Row, Store, fingerprint, in_processes, make_rows, part_of

FILES = ("daggc/ops/*.py", "daggc/passes/**/*.py")
ROLES = ("infer", "evaluate", "vjp", "decompose", "axes", "helper", "pass")  # importers have tools/opdb
CPU_SECONDS = 30  # of one mutant: more counts as caught, because the tests would not end
WALL_SECONDS = 240
EXPLAINED = Path(__file__).with_name("survivors.toml")
TOOLS = (
    *("mutate.py", "mutations.py", "narrow.py", "generated.py", "properties.py"),
    *(
        "../../tests/ops/test_op_table.py",
        "../../tests/ops/test_op_dtypes.py",
        "../../tests/ops/test_type_rules.py",
        "../../tests/ops/test_kinks.py",
    ),
    *(f"../../tests/ops/test_{name}.py" for name in ("attention", "axes", "build", "importers", "order", "refusals")),
    "../../tests/ops/test_arithmetic.py",
    "../../tests/ops/test_softmax.py",
    "../../tests/ops/test_ties_and_nan.py",
    *("../../tests/passes/test_meaning.py", "../../tests/passes/test_differentiate.py"),
    *("../../tests/passes/test_microbatch.py", "../../tests/helpers.py"),
    *("../../tests/batches.py", "../../tests/batch_models.py"),
)


Reached = dict[str, list[str]]  # file:line of a function's definition -> ops whose rules call it


def all_mutants(reached: Reached, roles: Sequence[str], files: Sequence[str] = ()) -> list[Mutant]:
    """The mutants of every file, or of those whose path contains one of the texts.

    A helper that no rule calls serves importers or registers ops: its mutants count as importers'.
    """
    paths = sorted({path for pattern in FILES for path in ROOT.glob(pattern)})
    names = [str(path.relative_to(ROOT)) for path in paths]
    chosen = [name for name in names if not files or any(text in name for text in files)]
    found = [mutant for name in chosen for mutant in mutants(name, (ROOT / name).read_text())]
    called = [m.role != "helper" or any(f"{m.file}:{line}" in reached for line in m.lines) for m in found]
    found = [m if by_rules else replace(m, role="importer") for m, by_rules in zip(found, called, strict=True)]
    return [mutant for mutant in found if mutant.role in roles]


def drawn(found: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """So many mutants: one of each function before a second one of any, in random order."""
    rng = random.Random(seed)
    functions: dict[tuple[str, str], list[Mutant]] = {}
    for mutant in rng.sample(found, len(found)):
        functions.setdefault((mutant.file, mutant.function), []).append(mutant)
    rounds: list[Mutant] = []
    while functions and len(rounds) < count:
        rounds += [group.pop() for group in functions.values()]
        functions = {name: group for name, group in functions.items() if group}
    return rounds[:count]


def ops_of(mutant: Mutant, reached: Reached) -> list[str]:
    """The ops to try a mutant on: those that call the changed function, its own family first."""
    for line in reversed(mutant.lines):
        ops = reached.get(f"{mutant.file}:{line}")
        if ops:
            return ops[: narrow.MOST_OPS // 2] + _spread(ops[narrow.MOST_OPS // 2 :], narrow.MOST_OPS // 2)
    same_file = [ops for key, ops in reached.items() if key.startswith(f"{mutant.file}:")]
    return _spread(sorted({op for ops in same_file for op in ops[:2]}), narrow.MOST_OPS)


def _spread(ops: list[str], count: int) -> list[str]:
    return ops[:: max(1, -(-len(ops) // count))] if ops else []


def judge(mutant: Mutant, ops: Sequence[str]) -> Row:
    """Run a mutant's tests in a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            os.close(reader)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
            os.write(writer, narrow.catching_test(mutant, ops).encode()[:4000] or b"-")
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], WALL_SECONDS)
    answer = os.read(reader, 4096).decode() if ready else ""
    os.close(reader)
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    survived = answer == "-"
    test = "" if survived else answer or ("no end" if not ready or _out_of_time(status) else "the process died")
    return {
        "name": mutant.key,
        "status": "survived" if survived else "caught",
        "test": test,
        "role": mutant.role,
        "kind": mutant.kind,
        "file": mutant.file,
        "line": mutant.line,
        "ops": list(ops),
        "cpu": round(used.ru_utime + used.ru_stime, 2),
    }


def _out_of_time(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)


def diff(mutant: Mutant) -> str:
    """The change, as a unified diff with one line of context."""
    source = (ROOT / mutant.file).read_text()
    lines = difflib.unified_diff(
        source.splitlines(), mutant.apply(source).splitlines(), mutant.file, mutant.key, n=1, lineterm=""
    )
    return "\n".join(lines)


def reached_by_ops() -> Reached:
    """Which ops call which function; measured once for this code, and kept."""
    path = FOLDER / f"reached-{fingerprint('narrow.py')}.json"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        text = subprocess.run(
            [sys.executable, narrow.__file__], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout
        path.write_text(text.splitlines()[-1])
    return json.loads(path.read_text())


def explanations() -> dict[str, str]:
    """Key of a mutant -> why it survives."""
    return tomllib.loads(EXPLAINED.read_text()).get("survivors", {}) if EXPLAINED.exists() else {}


@click.command(help=__doc__)
@click.option("--count", default=600, show_default=True, help="How many mutants.")
@click.option("--seed", default=0, show_default=True)
@click.option("--file", "files", multiple=True, help="Only files whose path contains this.")
@click.option("--role", "roles", multiple=True, type=click.Choice([*ROLES, "importer"]), help="Only these.")
@click.option("--key", "keys", multiple=True, help="Only mutants whose key contains this.")
@click.option("--shard", help="i/n: only every n-th part of the work, from the i-th.")
@click.option("--jobs", default=1, show_default=True, help="Processes.")
@click.option("--fresh", is_flag=True, help="Forget what is known.")
def main(
    count: int, seed: int, files: tuple[str, ...], roles: tuple[str, ...], keys: tuple[str, ...], shard: str | None,
    jobs: int, fresh: bool,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    reached = reached_by_ops()
    found = all_mutants(reached, roles or ROLES, files)
    chosen = [m for m in found if any(key in m.key for key in keys)] if keys else drawn(found, count, seed)
    by_key = {mutant.key: mutant for mutant in chosen}
    store = Store("mutants", fingerprint(*TOOLS))
    if jobs > 1 and shard is None:
        options = [["--count", str(count), "--seed", str(seed)], *(["--file", file] for file in files)]
        options += [*(["--role", role] for role in roles), *(["--key", key] for key in keys)]
        in_processes(jobs, [*(word for option in options for word in option), *(["--fresh"] if fresh else [])])
        fresh = False
    rows: list[Row] = []

    def show(row: Row) -> None:
        rows.append(row)
        if sys.stderr.isatty():
            click.echo(f"\r{len(rows)} of {len(chosen)} mutants", nl=False, err=True)

    make_rows(
        store, part_of(list(by_key), shard), lambda key: judge(by_key[key], ops_of(by_key[key], reached)), fresh, show
    )
    known = explanations()
    if not shard:
        report(rows, by_key, known, {m.key for m in all_mutants(reached, [*ROLES, "importer"])}, len(found))
    sys.exit(1 if any(row["status"] == "survived" and row["name"] not in known for row in rows) else 0)


def report(rows: list[Row], by_key: dict[str, Mutant], known: dict[str, str], exist: set[str], possible: int) -> None:
    """Print shares caught, survivors with their diffs, and explanations that are stale; leave them as JSON too."""
    seconds = sum(row.get("cpu", 0) for row in rows)
    click.echo(f"{len(rows)} of {possible} possible mutants, {seconds / max(len(rows), 1):.1f} s of CPU time each")
    for what in ("role", "kind", "file"):
        click.echo(f"\n{what:40} {'mutants':>8} {'caught':>8} {'share':>8} {'explained':>10} {'open':>6}")
        _shares(rows, what, known)
    survivors = [row for row in rows if row["status"] == "survived"]
    for row in survivors:
        click.echo(f"\n{row['name']}  (tried on {', '.join(row['ops']) or 'its tests'})\n{diff(by_key[row['name']])}")
        if row["name"] in known:
            click.echo(f"explained: {known[row['name']]}")
    caught = {row["name"] for row in rows if row["status"] != "survived"}
    for key in known:
        if key not in exist:
            click.echo(f"stale explanation: there is no mutant {key}")
        elif key in caught:
            click.echo(f"stale explanation: a test catches {key}")
    detail = [{**row, "diff": diff(by_key[row["name"]]), "explained": known.get(row["name"], "")} for row in survivors]
    (FOLDER / "mutants.json").write_text(json.dumps({"rows": rows, "survivors": detail}, indent=1))
    (FOLDER / "mutate.md").write_text(page(rows, known))


def _shares(rows: Iterable[Row], what: str, known: dict[str, Any]) -> None:
    total, caught, explained = Counter[str](), Counter[str](), Counter[str]()
    for row in rows:
        for name in (row.get(what, "?"), "all"):
            total[name] += 1
            caught[name] += row["status"] != "survived"
            explained[name] += row["status"] == "survived" and row["name"] in known
    for name in sorted(total, key=lambda name: (name == "all", name)):
        left = total[name] - caught[name] - explained[name]
        share = caught[name] / total[name]
        click.echo(f"{name:40} {total[name]:8} {caught[name]:8} {share:8.1%} {explained[name]:10} {left:6}")


def page(rows: Sequence[Row], known: dict[str, str]) -> str:
    """The section of docs/coverage.md."""
    caught = sum(row["status"] != "survived" for row in rows)
    survivors = [row["name"] for row in rows if row["status"] == "survived"]
    return "\n".join(
        [
            "## Mutants: do tests notice wrong rules?",
            "",
            (
                f"{len(rows)} small wrong changes to type rules, meanings, VJP rules, decompositions and passes; the "
                f"tests catch {caught} ({caught / max(1, len(rows)):.0%}). The survivors, and why:"
            ),
            "",
            *(f"* `{name}`: {known.get(name, 'not explained yet: a hole in the tests')}" for name in survivors),
            "",
        ]
    )


if __name__ == "__main__":
    main()
