"""Event-driven simulation of a placed graph, or of a schedule: when each task would run, and in how much memory."""

from __future__ import annotations

from daggc.plan.simulate.engine import run_jobs
from daggc.plan.simulate.jobs import IDEAL, Job, Runtime, Timed
from daggc.plan.simulate.memory import Buffer, Memory, memory_over_time
from daggc.plan.simulate.pipeline import simulate_schedule
from daggc.plan.simulate.placed import simulate
from daggc.plan.simulate.result import Simulation

__all__ = [
    "IDEAL",
    "Buffer",
    "Job",
    "Memory",
    "Runtime",
    "Simulation",
    "Timed",
    "memory_over_time",
    "run_jobs",
    "simulate",
    "simulate_schedule",
]
