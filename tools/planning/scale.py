"""How long planning takes: a graph of 5,000 nodes on 8 devices, and GPT-3 on up to 1,024 GPUs.

GPT-3 (175 billion parameters) is captured on the meta device: its weights are never allocated.
"""

from __future__ import annotations

import json
import os
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from planning.models import Block
from torch import nn

import daggc
from daggc.ir.graph import Program
from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.plan.cluster_file import read_cluster
from daggc.plan.device import cluster_of, cpu_device
from daggc.plan.parallel import layers_of, plan_parallel
from daggc.plan.plan import plan_model
from daggc.plan.simulate import simulate

WIDTH, LAYERS, HEADS, SEQUENCE, VOCABULARY = 12288, 96, 96, 2048, 51200
CLUSTER = """
[[devices]]
kind = "cuda"  # A100 80 GB
count = {count}
per_host = 8
memory = 80e9
bandwidth = 2.039e12
launch = 4e-6
threads = 0
flops = {{ gemm = 3.12e14, elementwise = 1.95e13 }}

[links]
within_host = {{ latency = 5e-6, bandwidth = 3e11 }}
between_hosts = {{ latency = 1e-5, bandwidth = 2.5e10 }}
"""


class GPT(nn.Module):
    """GPT-3 with its loss; the embedding is the head."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(SEQUENCE, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(F.linear(self.norm(x), self.tokens.weight).flatten(0, 1), targets.flatten())


def gpt3(layers: int) -> tuple[Program, dict[str, Any]]:
    """The program of GPT-3, and what capturing it took."""
    start = time.perf_counter()
    with torch.device("meta"):
        model = GPT(layers).to(torch.bfloat16)
        ids = torch.zeros(1, SEQUENCE, dtype=torch.int64)
    made = time.perf_counter()
    program = daggc.trace(model, (ids, ids.clone()))
    return program, {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "nodes": len(program.forward.nodes),
        "model_seconds": round(made - start, 2),
        "capture_seconds": round(time.perf_counter() - made, 2),
        "memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3),
    }


def deep(count: int) -> Program:
    """A residual network of ``count`` nodes or a few more: norm, product, activation, product, sum."""
    b = REGISTRY.builder("forward")
    width, kind = 512, TensorType("f32", (32, 512))
    x = b.input(kind, "input", "0")
    for layer in range(count // 5):
        name = f"layers.{layer}"
        scale, shift = (b.input(TensorType("f32", (width,)), "param", f"{name}.{end}") for end in ("scale", "shift"))
        up, down = (b.input(TensorType("f32", (width, width)), "param", f"{name}.{end}") for end in ("up", "down"))
        with b.at(path=name):
            y = b.emit_many("layer_norm", x, scale, shift, normalized_shape=(width,), eps=1e-5)[0]
            y = b.emit("tanh", b.emit("linear", y, up))
            x = b.emit("add", x, b.emit("linear", y, down))
    b.output(b.emit("sum", x, dims=(0, 1), keepdim=False), "output", "0")
    return Program({"forward": b.build()})


def time_deep(count: int) -> dict[str, Any]:
    """Planning a deep network on 8 devices, two of them half as fast."""
    program = deep(count)
    slow = {op_class: rate / 2 for op_class, rate in cpu_device().flops.items()}
    devices = [cpu_device(index) for index in range(8)]
    devices[6:] = [replace(device, flops=slow) for device in devices[6:]]
    cluster = cluster_of(devices)
    start = time.perf_counter()
    plan = plan_model(program, cluster)
    planned = time.perf_counter()
    simulated = simulate(plan.placed, plan.program, cluster)
    return {
        "nodes": len(program.forward.nodes),
        "joint_nodes": len(plan.joint.nodes),
        "stages": len(plan.stages),
        "plan_seconds": round(planned - start, 2),
        "simulate_seconds": round(time.perf_counter() - planned, 2),
        "predicted_seconds": simulated.makespan,
        "slowest_over_bound": round(plan.slowest / plan.bound, 3),
    }


def time_gpt3(program: Program, count: int, batch: int) -> dict[str, Any]:
    """Planning and simulating GPT-3 on some GPUs."""
    start = time.perf_counter()
    cluster = read_cluster(CLUSTER.format(count=count))
    plan = plan_parallel(layers_of(program), cluster, batch)
    return {
        "gpus": count,
        "seconds": round(time.perf_counter() - start, 2),
        "examined": plan.examined,
        "jobs": len(plan.simulation.tasks),
        "best": str(plan.best),
        "simulated_step": plan.simulation.makespan,
    }


@click.command()
@click.option("--nodes", default=5000, help="Size of the deep network; 0 leaves it out.")
@click.option("--gpus", multiple=True, type=int, default=(64, 256, 1024), help="Sizes of clusters for GPT-3.")
@click.option("--layers", default=LAYERS, help="Of GPT-3; 0 leaves it out.")
@click.option("--batch", default=1536, help="Samples of a step.")
@click.option("--program", "path", help="GPT-3's program: read from this file if it is there, else written to it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(nodes: int, gpus: tuple[int, ...], layers: int, batch: int, path: str | None, as_json: bool) -> None:
    """Time the planner at scale."""
    rows: list[tuple[str, dict[str, Any]]] = []

    def report(name: str, row: dict[str, Any]) -> None:
        rows.append((name, row))
        if not as_json:
            click.echo(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))

    if nodes:
        report("deep", time_deep(nodes))
    if layers:
        if path and os.path.exists(path):
            program = daggc.load(path)
        else:
            program, row = gpt3(layers)
            report("capture", row)
            if path:
                daggc.save(program, Path(path))
        found = [time_gpt3(program, count, batch) for count in gpus]
        for row in found:
            report("gpt3", row)
        report("all of GPT-3 but its capture", {"seconds": round(sum(row["seconds"] for row in found), 2)})
    if as_json:
        click.echo(json.dumps([{"name": name, **row} for name, row in rows]))


if __name__ == "__main__":
    main()
