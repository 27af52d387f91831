"""Python functions that stay Python: ``@daggc.opaque`` and every ``autograd.Function``.

During capture such a call is recorded as one call of the custom op ``daggc::python_call``, so that
``torch.export`` neither looks inside nor drops a backward the user wrote (non-strict export would do both).
In the IR it is a ``python.call`` node; where it runs, the function is found by name in a registry.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch

from daggc.errors import CaptureError, RunError
from daggc.frontend.autocast import autocast_of, autocast_state

_FUNCTIONS: dict[str, Callable[..., Any]] = {}
_OWNERS: dict[str, Any] = {}  # what each name was given to: a function, or an autograd.Function class
_RULES: dict[str, Callable[..., Any]] = {}
_APPLY = torch.autograd.Function.__dict__["apply"]
_TORCHS_OWN = ("torch._", "torch.utils.checkpoint")  # classes inside torch.cond, custom ops, checkpoints: traced
_WRAPPED: dict[str, Callable[..., Any]] = {}  # what ``opaque`` returned, found by name in the user's module
_APPLY_LOCK = threading.RLock()
_here = threading.local()  # other threads may run programs while this one captures

_library = torch.library.Library("daggc", "FRAGMENT")
_library.define("python_call(str target, str args, Tensor[] inputs) -> Tensor[]")


def opaque(
    function: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    out: Callable[..., Any] | None = None,
) -> Any:
    """Keep a function as it is: daggc runs it, and torch's autograd through it, but never looks inside.

    The function takes tensors and plain numbers or strings, and returns a tensor or a tuple of tensors; it
    must not write to its inputs. Outside daggc it behaves as before. During capture it is called once, on
    tensors without data, to learn the shapes of its results; where it cannot bear that, give ``out``.

    Args:
        name: the name that programs refer to it by; by default ``module:qualified.name``.
        out: a function of the same arguments that returns tensors of the right dtypes and shapes.
    """
    if function is None:
        return lambda f: opaque(f, name=name, out=out)
    target = _enter(function, name)
    if out is not None:
        _RULES[target] = out

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return record(target, args, kwargs) if capturing() else function(*args, **kwargs)

    _WRAPPED[target] = call
    return call


def capturing() -> bool:
    """Whether this thread is capturing a model."""
    return getattr(_here, "capturing", False)


def _enter(function: Any, name: str | None = None) -> str:
    """Register a function or class; two of one qualified name (made in a loop, say) get different names."""
    stem = name or f"{function.__module__}:{function.__qualname__}"
    target, count = stem, 1
    while name is None and _OWNERS.get(target, function) is not function:
        count += 1
        target = f"{stem}#{count}"
    _OWNERS[target] = function
    is_class = isinstance(function, type) and issubclass(function, torch.autograd.Function)
    _FUNCTIONS[target] = _APPLY.__get__(None, function) if is_class else function
    return target


def lookup(target: str) -> Callable[..., Any]:
    """The function registered under a name. Raises RunError saying how to register it."""
    try:
        return _FUNCTIONS[target]
    except KeyError:
        raise RunError(
            f"the program calls the Python function {target!r}, which is not registered here; "
            f"import the module that defines it, or register one with daggc.opaque(f, name={target!r})"
        ) from None


def registered(targets: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """The functions of these names, to ship to a worker."""
    # The wrapper travels by name where its module can be imported there; the bare function never could.
    return {target: _WRAPPED.get(target) or lookup(target) for target in targets}


def register_functions(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Enter functions that were shipped here."""
    _FUNCTIONS.update(functions)


@contextmanager
def recording() -> Iterator[None]:
    """While capturing: opaque functions and ``autograd.Function.apply`` are recorded, not traced."""

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if not capturing() or cls.__module__.startswith(_TORCHS_OWN):
            return _APPLY.__get__(None, cls)(*args, **kwargs)
        return record(_enter(cls), args, kwargs)

    with _APPLY_LOCK:  # one capture at a time
        torch.autograd.Function.apply = classmethod(apply)  # pyright: ignore[reportAttributeAccessIssue]  # restored below
        try:
            with _set_capturing(True):
                yield
        finally:
            torch.autograd.Function.apply = _APPLY


@contextmanager
def _set_capturing(value: bool) -> Iterator[None]:
    before, _here.capturing = capturing(), value
    try:
        yield
    finally:
        _here.capturing = before


def record(target: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Put one ``daggc::python_call`` into the graph being captured."""
    tensors: list[torch.Tensor] = []
    positional = [_encode(arg, tensors, target) for arg in args]
    named = [[key, _encode(value, tensors, target)] for key, value in kwargs.items()]
    autocast = [[device, str(dtype), cached] for device, dtype, cached in autocast_state()]
    spec = json.dumps([positional, named, *([autocast] if autocast else [])])
    if not tensors:
        raise CaptureError(f"{target} takes no tensor: daggc cannot place it; compute it outside the model")
    results = torch.ops.daggc.python_call(target, spec, tensors)
    return results[0] if len(results) == 1 and not _gives_tuple.get((target, spec)) else tuple(results)


_gives_tuple: dict[tuple[str, str], bool] = {}


def _encode(value: Any, tensors: list[torch.Tensor], target: str) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return f"%{len(tensors) - 1}"
    if isinstance(value, list | tuple):
        return [_encode(item, tensors, target) for item in value]
    if value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and value[:1] != "%"):
        return value
    raise CaptureError(
        f"{target} is given a {type(value).__name__}; a function that daggc keeps as it is (an autograd.Function or "
        "one marked @daggc.opaque) takes tensors, numbers, strings and lists of these"
    )


def decode(item: Any, tensors: Sequence[Any]) -> Any:
    """Put tensors back in the place of ``%0``, ``%1``, ..."""
    if isinstance(item, str) and item.startswith("%"):
        return tensors[int(item[1:])]
    return [decode(part, tensors) for part in item] if isinstance(item, tuple | list) else item


def call_registered(target: str, spec: Sequence[Any], tensors: Sequence[torch.Tensor], rule: bool = False) -> Any:
    """Call a registered function (or its type rule) with its recorded arguments, under the autocast of the time."""
    function = _RULES.get(target, lookup(target)) if rule else lookup(target)
    positional, named, *autocast = spec
    regions = autocast[0] if autocast else ()
    state = [(device, getattr(torch, dtype.removeprefix("torch.")), cached) for device, dtype, cached in regions]
    with autocast_of(state):
        return function(*decode(positional, tensors), **{key: decode(value, tensors) for key, value in named})


def _numbers_from_data_are_its_own_affair(inputs: Sequence[torch.Tensor]) -> AbstractContextManager[Any]:
    """What ``.item()`` gives inside an opaque function does not concern the graph around it."""
    mode = next((mode for x in inputs if (mode := getattr(x, "fake_mode", None)) is not None), None)
    shape_env = getattr(mode, "shape_env", None)
    return nullcontext() if shape_env is None else shape_env.ignore_fresh_unbacked_symbols()


@torch.library.register_fake("daggc::python_call", lib=_library)
def _fake(target: str, args: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output types, by calling the function on fake tensors, with the interception lifted."""
    try:
        with _set_capturing(False), _numbers_from_data_are_its_own_affair(inputs):
            results = call_registered(target, json.loads(args), inputs, rule=True)
    except (RuntimeError, TypeError, ValueError) as wrong:
        why = (str(wrong).splitlines() or [type(wrong).__name__])[0]
        raise CaptureError(
            f"{target} cannot be called on tensors without data to learn its output shapes ({why}); "
            "give them with @daggc.opaque(out=lambda *args: ...)"
        ) from wrong
    _gives_tuple[target, args] = not isinstance(results, torch.Tensor)
    flat = [results] if isinstance(results, torch.Tensor) else list(results)
    if not all(isinstance(result, torch.Tensor) for result in flat):
        raise CaptureError(f"{target} must return a tensor or a tuple of tensors, got {type(results).__name__}")
    return [torch.empty_like(result, memory_format=torch.contiguous_format) for result in flat]
