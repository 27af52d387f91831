"""Capture: ``torch.export`` of a model -> a Program with ``@forward``.

Non-strict export records ATen ops under the model's own Python; ``run_decompositions({})`` makes in-place
code functional and keeps composite ops (``linear``, ``layer_norm``, ``scaled_dot_product_attention``) whole.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from daggc.errors import CaptureError, DaggcError, DataDependentError, located
from daggc.frontend.autocast import State, autocast_of, autocast_off, autocast_state, explicit_casts
from daggc.frontend.branches import Answers, Decisions, decisions_of
from daggc.frontend.checkpoint import marking_checkpoints
from daggc.frontend.dtypes import TO_TORCH, ir_type
from daggc.frontend.effects import (
    Attributes,
    GradModeOutside,
    Place,
    contents,
    is_plain,
    keeping_buffers,
    pythons_own_functions,
    refuse_counting,
    refuse_reading,
    refusing_what_export_drops,
)
from daggc.frontend.fx_import import import_exported, is_user_file, short_source
from daggc.frontend.gradient_stops import mark_gradient_stops
from daggc.frontend.opaque import recording
from daggc.frontend.pytree import Spec, flatten
from daggc.frontend.quiet import without_export_reports
from daggc.frontend.running_statistics import functional_statistics
from daggc.frontend.stand_ins import stand_ins
from daggc.ir.graph import Program


@dataclass(frozen=True)
class Capture:
    """A captured model: the program, and what is needed to call it with the model's own objects.

    Attributes:
        in_spec: of ``(args, kwargs)``; its leaves are the ``input`` ports in order.
        out_spec: of the result; its leaves are the ``output`` ports in order.
        trainable: names of parameters that require gradients (canonical names of tied ones).
        constants: tensors that are part of the model but neither parameters nor buffers, by port target.
        assigned: the plain values that each call sets attributes to, by module path and name.
        kept: of the tensors that each call leaves in attributes; their leaves are the ``attribute`` ports in order.
        memory: of each result and tensor kept, where it lies in eager: alike if they share memory, -1 if with an
            argument, a parameter or a buffer.
        held: addresses of tensors that are neither parameters nor buffers and that the model's Python read.
        answers: numbers of tensors that the model's Python decided on; the program checks them (see branches.py).
    """

    program: Program
    in_spec: Spec
    out_spec: Spec
    trainable: frozenset[str]
    constants: Mapping[str, torch.Tensor]
    assigned: Mapping[Place, Any] = field(default_factory=dict)
    kept: Mapping[Place, Spec] = field(default_factory=dict)
    answers: Answers = ()
    held: frozenset[int] = frozenset()
    memory: tuple[int, ...] = ()


class _Flat(nn.Module):
    """The model as a function from a list of tensors to a tuple of tensors."""

    def __init__(
        self, model: nn.Module, call: Call, in_spec: Spec, note: Callable[[_Noted], None], answers: Answers = ()
    ) -> None:
        super().__init__()
        self._answers = answers
        self.model = model
        self._call = call
        self._in_spec = in_spec
        self._note = note  # export undoes assignments to attributes

    def forward(self, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = self._in_spec.rebuild(iter(leaves))
        before, given = Attributes.of(self.model), contents((args, kwargs))
        decisions = Decisions(self._answers)
        with keeping_buffers(self.model), pythons_own_functions(), decisions if self._answers else nullcontext():
            result = self._call(self.model, *args, **kwargs)
        if contents((args, kwargs)) != given:
            raise CaptureError("forward changes a list or dict that it was given; copy it first, and return the copy")
        assigned = before.changes(self.model)
        tensors, spec = flatten(result)
        kept: dict[Place, Spec] = {}
        for place in [place for place, value in assigned.items() if not is_plain(value)]:
            parts, kept[place] = flatten(assigned.pop(place))
            tensors += parts
        outside = [*leaves, *self.model.parameters(), *self.model.buffers()]
        self._note((spec, assigned, kept, _memory(tensors, outside)))
        return tuple(decisions.checked(tensors))


Call = Callable[..., Any]  # (model, *args, **kwargs) -> result
# Of the result, plain values that were assigned to attributes, of tensors that were, and where all these lie.
_Noted = tuple[Spec, dict[Place, Any], dict[Place, Spec], tuple[int, ...]]


def _memory(tensors: Sequence[torch.Tensor], outside: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """See :attr:`Capture.memory`."""
    groups = {tensor.untyped_storage()._cdata: -1 for tensor in outside}
    return tuple(groups.setdefault(tensor.untyped_storage()._cdata, place) for place, tensor in enumerate(tensors))


def plain_call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What is captured unless a caller says otherwise: the model alone."""
    return model(*args, **kwargs)


def _examples(model: nn.Module, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors to export with: each another object, on the meta device where the model is.

    Export takes one tensor given twice for one input. A giant model is captured without memory for its weights.
    """
    parameters = list(model.parameters())
    meta = bool(parameters) and all(parameter.is_meta for parameter in parameters)
    found: list[torch.Tensor] = []
    for leaf in leaves:
        example = leaf.to("meta") if meta else leaf
        twice = any(example is other for other in found)
        found.append(example.detach().requires_grad_(example.requires_grad) if twice else example)
    return found


def _under_autocast(call: Call, state: State) -> Call:
    def under_autocast(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with autocast_of(state):
            return call(model, *args, **kwargs)

    return under_autocast


def capture(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, call: Call = plain_call
) -> Capture:
    """Capture a model at the shapes of its example inputs, in the mode (train or eval) each module is in.

    Args:
        call: what is captured, as ``call(model, *args, **kwargs)``: the model alone, or with its loss.

    Raises:
        CaptureError: with the user's module path and source line, if the model cannot be captured
            (control flow that depends on data, an operation daggc cannot keep faithful).
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"a model is a torch.nn.Module, got a {type(model).__name__}")
    if state := autocast_state():  # around the call: as if it were inside
        with autocast_off():
            return capture(model, args, kwargs, _under_autocast(call, state))
    _refuse_hooks(model)
    leaves, in_spec = flatten((tuple(args), dict(kwargs or {})))
    for leaf in leaves:
        ir_type(leaf)  # refuses what the IR cannot hold
    leaves = _examples(model, leaves)
    before = Attributes.of(model)
    answers: Answers = ()
    try:
        try:
            captured = _capture(model, call, leaves, in_spec)
        except DataDependentError:
            before.restore(model)
            with _explained(model):
                answers = decisions_of(model, call, leaves, in_spec)
            if not answers:
                raise
            captured = _capture(model, call, leaves, in_spec, answers)
        if not captured.assigned and not captured.kept:
            return captured
        old = before.values
        _assign(model, captured.assigned)
        left = _leave_tensors(model, captured)
        again = _capture(model, call, leaves, in_spec, answers)
        if again.kept.keys() != captured.kept.keys():
            refuse_reading(model, next(iter(again.kept.keys() ^ captured.kept.keys())))
        if again.assigned or str(again.program) != str(captured.program):
            if not again.assigned and not captured.assigned:
                refuse_reading(model, next(iter(captured.kept)))
            place, new = next(iter((again.assigned or captured.assigned).items()))
            refuse_counting(model, place, old.get(place), new)
        _refuse_readers(model, again, left)
    except BaseException:
        before.restore(model)
        raise
    before.restore(model)
    _assign(model, captured.assigned)
    return replace(again, assigned=captured.assigned)


def _capture(
    model: nn.Module, call: Call, leaves: Sequence[torch.Tensor], in_spec: Spec, answers: Answers = ()
) -> Capture:
    noted: list[_Noted] = []
    trains = torch.is_grad_enabled()
    flat = _Flat(model, call, in_spec, noted.append, answers)
    before = Attributes.of(model)
    with _explained(model), recording(), refusing_what_export_drops(), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            marking = marking_checkpoints() if trains else GradModeOutside()
            with stand_ins(), functional_statistics(), explicit_casts(flat, leaves), without_export_reports(), marking:
                exported = torch.export.export(flat, tuple(leaves), strict=False)
        finally:
            before.restore(model)
        mark_gradient_stops(exported.graph_module)
        exported = exported.run_decompositions({})
    out_spec, assigned, kept, memory = noted[-1]
    names = [name for place, spec in kept.items() for name in spec.tree.leaf_paths(".".join(filter(None, place)))]
    canonical, tied = _canonical_names(model)
    graph, constants = import_exported(exported, in_spec.tree, out_spec.tree, canonical, names, trains)
    program = Program({"forward": graph}, in_spec.tree, out_spec.tree, tied, ("capture",))
    trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    held = frozenset(held.data_ptr() for held in exported.constants.values() if isinstance(held, torch.Tensor))
    return Capture(program, in_spec, out_spec, trainable, constants, assigned, kept, answers, held, memory)


def _leave_tensors(model: nn.Module, captured: Capture) -> dict[Place, list[torch.Tensor]]:
    """Put tensors of the right types where a call leaves some, so that it shows whether the next call reads them."""
    device = next((parameter.device for parameter in model.parameters()), None)
    ports = iter(captured.program.forward.outputs_of("attribute"))
    left: dict[Place, list[torch.Tensor]] = {}
    for place, spec in captured.kept.items():
        types = [next(ports).value.type for _ in range(spec.tree.leaves)]
        left[place] = [torch.zeros(type_.shape, dtype=TO_TORCH[type_.dtype], device=device) for type_ in types]
        _assign(model, {place: spec.rebuild(iter(left[place]))})
    return left


def _refuse_readers(model: nn.Module, again: Capture, left: Mapping[Place, Sequence[torch.Tensor]]) -> None:
    for place, tensors in left.items():
        if {tensor.data_ptr() for tensor in tensors} & again.held:
            refuse_reading(model, place)


def _assign(model: nn.Module, values: Mapping[Place, Any]) -> None:
    for (path, name), value in values.items():
        setattr(model.get_submodule(path), name, value)


def trace(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Program:
    """The program of a model at the shapes of example inputs: a graph ``@forward``. See :func:`capture`."""
    return capture(model, args, kwargs).program


def weights_of(model: nn.Module, captured: Capture) -> dict[str, torch.Tensor]:
    """The tensors of every ``param``, ``buffer`` and ``constant`` port of ``@forward``, by port ref."""
    named = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    tensors: dict[str, torch.Tensor] = {}
    for port in captured.program.forward.inputs_of("param", "buffer", "constant"):
        tensors[port.ref] = captured.constants[port.target] if port.kind == "constant" else named[port.target]
    return tensors


def _canonical_names(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Every name of a parameter or buffer -> the first name of that tensor; and the aliases among them."""
    canonical: dict[str, str] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        canonical[name] = first.setdefault(id(tensor), name)
        if canonical[name] != name:
            tied[name] = canonical[name]
    return canonical, tied


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _refuse_hooks(model: nn.Module) -> None:
    """Backward hooks would be lost; forward hooks are ordinary code that export traces."""
    for path, module in model.named_modules():
        if any(getattr(module, name) for name in _HOOKS[2:]):
            raise CaptureError(located("a module has backward hooks, which daggc does not run; remove them", path))
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise CaptureError(f"parameter {name!r} has gradient hooks, which daggc does not run; remove them")


@contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
    """Turn what export raises into a CaptureError with the user's module path and source line."""
    try:
        yield
    except DaggcError as wrong:
        path, source = _user_frame(wrong, model)
        kind = DataDependentError if isinstance(wrong, DataDependentError) else CaptureError
        raise kind(located(str(wrong), path, source)) from wrong
    except Exception as wrong:
        path, source = _user_frame(wrong, model)
        raise _kind(wrong)(located(_explain(wrong), path, source)) from wrong


def _kind(wrong: Exception) -> type[CaptureError]:
    """Whether export failed for the want of numbers."""
    kinds = [cls.__name__ for cls in type(wrong).__mro__]
    data_dependent = any("DataDependent" in kind or "Unbacked" in kind for kind in kinds)
    first = str(wrong).strip().split("\n")[0]
    wants = "data-dependent" in str(wrong) or "Could not guard" in first or "Could not extract" in first
    return DataDependentError if data_dependent or wants else CaptureError


def _explain(wrong: Exception) -> str:
    first = str(wrong).strip().splitlines()[0] if str(wrong).strip() else type(wrong).__name__
    kinds = [cls.__name__ for cls in type(wrong).__mro__]
    data_dependent = any("DataDependent" in kind or "DynamicOutputShape" in kind for kind in kinds)
    if data_dependent or "data-dependent" in str(wrong) or "Could not guard" in first or "Could not extract" in first:
        return (
            "the model's control flow or shapes depend on the data of a tensor, which cannot be captured "
            f"({first}); use torch.where, or mark the function with @daggc.opaque"
        )
    if "expected compiled_fn to be GraphModule" in first:  # aliases that are written to
        return (
            "forward writes to a buffer that the model has under two names (a BatchNorm registered twice, say), which "
            "torch.export cannot follow in train mode; register it once, or make a second instance"
        )
    if "fake tensor in the exported program constant's list" in first:
        return "forward uses the .data of a tensor, which export cannot follow; use detach(), or torch.no_grad()"
    if "TensorWrapper" in first:
        return f"torch.func inside a model's forward cannot be captured ({first}); use torch.autograd.grad"
    return f"torch.export could not capture the model: {type(wrong).__name__}: {first}"


def _user_frame(wrong: BaseException, model: nn.Module) -> tuple[str, str]:
    """The path of the innermost module (torch's own too), and the innermost source line that is the user's."""
    paths = {id(module): path for path, module in model.named_modules()}
    path = source = ""
    for frame, line in traceback.walk_tb(wrong.__traceback__):
        filename = frame.f_code.co_filename
        if is_user_file(filename):
            source = short_source(filename, line)
        names = frame.f_code.co_varnames  # the first parameter of a method is its module
        path = paths.get(id(frame.f_locals.get(names[0] if names else "")), path)
    return path, source
