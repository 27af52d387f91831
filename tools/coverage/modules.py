"""Every module of torch.nn's own test database through daggc, beside eager.

For several samples of each module, in f32: outputs, gradients of parameters and inputs, and buffers after the call,
in train mode and, where that differs, in eval mode. Dropout is taken out, so that numbers can be compared.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import judge
import torch
from opdb import Cell, attempt, copied, direction, verdict_of, worse
from results import Row, Store, fingerprint, guarded, in_processes, make_rows, part_of, text_of
from torch import nn
from torch.testing._internal.common_modules import ModuleInfo, module_db
from torch.utils import _pytree as tree

import daggc
from daggc.errors import CaptureError
from daggc.frontend.pytree import flatten
from daggc.runtime.module import CompiledModule

SAMPLES = 6
SECONDS = 120  # for one module
ENTRIES: dict[str, ModuleInfo] = {info.name: info for info in module_db}
COLUMNS = ("forward", "portable", "parameters", "inputs", "buffers")


@dataclass
class Case:
    """A module, what it is called with, and its mode."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    note: str

    def of(self, dtype: torch.dtype | None) -> Case:
        """A copy, of another dtype if one is given."""
        module = copy.deepcopy(self.module)
        args, kwargs = tree.tree_map_only(torch.Tensor, lambda x: copied(x, dtype), (self.args, self.kwargs))
        if dtype is not None:
            module.to(dtype)
            for part in module.modules():
                vars(part).update(tree.tree_map_only(torch.Tensor, lambda x: copied(x, dtype), plain_tensors(part)))
        return Case(module, args, kwargs, self.note)


def plain_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that are attributes, neither parameters nor buffers: the random samples of a pooling, say."""
    return {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}


@dataclass
class Run:
    """What one call and one backward gave."""

    outputs: list[torch.Tensor]
    parameters: list[torch.Tensor | None] = field(default_factory=list)
    inputs: list[torch.Tensor | None] = field(default_factory=list)
    buffers: list[torch.Tensor] = field(default_factory=list)


def cases_of(info: ModuleInfo) -> list[Case]:
    """Samples that differ in their constructor's arguments or shapes, spread over all there are, in each mode."""
    cases: list[Case] = []
    modes = (True, False) if info.train_and_eval_differ else (True,)
    for training in modes:
        torch.manual_seed(0)
        given = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=True, training=training)
        distinct: dict[str, Any] = {}
        for sample in given:
            forward = sample.forward_input
            if forward is None:
                continue
            shapes = tree.tree_map_only(torch.Tensor, lambda x: tuple(x.shape), (forward.args, forward.kwargs))
            made = sample.constructor_input
            distinct.setdefault(f"{made.args} {made.kwargs} {shapes}", sample)
        samples = list(distinct.values())
        count = min(SAMPLES, len(samples))
        places = sorted({round(i * (len(samples) - 1) / max(1, count - 1)) for i in range(count)})
        for sample in (samples[place] for place in places):
            made, forward = sample.constructor_input, sample.forward_input
            torch.manual_seed(1)
            module = info.module_cls(*made.args, **made.kwargs).to(torch.float32)
            vars(module).update({name: copied(x, torch.float32) for name, x in plain_tensors(module).items()})
            if info.is_lazy:
                with torch.no_grad():
                    module(*forward.args, **forward.kwargs)  # gives the parameters their shapes
            without_dropout(module).train(training)
            note = f"{'train' if training else 'eval'} {made.args or ''}{made.kwargs or ''}"
            cases.append(Case(module, forward.args, forward.kwargs, note))
    return cases


def without_dropout(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        elif isinstance(getattr(part, "dropout", None), float):
            vars(part)["dropout"] = 0.0
    return module


def run(model: Callable[..., Any], case: Case) -> Run:
    """Call and differentiate, along fixed random directions. ``model`` stands in place of the case's module."""
    torch.manual_seed(2)
    outputs, _ = flatten(model(*case.args, **case.kwargs))
    smooth = [x for x in outputs if x.requires_grad]
    if smooth:
        torch.autograd.backward(smooth, [direction(x, 3 + index) for index, x in enumerate(smooth)])
    leaves = [x for x in tree.tree_leaves((case.args, case.kwargs)) if isinstance(x, torch.Tensor) and x.requires_grad]
    return Run(
        [x.detach() for x in outputs],
        [x.grad for x in case.module.parameters()],
        [x.grad for x in leaves],
        [x.detach().clone() for x in case.module.buffers()],
    )


def measure(name: str) -> Row:
    """The row of one module: the worst of its samples in each column."""
    row: Row = {"name": name, "status": "measured", "samples": 0}
    for case in cases_of(ENTRIES[name]):
        row["samples"] += 1
        for column, (value, reason) in columns(case).items():
            if worse(value, row.get(column)):
                row[column] = value
                row[f"{column}_reason"] = f"{reason} ({case.note})" if reason else ""
    return row


def columns(case: Case) -> dict[str, Cell]:
    """What one sample shows."""

    def eagerly(dtype: torch.dtype | None) -> Run:
        copied_case = case.of(dtype)
        return run(copied_case.module, copied_case)

    eager, exactly = attempt(lambda: eagerly(None)), attempt(lambda: eagerly(torch.float64))
    if eager is None:
        return {"forward": ("failed", "eager itself fails")}
    mine = case.of(None)
    compiled = daggc.compile(mine.module)
    assert isinstance(compiled, CompiledModule)
    try:
        program = compiled.entry(*flatten((mine.args, mine.kwargs))).program
    except Exception as wrong:
        verdict: Cell = ("refused" if isinstance(wrong, CaptureError) else "failed", text_of(wrong))
        return {"forward": verdict, "portable": ("no", "")}
    doors = sorted({str(node.attrs["target"]) for node in program.forward.nodes if node.op.endswith(".call")})
    cells: dict[str, Cell] = {"portable": ("no", " ".join(doors)) if doors else ("yes", "")}
    got: list[Run] = []
    verdict = verdict_of(lambda: got.append(run(compiled, mine)))
    if not got:
        return {**cells, "forward": verdict}
    for column, kind in (("forward", "outputs"), ("parameters",) * 2, ("inputs",) * 2, ("buffers",) * 2):
        cells[column] = verdict_of(lambda kind=kind: same(kind, got[0], eager, exactly))
        if not getattr(eager, kind):
            cells[column] = ("none", "")
    return cells


def same(kind: str, got: Run, eager: Run, exactly: Run | None) -> None:
    """Compare one kind of result."""
    mine, theirs = getattr(got, kind), getattr(eager, kind)
    exact: Sequence[Any] = getattr(exactly, kind) if exactly is not None else ()
    if len(exact) != len(theirs):
        exact = [None] * len(theirs)
    if len(mine) != len(theirs):
        raise judge.Wrong(f"{len(mine)} {kind} for {len(theirs)}")
    least = 1e-6 * judge.norm_of([*eager.parameters, *eager.inputs]) if kind in ("parameters", "inputs") else 0.0
    for index, (a, b, c) in enumerate(zip(mine, theirs, exact, strict=True)):
        judge.compare(f"{kind} {index}", a, b, c, least)


# --- the table ----------------------------------------------------------------------------------------

GOOD = ("equal", "none", "yes", None)


def line(row: Row) -> str:
    cells = " ".join(f"{row.get(column, '-'):10}" for column in COLUMNS)
    bad = [column for column in COLUMNS if row.get(column) not in GOOD]
    reasons = "; ".join(dict.fromkeys(f"{row.get(f'{column}_reason', '')}" for column in bad))
    return f"{row['name']:28} {cells} {row.get('samples', 0):2} {row.get('reason', '') or reasons}"


def falls_short(row: Row) -> bool:
    return row["status"] != "measured" or any(row.get(column) not in GOOD for column in COLUMNS)


def summary(rows: Sequence[Row]) -> list[str]:
    """How many are equal in everything, portable, refused, and wrong."""
    total = len(rows)
    numbers = [column for column in COLUMNS if column != "portable"]
    equal = [row for row in rows if row["status"] == "measured" and all(row.get(c) in GOOD for c in numbers)]
    portable = [row for row in equal if row.get("portable") == "yes"]
    refused = [row for row in rows if "refused" in (row.get(column) for column in numbers)]
    wrong = [row for row in rows if "wrong" in (row.get(column) for column in numbers)]
    unmeasured = sum(row["status"] != "measured" for row in rows)

    def share(what: str, good: Sequence[Row]) -> str:
        return f"{what:50} {len(good):4} of {total:4}  {len(good) / max(1, total):6.1%}"

    return [
        share("equal to eager in outputs, gradients and buffers", equal),
        share("of them wholly portable", portable),
        f"refused: {len(refused)}   silently wrong: {len(wrong)}   not measured (crash, time): {unmeasured}",
    ]


@click.command()
@click.option("--module", "modules", multiple=True, help="Only these, as nn.LSTM (nothing is stored).")
@click.option("--errors", is_flag=True, help="Print the traceback of what fails.")
@click.option("--fresh", is_flag=True, help="Measure again what is known.")
@click.option("--jobs", default=1, help="Processes.")
@click.option("--shard", help="Only part i of n, as i/n.")
@click.option("--bad", is_flag=True, help="Print only rows that fall short, and the summary.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write the rows to this file as JSON.")
def main(
    modules: tuple[str, ...], errors: bool, fresh: bool, jobs: int, shard: str | None, bad: bool, path: str | None
) -> None:
    """Every module of torch.nn's test database, compiled, beside eager.

    Rows are kept in .cache/coverage/modules.jsonl and made anew where the code has changed.
    """
    torch.set_num_threads(1)

    def make(name: str) -> Row:
        return guarded(measure, name, SECONDS)

    store = Store("modules", fingerprint("modules.py", "opdb.py", "judge.py"))

    def show(row: Row) -> None:
        if not bad or falls_short(row):
            click.echo(line(row))

    if modules:
        rows = []
        for name in part_of(modules, shard):
            rows.append(make(name))
            show(rows[-1])
    elif jobs > 1:
        in_processes(jobs, ["--fresh"] if fresh else [])
        rows = [row for name, row in store.read().items() if name in ENTRIES]
        for row in rows:
            show(row)
    else:
        make_rows(store, part_of(list(ENTRIES), shard), make, fresh, show)
        rows = [row for name, row in store.read().items() if name in ENTRIES]
    if path is not None:
        with open(path, "w") as file:
            json.dump(rows, file, indent=1)
    click.echo("\n".join(summary(rows)))
    if modules:
        sys.exit(1 if any(falls_short(row) for row in rows) else 0)


if __name__ == "__main__":
    main()
