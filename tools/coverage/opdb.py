"""PyTorch's operator database through daggc: each entry's samples, compiled, beside eager.

For up to three distinct samples of an entry (the largest among them), in f32, or i64 where an op has no f32: forward,
the NumPy interpreter, gradients, second derivatives. Random ops are compared in distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import judge
import numpy as np
import torch
from results import Row, Store, fingerprint, guarded, in_processes, make_rows, part_of, text_of
from scipy.stats import ks_2samp
from torch import nn
from torch.testing._internal import common_methods_invocations
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils import _pytree as tree

import daggc
from daggc.errors import CaptureError, DaggcError, RunError
from daggc.frontend.pytree import flatten
from daggc.ir.graph import Program
from daggc.report.running import to_array, to_tensor

SAMPLES = 3
SECONDS = 90  # for one entry
DRAWS = 48  # of a random op
DTYPES = (torch.float32, torch.int64)
UNDEFINED = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "resize_")
UNDEFINED += ("resize_as_",)  # eager gives memory as it finds it: only the types are compared
# Eager's op is a custom one whose backward is not differentiable: the second derivative is lost there, not here.
LOST_IN_EAGER = ("nn.functional.linear_cross_entropy.chunked", "nn.functional.linear_cross_entropy.chunked_none")
# Where eager's own gradient is not the derivative (gradcheck fails), and daggc's is.
WRONG_IN_EAGER = {"as_strided_scatter": "torch's gradient is that inside the window; gradcheck of eager fails"}
OK = ("equal", "none")


# Entries of random ops seed torch's generator in the op itself, which would make every draw the same.
common_methods_invocations.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)


def entry_name(op: OpInfo) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def dtype_of(op: OpInfo) -> torch.dtype | None:
    """The dtype whose samples count, or None."""
    return next((dtype for dtype in DTYPES if dtype in op.supported_dtypes("cpu")), None)


ENTRIES = {entry_name(op): op for op in op_db if dtype_of(op) is not None}
LEFT_OUT = [entry_name(op) for op in op_db if dtype_of(op) is None]


class Call(nn.Module):
    """One sample as a model of its tensors."""

    def __init__(self, op: OpInfo, sample: Any) -> None:
        super().__init__()
        self.op = op
        leaves, self.spec = tree.tree_flatten((sample.input, sample.args, sample.kwargs))
        self.static = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.tensors = [leaves[place] for place in self.places]
        self.process = sample.output_process_fn_grad

    def forward(self, *tensors: torch.Tensor) -> Any:
        leaves = list(self.static)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        first, args, kwargs = tree.tree_unflatten(leaves, self.spec)
        return self.process(self.op(first, *args, **kwargs))


def samples_of(op: OpInfo, dtype: torch.dtype) -> list[Call]:
    """Up to three samples that differ in shapes or arguments: the largest, the first, one from between."""
    torch.manual_seed(0)
    distinct: dict[str, Call] = {}
    for sample in op.sample_inputs("cpu", dtype, requires_grad=dtype.is_floating_point and op.supports_autograd):
        call = Call(op, sample)
        shapes = [(tuple(x.shape), x.dtype, x.layout, x.requires_grad) for x in call.tensors]
        distinct.setdefault(f"{shapes} {call.static}", call)
    calls = list(distinct.values())
    largest = max(range(len(calls)), key=lambda index: sum(x.numel() for x in calls[index].tensors))
    chosen = dict.fromkeys([largest, 0, len(calls) // 2, len(calls) - 1, *range(len(calls))])
    return [calls[index] for index in list(chosen)[:SAMPLES]]


def tensors_in(result: Any) -> list[torch.Tensor]:
    return flatten(result)[0]


@dataclass
class Run:
    """One run of a sample: outputs, gradients of the inputs that have one, second derivatives."""

    outputs: list[torch.Tensor]
    gradients: list[torch.Tensor | None] = field(default_factory=list)
    second: list[torch.Tensor | None] = field(default_factory=list)


def run(model: Callable[..., Any], call: Call, dtype: torch.dtype | None, order: int) -> Run:
    """Run a sample and differentiate it ``order`` times, along fixed random directions.

    Args:
        dtype: of floats, in place of the sample's own.
    """
    leaves = [copied(x, dtype) for x in call.tensors]
    torch.manual_seed(1)
    outputs = tensors_in(model(*leaves))
    result = Run([x.detach() for x in outputs])
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    smooth = [x for x in outputs if x.requires_grad]
    if order == 0 or not wanted or not smooth:
        return result
    cts = [direction(x, 2 + index).requires_grad_(order > 1) for index, x in enumerate(outputs) if x.requires_grad]
    result.gradients = list(torch.autograd.grad(smooth, wanted, cts, create_graph=order > 1, allow_unused=True))
    along = [(x, direction(x, 50 + i)) for i, x in enumerate(result.gradients) if x is not None and x.requires_grad]
    if order > 1 and along:
        smooth, directions = zip(*along, strict=True)
        result.second = list(torch.autograd.grad(smooth, [*wanted, *cts], directions, allow_unused=True))
    return result


def copied(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A leaf with the same numbers; a window into more memory stays one, for ops that look beyond it."""
    new = tensor.detach()
    storage = tensor.untyped_storage() if tensor.layout == torch.strided else None
    window = storage is not None and storage.nbytes() > tensor.numel() * tensor.element_size()
    if window:
        new = torch.empty(0, dtype=tensor.dtype).set_(storage)
    new = new.clone()
    if dtype is not None and (new.is_floating_point() or new.is_complex()):
        new = new.to(dtype.to_complex() if new.is_complex() else dtype)
    if window:
        new = new.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return new.detach().requires_grad_(tensor.requires_grad)


def direction(like: torch.Tensor, seed: int) -> torch.Tensor:
    """A random direction, the same in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if like.is_complex() else torch.float64
    return torch.randn(like.shape, dtype=wide, generator=generator).to(like.dtype)


def attempt(function: Callable[[], Any]) -> Any:
    """What a function gives, or None if eager cannot do it."""
    try:
        return function()
    except TimeoutError:
        raise
    except Exception:
        return None


def measure(name: str, precise: bool = False) -> Row:
    """The row of one entry: the worst of its samples in each column.

    Args:
        precise: f64 samples in place of f32 ones.
    """
    op = ENTRIES[name]
    dtype = dtype_of(op)
    assert dtype is not None
    row: Row = {"name": name, "status": "measured", "dtype": str(dtype).removeprefix("torch."), "samples": 0}
    calls = samples_of(op, torch.float64 if precise and dtype.is_floating_point else dtype)
    for call in calls:
        row["samples"] += 1
        for column, (value, reason) in columns(op, call).items():
            if worse(value, row.get(column)):
                row[column] = value
                row[f"{column}_reason"] = reason
    return row


ORDER = ("none", "yes", "equal", "no", "refused", "failed", "differs", "wrong")  # from good to bad


def worse(value: str, known: str | None) -> bool:
    return known is None or ORDER.index(value) > ORDER.index(known)


Cell = tuple[str, str]  # value, reason


def columns(op: OpInfo, call: Call) -> dict[str, Cell]:
    """What one sample shows."""
    eager = {order: attempt(lambda order=order: run(call, call, None, order)) for order in (0, 1, 2)}
    exactly = {order: attempt(lambda order=order: run(call, call, torch.float64, order)) for order in (0, 1, 2)}
    if eager[0] is None:
        return {"forward": ("failed", "eager itself fails")}
    compiled = daggc.compile(call)
    cells: dict[str, Cell] = {}
    try:
        leaves = [copied(x, None) for x in call.tensors]
        entry = compiled.entry(*flatten((tuple(leaves), {})))
        program = entry.program
    except Exception as wrong:
        verdict: Cell = ("refused", text_of(wrong)) if isinstance(wrong, CaptureError) else ("failed", text_of(wrong))
        return {"forward": verdict, "portable": ("no", "")}
    random = bool(program.forward.inputs_of("key"))
    doors = sorted({str(node.attrs["target"]) for node in program.forward.nodes if node.op in ("torch.call",)})
    cells["portable"] = ("no", " ".join(doors)) if doors else ("yes", "")
    if random:
        cells["forward"] = verdict_of(lambda: same_distribution(call, compiled))
    else:
        cells["forward"] = verdict_of(lambda: same(op, run(compiled, call, None, 0), eager[0], exactly[0], 0))
    if not doors and not random:
        weights = daggc.weights_of(call, entry.captured)  # constants of the op itself
        cells["interpreter"] = verdict_of(lambda: interpreted(op, program, call, weights, eager[0], exactly[0]))
    if random:
        cells["gradient"] = verdict_of(lambda: same_slope(call))
        return cells
    for order, column in ((1, "gradient"), (2, "second")):
        theirs = eager[order]
        if order == 2 and entry_name(op) in LOST_IN_EAGER:
            cells[column] = ("none", "eager loses it")
            continue
        if theirs is None or all(x is None for x in (theirs.gradients if order == 1 else theirs.second)):
            cells[column] = ("none", "eager has none")
            continue
        if order == 2 and doors:
            continue
        cells[column] = verdict_of(
            lambda order=order, theirs=theirs: same(op, run(compiled, call, None, order), theirs, exactly[order], order)
        )
        if cells[column][0] == "wrong" and op.name in WRONG_IN_EAGER:
            cells[column] = ("differs", WRONG_IN_EAGER[op.name])
    return cells


def verdict_of(check: Callable[[], None]) -> Cell:
    try:
        check()
    except judge.Wrong as wrong:
        return "wrong", str(wrong)
    except TimeoutError:
        raise
    except (DaggcError, RuntimeError, NotImplementedError) as wrong:
        refused = isinstance(wrong, DaggcError) and not isinstance(wrong, RunError)
        return "refused" if refused else "failed", text_of(wrong)
    except Exception as wrong:
        return "failed", text_of(wrong)
    return "equal", ""


def same(op: OpInfo, got: Run, eager: Run, exactly: Run | None, order: int) -> None:
    """Compare outputs (order 0), gradients (1) or second derivatives (2)."""
    kinds = ("outputs", "gradients", "second")
    mine, theirs = getattr(got, kinds[order]), getattr(eager, kinds[order])
    exact: Sequence[Any] = getattr(exactly, kinds[order]) if exactly is not None else ()
    if len(exact) != len(theirs):
        exact = [None] * len(theirs)
    if not mine and theirs and order:
        raise judge.Wrong("no derivative where eager has one")
    if len(mine) != len(theirs):
        raise judge.Wrong(f"{len(mine)} results for {len(theirs)}")
    least = 0.0
    if order == 1:
        least = 1e-6 * judge.norm_of(theirs)
    elif order == 2:  # what is left when parts cancel is rounding of the parts, which are as large as these
        least = max(judge.norm_of(eager.gradients), judge.norm_of(eager.outputs))
    for index, (a, b, c) in enumerate(zip(mine, theirs, exact, strict=True)):
        if op.name in UNDEFINED:
            a = a if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape) else b
        judge.compare(f"{kinds[order]} {index}", a, b, c, least)


def interpreted(
    op: OpInfo, program: Program, call: Call, weights: Mapping[str, torch.Tensor], eager: Run, exactly: Run | None
) -> None:
    """The program by the NumPy interpreter."""
    tensors = iter(call.tensors)
    arrays = {port.ref: to_array(next(tensors)) for port in program.forward.inputs_of("input")}
    arrays |= {ref: to_array(tensor) for ref, tensor in weights.items()}
    results = daggc.interpret(program, arrays)
    outputs = [to_tensor(results[port.ref]) for port in program.forward.outputs_of("output")]
    same(op, Run(outputs), eager, exactly, 0)


def same_distribution(call: Call, compiled: nn.Module) -> None:
    """Compare many draws: types of outputs, and the distribution of their numbers."""
    mine, theirs = draws(compiled, call), draws(call, call)
    for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if [(x.dtype, x.shape) for x in a] != [(x.dtype, x.shape) for x in b]:
            raise judge.Wrong(f"outputs {index}: other types")
        ours, eagers = (torch.stack(x).double().flatten().numpy() for x in (a, b))
        ours, eagers = (x[np.isfinite(x)] for x in (ours, eagers))
        if eagers.size < DRAWS or (np.ptp(eagers) == 0 and np.ptp(ours) == 0 and eagers[0] == ours[0]):
            continue
        if ks_2samp(ours, eagers, method="asymp").pvalue < 1e-5:
            raise judge.Wrong(f"outputs {index}: another distribution")


def draws(model: Callable[..., Any], call: Call) -> list[list[torch.Tensor]]:
    """For each output, its draws."""
    torch.manual_seed(3)
    with torch.no_grad():
        runs = [tensors_in(model(*(copied(x, None) for x in call.tensors))) for _ in range(DRAWS)]
    return [[run[index] for run in runs] for index in range(len(runs[0]))]


def same_slope(call: Call) -> None:
    """Gradients of a random op, in f64 and with one key, beside differences."""
    if not any(x.requires_grad for x in call.tensors):
        return
    model = daggc.compile(call)
    found = run(model, call, torch.float64, 1)
    if not found.gradients:
        return
    leaves = [copied(x, torch.float64) for x in call.tensors]
    wanted = [index for index, x in enumerate(leaves) if x.requires_grad]
    ways = {index: direction(leaves[index], index + 5) for index in wanted}

    def value(step: float) -> float:
        moved = [x.detach() + step * ways[i] if i in ways else x for i, x in enumerate(leaves)]
        moved = [x.requires_grad_(i in ways) for i, x in enumerate(moved)]
        torch.manual_seed(1)
        outputs = enumerate(tensors_in(model(*moved)))
        return sum(float((x * direction(x, 2 + index)).sum()) for index, x in outputs if x.requires_grad)

    slope = (value(1e-6) - value(-1e-6)) / 2e-6
    pairs = zip(found.gradients, ways.values(), strict=True)
    mine = sum(float((g * way).sum()) for g, way in pairs if g is not None)
    if not abs(slope - mine) <= 1e-4 * max(1.0, abs(slope)):
        raise judge.Wrong(f"gradients: the slope is {slope:.6g}, the gradient gives {mine:.6g}")


# --- the table ----------------------------------------------------------------------------------------

COLUMNS = ("forward", "portable", "interpreter", "gradient", "second")


def line(row: Row) -> str:
    cells = " ".join(f"{row.get(column, '-'):11}" for column in COLUMNS)
    bad = [column for column in COLUMNS if row.get(column) not in (*OK, "yes", None)]
    reasons = "; ".join(dict.fromkeys(f"{row.get(f'{column}_reason', '')}" for column in bad))
    return f"{row['name']:48} {cells} {row.get('reason', '') or reasons}"


def summary(rows: Sequence[Row]) -> list[str]:
    """The shares that the table is about."""
    total = len(rows)

    def share(what: str, good: Sequence[Row], of: Sequence[Row]) -> str:
        return f"{what:64} {len(good):4} of {len(of):4}  {len(good) / max(1, len(of)):6.1%}"

    forward = [row for row in rows if row.get("forward") == "equal"]
    portable = [row for row in forward if row.get("portable") == "yes"]
    differentiable = [row for row in rows if row.get("gradient", "none") != "none" or _unknown(row)]
    gradients = [row for row in differentiable if row.get("gradient") == "equal" and row.get("forward") == "equal"]
    twice = [row for row in portable if row.get("second", "none") != "none"]
    numpy = [row for row in portable if row.get("interpreter")]
    wrong = [row for row in rows if "wrong" in (row.get(column) for column in COLUMNS)]
    lost = [row for row in rows if row["status"] != "measured"]
    return [
        share("forward equal to eager, through either door", forward, [*rows]),
        share("wholly portable", portable, [*rows]),
        share("the NumPy interpreter equal", [row for row in numpy if row["interpreter"] == "equal"], numpy),
        share("gradients equal, of the differentiable", gradients, differentiable),
        share("second derivatives equal, of the portable", [r for r in twice if r["second"] == "equal"], twice),
        f"silently wrong: {len(wrong)}   not measured (crash, time): {len(lost)}   entries: {total}",
    ]


def _unknown(row: Row) -> bool:
    """Whether a failed row would have had gradients: it counts as a failure among the differentiable."""
    return "gradient" not in row and ENTRIES[row["name"]].supports_autograd


@click.command()
@click.option("--op", "ops", multiple=True, help="Only these entries (nothing is stored).")
@click.option("--family", help="Only entries whose name contains this (nothing is stored).")
@click.option("--errors", is_flag=True, help="Print the traceback of what fails.")
@click.option("--f64", is_flag=True, help="f64 samples, held to 1e-10 (nothing is stored).")
@click.option("--fresh", is_flag=True, help="Measure again what is known.")
@click.option("--jobs", default=1, help="Processes.")
@click.option("--shard", help="Only part i of n, as i/n.")
@click.option("--bad", is_flag=True, help="Print only rows that fall short, and the summary.")
def main(
    ops: tuple[str, ...], family: str, errors: bool, f64: bool, fresh: bool, jobs: int, shard: str | None, bad: bool
) -> None:
    """Every entry of torch's op_db with f32 or i64 samples, through capture, generated code, interpreter and VJP.

    Rows are kept in .cache/coverage/opdb.jsonl and made anew where the code has changed.
    """
    torch.set_num_threads(1)

    def make(name: str) -> Row:
        return guarded(lambda name: measure(name, precise=f64), name, SECONDS)

    store = Store("opdb", fingerprint("opdb.py", "judge.py"))
    if ops or family or f64:
        names = [*ops, *(name for name in ENTRIES if family and family in name)] or list(ENTRIES)
        rows = []
        for name in part_of(names, shard):
            rows.append(make(name))
            click.echo(line(rows[-1]))
        click.echo("\n".join(summary(rows)))
        return
    if jobs > 1:
        in_processes(jobs, ["--fresh"] if fresh else [])
    else:
        make_rows(store, part_of(list(ENTRIES), shard), make, fresh, lambda row: click.echo(line(row)))
    rows = [row for name, row in store.read().items() if name in ENTRIES]
    if jobs > 1:
        for row in rows:
            if not bad or any(row.get(column) not in (*OK, "yes", None) for column in COLUMNS) or row.get("reason"):
                click.echo(line(row))
    click.echo("\n".join(summary(rows)))
    click.echo(f"left out (no f32 or i64 samples on a CPU): {', '.join(LEFT_OUT)}")


if __name__ == "__main__":
    main()
