"""Instances in the JSON format published with the paper (github.com/msr-fiddle/dnn-partitioning)."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from daggc.errors import PlanError
from daggc.plan.maxload.problem import NO_COLOUR, Ints, Problem


@dataclass(frozen=True, eq=False)
class Instance:
    """A problem, and the ids that its file gives the nodes: ``ids[node]``."""

    problem: Problem
    ids: tuple[Hashable, ...]


def read_instance(path: Path) -> Instance:
    """Read a problem.

    Raises:
        PlanError: the file is not such JSON, or a field is missing or of another kind.
    """
    data = _json(path)
    try:
        return _instance(data)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(
            f"{path}: not a placement instance, which has maxFPGAs, maxCPUs, maxSizePerFPGA, nodes and edges: {error!r}"
        ) from error


def read_split(path: Path, instance: Instance) -> Ints:
    """Read a split of an instance, such as a human expert's: int[nodes], the device of every node.

    Raises:
        PlanError: the file is not such JSON, or does not place every node once on a device that there is.
    """
    data, problem = _json(path), instance.problem
    number = {name: node for node, name in enumerate(instance.ids)}
    device = np.full(problem.nodes, -1)
    try:
        for key, first, count in (("fpgas", 0, problem.accelerators), ("cpus", problem.accelerators, problem.cpus)):
            parts = [part["nodes"] for part in data.get(key, ())]
            if any(parts[count:]):
                raise PlanError(f"{path}: splits over {len(parts)} {key}, the instance has {count}")
            for k, names in enumerate(parts):
                device[[number[name] for name in names]] = first + k
    except (KeyError, TypeError) as error:
        raise PlanError(f"{path}: not a split of this instance: {error!r}") from error
    if (device < 0).any():
        raise PlanError(f"{path}: node {instance.ids[int(np.argmin(device))]} has no device")
    return device


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: cannot be read as JSON: {error}") from error


def _instance(data: Any) -> Instance:
    nodes, edges = data["nodes"], data["edges"]
    ids = tuple(node["id"] for node in nodes)
    number = {name: at for at, name in enumerate(ids)}
    if len(number) != len(ids):
        raise ValueError("two nodes have one id")
    colours: dict[Hashable, int] = {}

    def colour(node: dict[str, Any]) -> int:
        name = node.get("colorClass")
        return NO_COLOUR if name is None else colours.setdefault(name, len(colours))

    def column(key: str) -> np.ndarray:
        return np.array([node[key] for node in nodes], dtype=float)

    problem = Problem(
        accelerator_seconds=column("fpgaLatency"),
        cpu_seconds=column("cpuLatency"),
        size=column("size"),
        supported=np.array([bool(node["supportedOnFpga"]) for node in nodes], dtype=bool),
        colour=np.array([colour(node) for node in nodes], dtype=int),
        edges=np.array([(number[e["sourceId"]], number[e["destId"]]) for e in edges], dtype=int).reshape(-1, 2),
        transfer_seconds=np.array([e["cost"] for e in edges], dtype=float),
        accelerators=int(data["maxFPGAs"]),
        cpus=int(data["maxCPUs"]),
        memory=float(data["maxSizePerFPGA"]),
    )
    return Instance(problem, ids)
