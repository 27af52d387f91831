"""A table: each model of the zoo, in each mode, place and dtype, beside eager PyTorch. Fails if any row fails."""

from __future__ import annotations

import sys
import traceback
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import click
import torch
from cluster import processes
from versus_eager import versus_eager
from zoo import ZOO

import daggc

LEAST = 0.25  # of the FLOPs, that each of the two devices does
MODES = {"train": True, "eval": False}
DTYPES = {"f64": torch.float64, "f32": torch.float32}
HEADER = f"{'model':9} {'mode':5} {'place':9} {'dtype':5} {'output':>8} {'gradient':>8} {'input':>8} {'buffer':>8} "
HEADER += f"{'of allowed':>10}  shares of FLOPs"


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(ZOO)), help="Only these.")
@click.option("--place", "places", multiple=True, type=click.Choice(["here", "workers"]), help="Only there.")
@click.option("--errors", is_flag=True, help="Print the traceback of what fails.")
def main(models: tuple[str, ...], places: tuple[str, ...], errors: bool) -> None:
    """Compare the zoo with eager PyTorch, in this process and on two worker processes.

    Errors are relative to the norm of each tensor (the largest is shown); "of allowed" is the largest error as a
    fraction of what is allowed: 1e-10 in f64; in f32, 4 times eager's own error against f64.
    """
    torch.set_num_threads(1)
    failed = 0
    click.echo(HEADER)
    for place in places or ("here", "workers"):
        with processes(2) if place == "workers" else nullcontext() as client:
            for name, mode, dtype in product(models or ZOO, MODES, DTYPES):
                good, line = row(name, mode, dtype, client, errors)
                failed += not good
                click.echo(f"{name:9} {mode:5} {place:9} {dtype:5} {line}")
    click.echo(f"{failed} failed" if failed else "all equal")
    sys.exit(1 if failed else 0)


def row(name: str, mode: str, dtype: str, client: Any, errors: bool) -> tuple[bool, str]:
    """Whether one comparison holds, and the rest of its line."""
    try:
        found, compiled = versus_eager(name, MODES[mode], DTYPES[dtype], partial(daggc.compile, client=client))
    except Exception as wrong:
        if errors:
            traceback.print_exc()
        return False, f"FAILED: {type(wrong).__name__}: {str(wrong).splitlines()[0] if str(wrong) else ''}"
    numbers = " ".join(f"{x:8.1e}" for x in (found.outputs, found.gradients, found.inputs, found.buffers))
    line = f"{numbers} {found.allowed:10.2g}"
    plan: Any = compiled.plan
    if plan is None:
        return True, line
    shares = plan.shares()
    line += "  " + " ".join(f"{device} {share:.0%}" for device, share in shares.items())
    line += f" in {len(plan.stages)} stages"
    if len(shares) < 2 or min(shares.values()) < LEAST:
        return False, f"{line}  FAILED: each of two devices must do at least {LEAST:.0%}"
    return True, line


if __name__ == "__main__":
    main()
