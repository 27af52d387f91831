"""The command line. Each command reads its arguments, calls one function of the package and prints the result.

torch is loaded only by commands that are given a Python model or run on torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console, RenderableType
from safetensors.numpy import save_file

import daggc
from daggc.errors import DaggcError, RunError
from daggc.interp import Arrays
from daggc.ir.graph import Program
from daggc.ir.printer import print_program
from daggc.ir.serialize import load, load_weights, save, to_json, weights_path
from daggc.ir.verifier import verify
from daggc.ops import REGISTRY
from daggc.passes.manager import pipeline, run
from daggc.plan.parallel import plan_parallel
from daggc.plan.schedule import SCHEDULES
from daggc.report import stages, tasks, text
from daggc.report.devices import cluster_text
from daggc.report.diff import diff_programs
from daggc.report.doctor import doctor_table
from daggc.report.dot import to_dot
from daggc.report.mermaid import to_mermaid
from daggc.report.picture import picture
from daggc.report.running import BACKENDS, check_names, fill_inputs, run_program
from daggc.report.step_timeline import predicted_spans
from daggc.report.timeline import timeline_html

FORMATS = ("text", "json", "dot", "mermaid")
_SHOWN = 6  # numbers of an output that are printed


class _Count(click.ParamType):
    """A number, or ``auto``."""

    name = "number|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "auto" or isinstance(value, int):
            return value
        if not value.isdigit() or int(value) < 1:
            self.fail(f"{value!r} is neither a number nor auto", param, ctx)
        return int(value)


class _Commands(click.Group):
    """Says what went wrong in one message on stderr, with exit status 1; ``--debug`` shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (DaggcError, OSError) as wrong:
            if ctx.params.get("debug"):
                raise
            click.echo(f"daggc: {wrong}", err=True)
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(daggc.__version__, prog_name="daggc")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """From a PyTorch model to forward and backward task graphs on Dask workers.

    MODEL is path/to/file.py:factory or package.module:factory, a callable that gives (model, args) or
    (model, args, kwargs); or a .dag or .json file.
    """


_devices = click.option(
    "--devices", default="2", show_default=True, help="A number of CPU workers, cpu:0,gpu:0, or a file: cluster.toml."
)
_out = click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write here, not to stdout.")


@main.command("dump-ir")
@click.argument("model")
@click.option("--stage", type=click.Choice((*stages.STAGES, "dask")), default="captured", show_default=True)
@click.option("--format", "form", type=click.Choice(FORMATS), default="text", show_default=True)
@click.option("--weights", type=click.Path(dir_okay=False, path_type=Path), help="Write the weights (safetensors).")
@_devices
@_out
def dump_ir(model: str, stage: str, form: str, weights: Path | None, devices: str, out: Path | None) -> None:
    """Print MODEL's program at a stage of compilation.

    The stage "dask" lists the tasks of a plan: key, worker's device, graph it runs, dependencies.
    """
    source = stages.open_source(model)
    cluster = stages.parse_devices(devices)
    if weights is not None:
        _save_arrays(dict(source.weights), weights)
    if stage == "dask":
        rows = tasks.dask_tasks(stages.at_stage(source.program, "plan", cluster))
        render_tasks: dict[str, Callable[[], str]] = {
            "text": lambda: text.render(tasks.table(rows), 160),
            "json": lambda: json.dumps([row.to_json() for row in rows], indent=1) + "\n",
            "dot": lambda: to_dot(tasks.task_picture(rows)),
            "mermaid": lambda: to_mermaid(tasks.task_picture(rows)),
        }
        _write(render_tasks[form](), out)
    else:
        _write(render_program(stages.at_stage(source.program, stage, cluster), form), out)


def render_program(program: Program, form: str) -> str:
    """A program as text, JSON, DOT or Mermaid."""
    if form == "json":
        return json.dumps(to_json(program)) + "\n"
    if form == "dot":
        return to_dot(picture(program))
    return to_mermaid(picture(program)) if form == "mermaid" else print_program(program)


@main.command("verify")
@click.argument("file", type=click.Path(dir_okay=False))
def verify_file(file: str) -> None:
    """Check every rule of the IR on a .dag or .json FILE."""
    program = load(file)
    verify(program, REGISTRY)
    click.echo(f"OK: {text.counts(program)}")


@main.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--passes", default=stages.SIMPLIFY, show_default=True, help='Such as "fold,cse,vjp{wrt=params},dce".')
@_out
def opt(file: str, passes: str, out: Path | None) -> None:
    """Run passes over a .dag or .json FILE, verifying after each."""
    steps = pipeline(passes)
    program = load(file)
    verify(program, REGISTRY)
    after = run(program, steps)
    form = "json" if out is not None and out.suffix == ".json" else "text"
    _write(render_program(after, form), out)


@main.command("run")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--weights", type=click.Path(dir_okay=False), help="By default FILE with the suffix .safetensors.")
@click.option("--inputs", type=click.Path(dir_okay=False), help="safetensors, by port: input_ids, cotangent:output:0.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the outputs (safetensors).")
@click.option("--backend", type=click.Choice(BACKENDS), default="torch", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of random ops and of --random.")
@click.option("--random", "random_", is_flag=True, help="Random numbers for every input that is not given.")
def run_file(
    file: str, weights: str | None, inputs: str | None, out: Path | None, backend: str, seed: int, random_: bool
) -> None:
    """Run a .dag or .json FILE, without the model's source."""
    program = load(file)
    verify(program, REGISTRY)
    beside = weights_path(file)
    stored = weights or (beside if beside.exists() else None)
    arrays = load_weights(inputs) if inputs else {}
    check_names(program, arrays)
    given = {**(load_weights(stored) if stored else {}), **arrays}
    results = run_program(program, fill_inputs(program, given, seed, random_), backend)
    for name, array in results.items():
        click.echo(f"{name}: {describe(array)}")
    if out is not None:
        _save_arrays(results, out)


def describe(array: np.ndarray) -> str:
    """dtype, shape and the first numbers."""
    shown = " ".join(f"{number:.6g}" for number in array.reshape(-1)[:_SHOWN].tolist())
    more = " ..." if array.size > _SHOWN else ""
    return f"{array.dtype}[{','.join(map(str, array.shape))}] {shown}{more}"


@main.command()
@click.argument("a")
@click.argument("b")
@click.pass_context
def diff(ctx: click.Context, a: str, b: str) -> None:
    """Compare what two programs compute; exit status 1 if they differ. A and B are models or files."""
    lines = diff_programs(stages.open_source(a).program, stages.open_source(b).program)
    click.echo("\n".join(lines) if lines else "the same structure")
    ctx.exit(1 if lines else 0)


@main.command()
@click.argument("model")
def summary(model: str) -> None:
    """Nodes, FLOPs and bytes of MODEL by op, and what leaves the portable ops."""
    program = stages.open_source(model).program
    _show(text.summary(program))
    click.echo(text.counts(program))


@main.command()
@click.argument("model")
@_devices
@click.option(
    "--batch", type=int, help="Samples of a step on many equal GPUs: choose pipeline, tensor and data parallel."
)
@_out
def plan(model: str, devices: str, batch: int | None, out: Path | None) -> None:
    """Print the tasks MODEL is cut into and where they run; with -o, write the plan's program.

    With --batch, print instead how a step of a giant model would best be spread over the GPUs of a cluster file, and
    how long it would take; MODEL may be on torch's meta device, without weights.
    """
    cluster = stages.parse_devices(devices)
    source = stages.open_source(model)
    if batch is not None:
        spread = plan_parallel(source.program, cluster, batch)
        click.echo(str(spread))
        if out is not None:
            out.write_text(json.dumps(spread.to_json(), indent=1) + "\n")
        return
    made = stages.make_plan(source.program, cluster)
    for graph in text.placed_graphs(made.program):
        _show(text.tasks_table(graph, made.program))
    if out is not None:
        save(made.program, out)


@main.command()
@click.argument("model")
@_devices
@click.option("--loss", help="file.py:function(output, target); by default the model gives its own loss.")
@click.option("--optimizer", type=click.Choice(("adamw", "adam", "sgd")), default="adamw", show_default=True)
@click.option("--microbatches", type=_Count(), default="auto", show_default=True)
@click.option("--replicas", type=_Count(), default="auto", show_default=True)
@click.option("--schedule", type=click.Choice(("auto", *SCHEDULES)), default="auto", show_default=True)
@click.option("--timeline", type=click.Path(dir_okay=False, path_type=Path), help="Write a picture (HTML).")
@_out
def simulate(
    model: str,
    devices: str,
    loss: str | None,
    optimizer: str,
    timeline: Path | None,
    out: Path | None,
    **choices: Any,
) -> None:
    """Predict a training step of MODEL on devices that need not be there; -o writes the simulation (JSON).

    MODEL's arguments are a batch of it; with --loss, its target last. With "auto", every choice that is left open is
    simulated, and the fastest that fits memory is taken.
    """
    from daggc.runtime.predict import predict_step
    from daggc.runtime.step_program import Options

    module, batch = stages.model_and_batch(stages.call_factory(model), model)
    loss_fn = stages.find_callable(loss) if loss else None
    step = predict_step(module, loss_fn, batch, stages.parse_devices(devices), optimizer, Options(**choices))
    click.echo(step.explain().rstrip("\n"))
    if out is not None:
        out.write_text(json.dumps(step.predicted.to_json()) + "\n")
    if timeline is not None:
        timeline.write_text(timeline_html(predicted_spans(step.predicted), title=f"daggc: a step of {model}"))


@main.command()
@click.option("--workers", default=0, show_default=True, help="Start this many worker processes and measure them.")
@click.option("--scheduler", help="Address of a running Dask scheduler, instead of --workers.")
@click.option("--fresh", is_flag=True, help="Measure even what is known.")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write a cluster file (JSON).")
def calibrate(workers: int, scheduler: str | None, fresh: bool, out: Path | None) -> None:
    """Measure the workers of a Dask cluster: rates, overheads and links, as plans are made with.

    What is written with -o serves as --devices of plan, explain and simulate, on any machine.
    """
    from daggc.runtime.calibrate import calibrate as measure
    from daggc.runtime.local_workers import workers_for

    with workers_for(workers or (0 if scheduler else 1), scheduler) as client:
        cluster = measure(client, fresh=fresh)
    click.echo(cluster_text(cluster))
    if out is not None:
        out.write_text(json.dumps(cluster.to_json()) + "\n")


@main.command()
@click.option("--workers", default=0, show_default=True, help="Start this many worker processes and look at them.")
@click.option("--scheduler", help="Address of a running Dask scheduler; with neither, look at this machine.")
@click.option("--seconds", default=20.0, show_default=True, help="To wait for each answer.")
@click.option("--json", "as_json", is_flag=True, help="Print plain data.")
@click.pass_context
def doctor(ctx: click.Context, workers: int, scheduler: str | None, seconds: float, as_json: bool) -> None:
    """Check how a Dask cluster is set up, and print the settings it lacks; exit status 1 if something is bad."""
    from daggc.runtime.doctor import doctor as diagnose
    from daggc.runtime.local_workers import workers_for

    with workers_for(workers, scheduler) as client:
        diagnosis = diagnose(client, seconds=seconds)
    if as_json:
        click.echo(json.dumps(diagnosis.to_json(), indent=1))
    else:
        _show(doctor_table(diagnosis))
        if diagnosis.yaml:
            click.echo(f"Dask's configuration, where workers and scheduler are started:\n\n{diagnosis.yaml}", nl=False)
    ctx.exit(1 if diagnosis.level == "bad" else 0)


@main.command()
@click.argument("model")
@_devices
def explain(model: str, devices: str) -> None:
    """Say why MODEL's plan is as it is."""
    made = stages.make_plan(stages.open_source(model).program, stages.parse_devices(devices))
    click.echo(str(made.explain()).rstrip("\n"))


@main.command()
@click.argument("model")
@click.option("--steps", default=100, show_default=True, help="In all, those before a checkpoint included.")
@click.option("--batches", help="file.py:function giving an iterable of batches; by default MODEL's arguments again.")
@click.option("--loss", help="file.py:function(output, target); by default the model gives its own loss.")
@click.option("--optimizer", type=click.Choice(("adamw", "adam", "sgd")), default="adamw", show_default=True)
@click.option("--lr", default=1e-3, show_default=True, help="Learning rate.")
@click.option("--accumulate", default=1, show_default=True, help="Batches that are one step.")
@click.option("--microbatches", type=_Count(), default=1, show_default=True)
@click.option("--replicas", type=_Count(), default=1, show_default=True, help="Of every stage (data parallel).")
@click.option("--schedule", type=click.Choice(("auto", *SCHEDULES)), default="1f1b", show_default=True)
@click.option("--clip", type=float, help="Largest global norm of the gradients.")
@click.option("--workers", default=0, show_default=True, help="Start this many worker processes; 0: this process.")
@click.option("--scheduler", help="Address of a running Dask scheduler, instead of --workers.")
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Write a checkpoint here.")
@click.option("--every", default=0, show_default=True, help="Write it every so many steps too.")
@click.option("--resume", type=click.Path(dir_okay=False, path_type=Path), help="Go on from a checkpoint.")
@click.option("--seed", default=0, show_default=True, help="Of random ops.")
@click.option("--explain", "explained", is_flag=True, help="Print the plan and its reasons first.")
def train(
    model: str,
    batches: str | None,
    loss: str | None,
    workers: int,
    scheduler: str | None,
    explained: bool,
    **given: Any,
) -> None:
    """Train MODEL on the workers of a Dask cluster, or in this process; prints each step's loss.

    A batch is a tuple of the model's arguments and, with --loss, the target; or a dict of keywords.
    """
    from daggc.runtime.fit import FitOptions, fit  # torch and dask, where they are asked for
    from daggc.runtime.local_workers import workers_for

    made = stages.call_factory(model)
    module, example = stages.model_and_batch(made, model)
    loss_fn = stages.find_callable(loss) if loss else None
    source = stages.find_callable(batches) if batches else lambda: [example]
    options = FitOptions(rate=given.pop("lr"), max_grad_norm=given.pop("clip"), **given)
    shown = not explained

    def report(number: int, value: float, step: Any) -> None:
        nonlocal shown
        if not shown:
            click.echo(step.explain().rstrip("\n"))
            shown = True
        click.echo(f"step {number} loss {value:.6g}")

    with workers_for(workers, scheduler) as client:
        fit(module, loss_fn, source, options, client, report)


def _show(table: RenderableType) -> None:
    """Print a table: as wide as the terminal, or 120 columns into a file."""
    console = Console()
    console.print(table) if console.is_terminal else click.echo(text.render(table), nl=False)


def _write(content: str, out: Path | None) -> None:
    if out is None:
        click.echo(content, nl=False)
    else:
        out.write_text(content)


def _save_arrays(arrays: Arrays, path: Path) -> None:
    try:
        save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, path)
    except Exception as wrong:  # safetensors raises its own errors, and OSError without the path
        raise RunError(f"cannot write {path}: {wrong}") from wrong


if __name__ == "__main__":
    main()
