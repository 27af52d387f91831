"""Plans: devices and costs, the cut into tasks, their placement and their order.

The package is also the public function ``daggc.plan(program, devices)``: Python sets a package's name on its
parent whenever a module of it is imported, so a function of that name would be lost.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daggc.ir.graph import Program
    from daggc.plan.device import Cluster, Device
    from daggc.plan.plan import Plan


class _Callable(ModuleType):
    def __call__(self, program: Program, devices: Sequence[Device] | Cluster, **options: Any) -> Plan:
        """Cut, place and order a program; see :func:`daggc.plan.request.plan_on`."""
        from daggc.plan.request import plan_on  # here: this file runs before the package's modules exist

        return plan_on(program, devices, **options)


sys.modules[__name__].__class__ = _Callable
