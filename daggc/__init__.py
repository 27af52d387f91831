"""daggc: from a PyTorch model to forward and backward task graphs that run on Dask workers.

Names are resolved when first used, so that ``import daggc`` alone loads neither torch nor dask, and programs
can be read, checked and interpreted where neither is installed.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from daggc import testing as testing
    from daggc.api import Cluster as Cluster
    from daggc.api import Device as Device
    from daggc.api import Graph as Graph
    from daggc.api import Link as Link
    from daggc.api import Node as Node
    from daggc.api import Program as Program
    from daggc.api import Value as Value
    from daggc.api import cpu_device as cpu_device
    from daggc.api import from_json as from_json
    from daggc.api import gpu_device as gpu_device
    from daggc.api import interpret as interpret
    from daggc.api import load as load
    from daggc.api import load_weights as load_weights
    from daggc.api import parse as parse
    from daggc.api import run_pipeline as run_pipeline
    from daggc.api import save as save
    from daggc.api import to_json as to_json
    from daggc.api import to_text as to_text
    from daggc.api import verify as verify
    from daggc.api import vjp as vjp
    from daggc.errors import CaptureError as CaptureError
    from daggc.errors import DaggcError as DaggcError
    from daggc.errors import DifferentiationError as DifferentiationError
    from daggc.errors import IRError as IRError
    from daggc.errors import PlanError as PlanError
    from daggc.errors import RunError as RunError
    from daggc.errors import TypeRuleError as TypeRuleError
    from daggc.errors import WorkerLostError as WorkerLostError
    from daggc.frontend.export import Capture as Capture
    from daggc.frontend.export import capture as capture
    from daggc.frontend.export import trace as trace
    from daggc.frontend.export import weights_of as weights_of
    from daggc.frontend.opaque import opaque as opaque
    from daggc.plan.plan import Plan as Plan
    from daggc.plan.request import plan_on as plan  # noqa: F401  # the public name
    from daggc.runtime.calibrate import calibrate as calibrate
    from daggc.runtime.compile import compile as compile
    from daggc.runtime.doctor import doctor as doctor


def __getattr__(name: str) -> Any:
    from daggc.api import resolve  # here, not above: `import daggc` alone stays light

    value = resolve(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from daggc.api import NAMES

    return sorted({*globals(), *NAMES})
