"""Plans for giant models on clusters of equal GPUs: pipeline, tensor and data parallelism, chosen and simulated.

Tensor parallelism is simulated only: the runtime places whole ops.
"""

from __future__ import annotations

from daggc.plan.parallel.captured import layers_of
from daggc.plan.parallel.estimate import Choice, Estimate, Model
from daggc.plan.parallel.kernels import Chip, Kernel, Product
from daggc.plan.parallel.layers import Layer, Layers
from daggc.plan.parallel.machine import Machine, machine_of
from daggc.plan.parallel.search import ParallelPlan, choices, plan_parallel
from daggc.plan.parallel.simulated import simulate_choice

__all__ = [
    "Chip",
    "Choice",
    "Estimate",
    "Kernel",
    "Layer",
    "Layers",
    "Machine",
    "Model",
    "ParallelPlan",
    "Product",
    "choices",
    "layers_of",
    "machine_of",
    "plan_parallel",
    "simulate_choice",
]
