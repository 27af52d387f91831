"""Placement of a DAG's nodes on accelerators and CPU cores so that the busiest device has the least load."""

from __future__ import annotations

from daggc.plan.maxload.problem import NO_COLOUR, Assignment, Problem, evaluate, violations
from daggc.plan.maxload.program import optimum
from daggc.plan.maxload.read import Instance, read_instance, read_split
from daggc.plan.maxload.solve import Effort, solve

__all__ = [
    "NO_COLOUR",
    "Assignment",
    "Effort",
    "Instance",
    "Problem",
    "evaluate",
    "optimum",
    "read_instance",
    "read_split",
    "solve",
    "violations",
]
