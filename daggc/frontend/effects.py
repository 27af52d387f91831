"""What a model's Python does beside computing its result, watched while it is captured.

``torch.export`` undoes or forgets most of it: assignments to attributes, hooks on tensors, ``backward`` inside
``forward``. What can be kept is kept (buffers, and numbers that every call sets alike); the rest is refused.
"""

from __future__ import annotations

import builtins
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from daggc.errors import CaptureError, located
from daggc.frontend.fx_import import is_user_file
from daggc.frontend.opaque import capturing

Place = tuple[str, str]  # module path, attribute name

_TABLES = frozenset(vars(nn.Module()))  # torch's own attributes of a module
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_CONTAINERS = (list, tuple, dict, set, frozenset)


@dataclass(frozen=True)
class Attributes:
    """The attributes of every module at one moment.

    Attributes:
        values: the objects.
        contents: what they hold, comparable with ``==``.
        copies: the lists, dicts and sets in them, each with a copy to restore it from.
    """

    values: Mapping[Place, Any]
    contents: Mapping[Place, Any]
    copies: list[tuple[Any, Any]]

    @classmethod
    def of(cls, model: nn.Module) -> Attributes:
        values = {
            (path, name): value
            for path, module in model.named_modules()
            for name, value in vars(module).items()
            if name not in _TABLES
        }
        copies: list[tuple[Any, Any]] = []
        return cls(values, {place: _contents(value, copies) for place, value in values.items()}, copies)

    def changes(self, model: nn.Module) -> dict[Place, Any]:
        """The plain values, tensors, and new lists and dicts of tensors that were assigned since.

        Raises CaptureError if anything else changed.
        """
        now = Attributes.of(model)
        changed: dict[Place, Any] = {}
        for place in {**self.values, **now.values}:
            path, name = place
            known = place in self.values and place in now.values
            if (known and self.contents[place] == now.contents[place]) or _is_torchs_own(model, place):
                continue
            value = now.values.get(place)
            fresh = value is not self.values.get(place) and _holds_tensors(value)
            if place not in now.values or not (_is_plain(value) or fresh):
                raise CaptureError(located(_advice(name, value), path, forward_of(model, path)))
            changed[place] = value
        return changed

    def restore(self, model: nn.Module) -> None:
        """Put back the objects, and what lists, dicts and sets held."""
        for path, module in model.named_modules():
            table = vars(module)
            for name in [name for name in table if name not in _TABLES and (path, name) not in self.values]:
                del table[name]
            table.update({name: value for (where, name), value in self.values.items() if where == path})
        for container, copy in self.copies:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(copy)


def contents(value: Any) -> Any:
    """What lists, dicts and sets hold, comparable with ``==``; other objects by identity."""
    return _contents(value, [])


def _contents(value: Any, copies: list[tuple[Any, Any]], above: tuple[int, ...] = ()) -> Any:
    if isinstance(value, _PLAIN):
        return (type(value), repr(value))  # so that a nan equals itself, and 1 does not equal True
    if not isinstance(value, _CONTAINERS) or id(value) in above:
        return _Same(value)
    if isinstance(value, list | dict | set):
        copies.append((value, value.copy()))
    above = (*above, id(value))
    items = value.items() if isinstance(value, dict) else value
    if isinstance(value, set | frozenset):
        return (type(value), frozenset(value))
    return (type(value), tuple(_contents(item, copies, above) for item in items))


class _Same:
    """Equal to what stands for the same object; keeps the object alive, so that no other gets its id."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # compared, never looked up


def _is_torchs_own(model: nn.Module, place: Place) -> bool:
    """Whether torch's modules keep it for themselves: lists of weights, what the old weight norms compute anew."""
    module, name = model.get_submodule(place[0]), place[1]
    if name.startswith("_") and type(module).__module__.startswith("torch.nn."):
        return True
    hooks = module._forward_pre_hooks.values()
    return any(isinstance(hook, SpectralNorm | WeightNorm) and hook.name == name for hook in hooks)


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _holds_tensors(value: Any) -> bool:
    """Whether a value is a tensor, or a list, tuple or dict of tensors and plain values."""
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return all(_is_plain(item) or _holds_tensors(item) for item in value)
    if type(value) is dict:
        return all(isinstance(key, str) for key in value) and _holds_tensors(list(value.values()))
    return isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a string, or another that is part of a program rather than computed by it."""
    return _is_plain(value)


def refuse_reading(model: nn.Module, place: Place) -> None:
    """Refuse an attribute whose tensor a later call reads."""
    path, name = place
    raise CaptureError(
        located(
            f"forward reads the tensor that an earlier call left in the attribute {name!r}; make it a buffer with "
            "register_buffer in __init__, or, if only the first call makes it, call the model once before it is "
            "compiled",
            path,
            forward_of(model, path),
        )
    )


def _advice(name: str, value: Any) -> str:
    if isinstance(value, _CONTAINERS):
        return f"forward changes what the attribute {name!r} holds, a {type(value).__name__}; return that instead"
    return f"forward sets or deletes the attribute {name!r} ({type(value).__name__}); return what it holds instead"


def refuse_counting(model: nn.Module, place: Place, old: Any, new: Any) -> None:
    """Refuse an attribute that does not stay the same from the second call on."""
    raise CaptureError(
        located(
            f"forward changes the attribute {place[1]!r} (from {old!r} to {new!r}), and a call after that is another "
            "computation or changes it again; make it a buffer, or, if only the first call does so, "
            "call the model once before it is compiled",
            place[0],
            forward_of(model, place[0]),
        )
    )


def forward_of(model: nn.Module, path: str) -> str:
    """Where the forward of a submodule begins: ``folder/file.py:12``."""
    code = getattr(type(model.get_submodule(path)).forward, "__code__", None)
    return "/".join(code.co_filename.split("/")[-2:]) + f":{code.co_firstlineno}" if code else ""


@contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """Turn ``self.buffer = tensor`` in the traced code into a write to the buffer, which export does record.

    Raises CaptureError for what else is done to parameters, buffers and submodules.
    """
    before = {path: _tables(module) for path, module in model.named_modules()}
    yield
    for path, module in model.named_modules():
        if path not in before or list(map(list, _tables(module))) != list(map(list, before[path])):
            raise CaptureError(
                located(
                    "forward adds or removes parameters, buffers or submodules; create them in __init__, or call "
                    "the model once before it is compiled",
                    path.rpartition(".")[0] if path not in before else path,
                )
            )
        parameters, buffers, _ = before[path]
        for name, parameter in parameters.items():
            if module._parameters[name] is not parameter:
                raise CaptureError(located(f"forward replaces the parameter {name!r}", path, forward_of(model, path)))
        for name, old in buffers.items():
            new = module._buffers[name]
            if new is not old:
                _write(old, new, located(f"buffer {name!r}", path, forward_of(model, path)))
                module._buffers[name] = old


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    return dict(module._parameters), dict(module._buffers), dict(module._modules)


def _write(old: torch.Tensor | None, new: torch.Tensor | None, what: str) -> None:
    if old is None or new is None or (old.dtype, old.shape) != (new.dtype, new.shape):
        kinds = [None if x is None else (x.dtype, list(x.shape)) for x in (old, new)]
        raise CaptureError(f"forward replaces a buffer by one of another type, {kinds[1]} for {kinds[0]}: {what}")
    if new.requires_grad:
        raise CaptureError(f"forward assigns a tensor that has a gradient to a buffer; detach it: {what}")
    with torch.no_grad():
        old.copy_(new)


@contextmanager
def refusing_what_export_drops() -> Iterator[None]:
    """While capturing in this thread: hooks on tensors, ``backward`` and nested tensors raise CaptureError."""
    grad = torch.is_grad_enabled()

    def nested(encoder: nn.TransformerEncoder, src: torch.Tensor, *args: Any, **kwargs: Any) -> str:
        mask = kwargs.get("src_key_padding_mask", args[1] if len(args) > 1 else None)
        wanted = src.requires_grad or any(parameter.requires_grad for parameter in encoder.parameters())
        slow = encoder.training or not encoder.use_nested_tensor or (grad and torch.is_grad_enabled() and wanted)
        if mask is None or slow:
            return ""
        return (
            "nn.TransformerEncoder with a src_key_padding_mask and without gradients goes through nested tensors "
            "and gives zeros at padded positions; make it with enable_nested_tensor=False"
        )

    no_hooks = "forward puts a hook on a tensor, which daggc would not run; write it as an autograd.Function"
    inference = "forward uses torch.inference_mode, which daggc does not keep; use torch.no_grad instead"
    places = (
        (torch.Tensor, "register_hook", lambda *_, **__: no_hooks),
        (torch.Tensor, "register_post_accumulate_grad_hook", lambda *_, **__: no_hooks),
        (torch.autograd, "backward", lambda *_, **__: "forward calls backward(); use torch.autograd.grad"),
        (
            torch,
            "manual_seed",
            lambda *_, **__: "forward seeds torch's generator, which random ops of daggc do not use",
        ),
        (torch.inference_mode, "__enter__", lambda *_: inference if _called_by_user() else ""),
        (nn.TransformerEncoder, "forward", nested),
    )
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for (owner, name, original), (_, _, reason) in zip(originals, places, strict=True):
        setattr(owner, name, _guarded(original, reason))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


_PYTHONS_OWN = {(builtins, "max"): max, (builtins, "min"): min, (math, "pow"): math.pow}


@contextmanager
def pythons_own_functions() -> Iterator[None]:
    """``max``, ``min`` and ``math.pow`` decide on numbers: export's own compute with tensors, with other gradients."""
    before = {place: getattr(*place) for place in _PYTHONS_OWN}
    for (owner, name), function in _PYTHONS_OWN.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name), function in before.items():
            setattr(owner, name, function)


class GradModeOutside(TorchFunctionMode):
    """A call under ``torch.no_grad`` is captured with gradients on; what asks about them gets eager's answer."""

    def __enter__(self) -> Any:
        self._is_enabled = torch.is_grad_enabled
        torch.is_grad_enabled = self._enabled  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *wrong: Any) -> None:
        torch.is_grad_enabled = self._is_enabled
        super().__exit__(*wrong)

    def _enabled(self) -> bool:
        return self._is_enabled() and not (capturing() and _called_by_user(2))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func == _REQUIRES_GRAD and result and not args[0].is_leaf and _called_by_user(2):
            return False
        return result


_REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # pyright: ignore[reportAttributeAccessIssue]


def _called_by_user(depth: int = 3) -> bool:
    """Whether a guarded function was called in the user's code: the frame beyond this, the reason and the guard."""
    frame = sys._getframe(depth)
    while frame.f_back is not None and (
        frame.f_code.co_filename.endswith("_contextlib.py")  # used as a decorator
        or frame.f_code.co_name == "__torch_function__"  # of a mode, export's own say
    ):
        frame = frame.f_back
    return is_user_file(frame.f_code.co_filename)


def _guarded(original: Any, reason: Any) -> Any:
    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if capturing() and (why := reason(*args, **kwargs)):
            raise CaptureError(why)
        return original(*args, **kwargs)

    return call
