"""Solve max-load placement instances and print a table: value, bound, gap, the expert's value, HiGHS's, seconds.

An instance is a JSON file in the format of "Efficient Algorithms for Device Placement of DNN Graph Operators" (NeurIPS
2020, github.com/msr-fiddle/dnn-partitioning). The expert's split of NAME.json is NAME.expert.json beside it, if any.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import numpy as np

from daggc.errors import PlanError
from daggc.plan.maxload import Assignment, Instance, evaluate, optimum, read_instance, read_split, solve, violations

_EXPERT = ".expert.json"
_HEADER = (
    f"{'instance':34} {'nodes':>5} {'value':>10} {'bound':>10} {'gap':>7} {'expert':>10} "
    f"{'HiGHS':>10} {'its bound':>10} {'seconds':>8}  found by"
)


@click.command(help=__doc__)
@click.argument("instances", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--oracle", type=float, default=0, help="Let HiGHS solve each instance, for at most so many seconds.")
@click.option(
    "--splits", type=click.Path(file_okay=False, path_type=Path), help="Write the assignments to this folder."
)
def main(instances: tuple[Path, ...], oracle: float, splits: Path | None) -> None:
    click.echo(_HEADER)
    for path in instances:
        if path.name.endswith(_EXPERT):
            continue
        try:
            click.echo(_row(path, oracle, splits))
        except PlanError as error:
            click.echo(f"{path.stem:34} {error}")


def _row(path: Path, oracle: float, splits: Path | None) -> str:
    instance = read_instance(path)
    start = time.perf_counter()
    found = solve(instance.problem)
    seconds = time.perf_counter() - start
    if broken := violations(instance.problem, found.device):
        raise PlanError(f"not a placement: {broken[0]}")
    if splits is not None:
        splits.mkdir(parents=True, exist_ok=True)
        (splits / f"{path.stem}.split.json").write_text(json.dumps(_split(instance, found)))
    best = optimum(instance.problem, oracle) if oracle else None
    value, bound = (f"{best.value:10.3f}", f"{best.bound:10.3f}") if best else (f"{'-':>10}", f"{'-':>10}")
    return (
        f"{path.stem:34} {instance.problem.nodes:5} {found.value:10.3f} {found.bound:10.3f} {found.gap:7.2%} "
        f"{_expert(path, instance):>10} {value} {bound} {seconds:8.1f}  {found.how}"
    )


def _expert(path: Path, instance: Instance) -> str:
    split = path.with_name(path.stem + _EXPERT)
    if not split.exists():
        return "-"
    device = read_split(split, instance)
    value = evaluate(instance.problem, device).max()
    return f"{value:.3f}" + ("*" if violations(instance.problem, device) else "")


def _split(instance: Instance, found: Assignment) -> dict[str, object]:
    """An assignment in the format of the experts'."""
    accelerators = instance.problem.accelerators

    def part(k: int) -> dict[str, object]:
        nodes = [instance.ids[node] for node in np.flatnonzero(found.device == k)]
        return {"load": float(found.loads[k]), "nodes": nodes}

    return {
        "fpgas": [part(k) for k in range(accelerators)],
        "cpus": [part(k) for k in range(accelerators, instance.problem.devices)],
        "maxLoad": found.value,
    }


if __name__ == "__main__":
    main()
