"""Time the compiler on GPT-2 as its layers grow, beside torch.export's own time.

Run it as tools/scaling. The columns of a row are seconds: torch.export
with its decompositions, alone; then daggc: capture (which runs torch.export again), simplify, vjp, and a plan for
two devices; their sum, also as a multiple of torch.export's own time; and of the row before.
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

from daggc.frontend.export import capture
from daggc.passes import SIMPLIFY
from daggc.passes.manager import pipeline, run
from daggc.passes.vjp import vjp
from daggc.plan.device import cluster_of, cpu_device
from daggc.plan.plan import plan_model


def gpt2(layers: int, width: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """GPT-2 with labels; only the number of layers matters to a compiler."""
    config = GPT2Config(
        n_layer=layers, n_head=4, n_embd=width, vocab_size=1000, n_positions=64, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = torch.randint(1000, (2, 32), generator=torch.Generator().manual_seed(0))
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids, "use_cache": False}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    gc.collect()
    begun = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begun


def measure(layers: int, width: int) -> dict[str, float]:
    """Seconds of each part, and the number of nodes of the joint graph."""
    model, kwargs = gpt2(layers, width)
    seconds: dict[str, float] = {}
    _, seconds["export"] = timed(lambda: torch.export.export(model, (), kwargs, strict=False).run_decompositions({}))
    captured, seconds["capture"] = timed(lambda: capture(model, (), kwargs).program)
    simplified, seconds["simplify"] = timed(lambda: run(captured, pipeline(SIMPLIFY)))
    derived, seconds["vjp"] = timed(lambda: vjp(simplified))
    cluster = cluster_of([cpu_device(0), cpu_device(1)])
    _, seconds["plan"] = timed(lambda: plan_model(simplified, cluster))
    nodes = len(derived.forward.nodes) + len(derived.backward.nodes)
    return {"layers": layers, "nodes": nodes, **seconds}


def table(rows: Sequence[dict[str, float]]) -> Table:
    shown = Table(box=box.MARKDOWN)
    heads = (
        "layers",
        "nodes",
        "torch.export",
        "capture",
        "simplify",
        "vjp",
        "plan",
        "daggc in all",
        "of export",
        "growth",
    )
    for head in heads:
        shown.add_column(head, justify="right")
    before = 0.0
    for row in rows:
        own = sum(row[part] for part in ("capture", "simplify", "vjp", "plan"))
        parts = [f"{row[part]:.2f}" for part in ("export", "capture", "simplify", "vjp", "plan")]
        ratio = f"{own / row['export']:.2f}x"
        growth = f"{own / before:.2f}x" if before else ""
        shown.add_row(f"{row['layers']:.0f}", f"{row['nodes']:,.0f}", *parts, f"{own:.2f}", ratio, growth)
        before = own
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--width", type=int, default=64)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of torch's and transformers' own deprecations
    logging.getLogger("transformers").setLevel(logging.ERROR)
    measure(1, options.width)  # torch.export's first use is slow
    Console(width=120).print(table([measure(layers, options.width) for layers in options.layers]))


if __name__ == "__main__":
    main()
