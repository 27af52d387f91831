"""Placement problems made of others, and random ones: what the solver is held against."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from daggc.plan.maxload.problem import NO_COLOUR, Ints, Problem


def training(problem: Problem, backward: float = 1.5) -> Problem:
    """The training step of an inference: every node once more with its edges turned round, on the same device."""
    nodes = problem.nodes
    colour = np.where(problem.colour == NO_COLOUR, np.arange(nodes) + problem.colour.max(initial=0) + 1, problem.colour)
    return replace(
        problem,
        accelerator_seconds=np.concatenate([problem.accelerator_seconds, backward * problem.accelerator_seconds]),
        cpu_seconds=np.concatenate([problem.cpu_seconds, backward * problem.cpu_seconds]),
        size=np.concatenate([problem.size, problem.size]),
        supported=np.concatenate([problem.supported, problem.supported]),
        colour=np.concatenate([colour, colour]),
        edges=np.concatenate([problem.edges, problem.edges[:, ::-1] + nodes]),
        transfer_seconds=np.concatenate([problem.transfer_seconds, problem.transfer_seconds]),
    )


def repeated(problem: Problem, times: int) -> Problem:
    """A network of several copies, each fed by the last node of the one before."""
    nodes = problem.nodes
    colours = problem.colour.max(initial=0) + 1
    last, first = (
        np.setdiff1d(np.arange(nodes), problem.edges[:, 0]),
        np.setdiff1d(np.arange(nodes), problem.edges[:, 1]),
    )
    cost = float(np.median(problem.transfer_seconds))
    links = [(int(last[-1]) + at * nodes, int(first[0]) + (at + 1) * nodes) for at in range(times - 1)]
    return replace(
        problem,
        accelerator_seconds=np.tile(problem.accelerator_seconds, times),
        cpu_seconds=np.tile(problem.cpu_seconds, times),
        size=np.tile(problem.size, times),
        supported=np.tile(problem.supported, times),
        colour=np.concatenate(
            [np.where(problem.colour == NO_COLOUR, NO_COLOUR, problem.colour + at * colours) for at in range(times)]
        ),
        edges=np.concatenate(
            [problem.edges + at * nodes for at in range(times)] + [np.array(links, dtype=int).reshape(-1, 2)]
        ),
        transfer_seconds=np.concatenate([np.tile(problem.transfer_seconds, times), np.full(len(links), cost)]),
    )


def part(problem: Problem, keep: Ints) -> Problem:
    """Only these nodes."""
    number = np.full(problem.nodes, -1)
    number[keep] = np.arange(len(keep))
    edges = number[problem.edges]
    inside = (edges >= 0).all(axis=1)
    return replace(
        problem,
        accelerator_seconds=problem.accelerator_seconds[keep],
        cpu_seconds=problem.cpu_seconds[keep],
        size=problem.size[keep],
        supported=problem.supported[keep],
        colour=problem.colour[keep],
        edges=edges[inside],
        transfer_seconds=problem.transfer_seconds[inside],
    )


def scaled(problem: Problem, transfers: float) -> Problem:
    """Slower or faster links."""
    return replace(problem, transfer_seconds=problem.transfer_seconds * transfers)


def tight(problem: Problem, slack: float) -> Problem:
    """Memory of all accelerators together = slack x what the nodes need."""
    return replace(problem, memory=float(problem.size.sum()) * slack / problem.accelerators)


def random_problem(seed: int, nodes: int, accelerators: int = 3, cpus: int = 1, slack: float = 2.0) -> Problem:
    """A layered DAG with skips, some colours, some nodes that no accelerator can run, and skewed costs."""
    rng = np.random.default_rng(seed)
    edges = [
        (source, target)
        for target in range(1, nodes)
        for source in sorted(set(rng.integers(max(0, target - 6), target, size=rng.integers(1, 4)).tolist()))
    ]
    seconds = rng.lognormal(0, 1, nodes)
    output = rng.lognormal(-1, 1, nodes) * (rng.random(nodes) < 0.9)
    colour = np.full(nodes, NO_COLOUR)
    coloured = rng.random(nodes) < 0.3
    colour[coloured] = rng.integers(0, max(1, nodes // 6), int(coloured.sum()))
    size = rng.lognormal(0, 1, nodes)
    supported = (rng.random(nodes) < 0.95) | (cpus == 0)
    return Problem(
        accelerator_seconds=seconds,
        cpu_seconds=seconds * rng.uniform(2, 12, nodes),
        size=size,
        supported=supported,
        colour=colour,
        edges=np.array(edges, dtype=int).reshape(-1, 2),
        transfer_seconds=output[[source for source, _ in edges]],
        accelerators=accelerators,
        cpus=cpus,
        memory=float(size.sum() * slack / max(1, accelerators)),
    )
