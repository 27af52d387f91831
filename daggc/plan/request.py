"""What ``daggc.plan(program, devices)`` does: a plan of a program as a user holds it, with or without ``@backward``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from daggc.errors import PlanError
from daggc.ir.graph import Program
from daggc.passes.dce import eliminate
from daggc.passes.vjp import vjp
from daggc.plan.device import Cluster, Device, cluster_of
from daggc.plan.plan import Plan, plan_model


def plan_on(program: Program, devices: Sequence[Device] | Cluster, **options: Any) -> Plan:
    """Cut, place and order a program on devices.

    A program with ``@backward`` is planned for training, with the gradients that it has; one without, for
    inference.

    Args:
        devices: a cluster, or devices with the same link between any two.
        options: those of :func:`daggc.plan.plan.plan_model`.

    Raises:
        PlanError: nothing fits the devices, or ``@backward`` is not the VJP of ``@forward``: planning writes the
            backward itself, and a change made to it by hand would be lost.
    """
    cluster = devices if isinstance(devices, Cluster) else cluster_of(tuple(devices))
    if "backward" not in program.graphs:
        return plan_model(program, cluster, **{"training": False, **options})
    primal, wrt = primal_of(program)
    return plan_model(primal, cluster, **{"wrt": wrt, "training": True, **options})


def primal_of(program: Program) -> tuple[Program, list[str]]:
    """The program before ``vjp``, and the refs of the inputs it was differentiated with respect to."""
    forward = program.forward
    outputs = tuple(port for port in forward.outputs if port.kind != "residual")
    provenance = program.provenance[:-1] if program.provenance[-1:] == ("vjp",) else program.provenance
    primal = replace(program, graphs={"forward": eliminate(replace(forward, outputs=outputs))}, provenance=provenance)
    wrt = [port.target for port in program.backward.outputs_of("grad")]
    known = {port.ref for port in forward.inputs}
    if not known.issuperset(wrt) or vjp(primal, wrt).backward.structure() != program.backward.structure():
        raise PlanError(
            "@backward is not what vjp makes of @forward (a second derivative, or changed by hand); plan the program "
            "without it, or run it unplanned"
        )
    return primal, wrt
