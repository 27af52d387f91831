"""A stream of batches through BERT-base: ``map`` over worker processes of one thread against eager PyTorch with one.

``tools/stream``. Rounds of both in turn; medians. The bound is as many
times eager as there are workers, less the fill of the pipeline; the results are compared bit by bit.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from transformers import BertConfig, BertModel

import daggc
from daggc.runtime.local_workers import local_workers

Batches = list[dict[str, torch.Tensor]]


def bert(layers: int) -> nn.Module:
    """BERT-base, with so many of its 12 layers, and weights that nobody has trained."""
    torch.manual_seed(0)
    return BertModel(BertConfig(num_hidden_layers=layers)).eval()


def sentences(count: int, size: int, length: int = 128) -> Batches:
    """``count`` batches of ``size`` x ``length`` tokens."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(size, length, dtype=torch.int64)
    return [
        {"input_ids": torch.randint(30_000, (size, length), generator=generator), "attention_mask": mask}
        for _ in range(count)
    ]


def eagerly(model: nn.Module, batches: Batches) -> float:
    """Seconds a batch in this process."""
    start = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return (time.perf_counter() - start) / len(batches)


def streamed(compiled: Any, batches: Batches, in_flight: int | None) -> float:
    """Seconds a batch through the workers, from the first batch that is read to the last result."""
    start = time.perf_counter()
    for _ in compiled.map(batches, in_flight=in_flight):
        pass
    return (time.perf_counter() - start) / len(batches)


def measure(layers: int, size: int, count: int, rounds: int, workers: int, in_flight: int | None) -> dict[str, Any]:
    """The median ratio of throughputs, and what it is made of."""
    torch.set_num_threads(1)
    model, batches = bert(layers), sentences(count, size)
    with local_workers(workers) as client:
        compiled = daggc.compile(model, client=client)
        (first,) = compiled.map(batches[:1])  # captured, placed; a pass of eager warms it up too
        with torch.no_grad():
            equal = torch.equal(first.last_hidden_state, model(**batches[0]).last_hidden_state)
        streamed(compiled, batches[:3], in_flight)
        pairs = [
            (eagerly(model, batches[: max(2, count // 3)]), streamed(compiled, batches, in_flight))
            for _ in range(rounds)
        ]
    return {
        "workers": workers,
        "batches": count,
        "eager seconds": statistics.median(eager for eager, _ in pairs),
        "map seconds": statistics.median(own for _, own in pairs),
        "throughput ratio": statistics.median(eager / own for eager, own in pairs),
        "bound": workers * count / (count + workers - 1),
        "bitwise equal": equal,
    }


@click.command()
@click.option("--layers", default=12, show_default=True)
@click.option("--size", default=2, show_default=True, help="Samples of a batch.")
@click.option("--count", default=16, show_default=True, help="Batches of a stream.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--in-flight", type=int, help="Batches under way; by default as map chooses.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
def main(
    layers: int, size: int, count: int, rounds: int, workers: int, in_flight: int | None, out: Path | None
) -> None:
    """Throughput of streamed inference against eager PyTorch with one thread."""
    figures = measure(layers, size, count, rounds, workers, in_flight)
    for name, value in figures.items():
        print(f"{name:18} {value:.3f}" if isinstance(value, float) else f"{name:18} {value}")
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
