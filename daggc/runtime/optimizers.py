"""torch's optimizers, read: what the update graphs need of them, and their state in and out.

SGD and AdamW (and Adam) run as IR update graphs on the workers. The optimizer object stays the user's: its
parameter groups are read when a step is submitted, and ``sync`` writes its state back as torch has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from daggc.errors import RunError
from daggc.frontend.dtypes import ir_dtype

Tensors = dict[str, torch.Tensor]

_SGD = ("momentum", "dampening", "nesterov", "weight_decay", "maximize")
_ADAM = ("betas", "eps", "weight_decay", "amsgrad", "maximize")


@dataclass(frozen=True)
class Group:
    """A parameter group.

    Attributes:
        kind: ``sgd`` or ``adamw``, the update op.
        names: the parameters, by canonical name.
        options: what is fixed in the update graph, as attributes of the op.
    """

    kind: str
    names: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state tensors of each parameter, as in torch's state dict."""
        options = dict(self.options)
        if self.kind == "sgd":
            return ("momentum_buffer",) if options["momentum"] else ()
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if options["amsgrad"] else ()))


def read_groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[Group, ...]:
    """The parameter groups of an optimizer as they are now.

    Raises:
        RunError: the optimizer is not one of those that run on workers, or has a parameter that is not the
            model's.
    """
    kind = _kind(optimizer)
    _refuse_hooks(optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[Group] = []
    for group in optimizer.param_groups:
        unknown = [parameter for parameter in group["params"] if id(parameter) not in names]
        if unknown:
            raise RunError(
                f"the optimizer has a parameter of shape {tuple(unknown[0].shape)} that is not the model's; "
                "build it from model.parameters()"
            )
        if kind == "sgd":
            options = {key: group[key] for key in _SGD}
        else:
            options = {key: group[key] for key in _ADAM if key != "betas"}
            options["beta1"], options["beta2"] = (float(beta) for beta in group["betas"])
            options["decoupled"] = isinstance(optimizer, torch.optim.AdamW) or bool(
                group.get("decoupled_weight_decay", False)
            )
        members = tuple(names[id(parameter)] for parameter in group["params"])
        groups.append(Group(kind, members, tuple(sorted(options.items()))))
    return tuple(groups)


def _refuse_hooks(optimizer: torch.optim.Optimizer) -> None:
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise RunError("the optimizer has step hooks, which train_step would not run; remove them")


class Counts:
    """How often each parameter was updated: torch counts for each parameter, steps without a gradient left out.

    Steps are told by the version they start from, so that a step that failed can be taken back.
    """

    def __init__(self, version: int, counts: Mapping[str, int]) -> None:
        self._base = dict(counts)
        self._runs: list[tuple[int, frozenset[str]]] = [(version, frozenset())]

    def add(self, version: int, updated: frozenset[str]) -> None:
        """The step from ``version`` updates these parameters."""
        self._forget(version)
        if self._runs[-1][1] != updated:
            self._runs.append((version, updated))

    def at(self, version: int) -> dict[str, int]:
        """The counts after all steps before this version."""
        self._forget(version)
        counts = dict(self._base)
        ends = [start for start, _ in self._runs[1:]] + [version]
        for (start, updated), end in zip(self._runs, ends, strict=True):
            for name in updated:
                counts[name] = counts.get(name, 0) + end - start
        return counts

    def common(self, version: int, updated: Sequence[str]) -> int:
        """The count of all these parameters.

        Raises:
            RunError: they differ; one step of a training counts the same for all parameters.
        """
        counts = self.at(version)
        by_count: dict[int, str] = {}
        for name in updated:
            by_count.setdefault(counts.get(name, 0), name)
        if len(by_count) > 1:
            (first, one), (second, other), *_ = sorted(by_count.items())
            raise RunError(
                f"parameter {one!r} was updated {first} times, {other!r} {second} times: train_step updates "
                "parameters with optimizer state together; was one frozen before? sync() and make a new optimizer"
            )
        return next(iter(by_count), 0)

    def _forget(self, version: int) -> None:
        """Steps from here on did not happen."""
        while len(self._runs) > 1 and self._runs[-1][0] >= version:
            self._runs.pop()


def learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """The learning rate of each group as it is now."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def set_learning_rate(group: dict[str, Any], rate: float) -> None:
    """Set a group's learning rate as a scheduler would: one that is a tensor stays one."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _kind(optimizer: torch.optim.Optimizer) -> str:
    for cls, kind in ((torch.optim.SGD, "sgd"), (torch.optim.AdamW, "adamw"), (torch.optim.Adam, "adamw")):
        if type(optimizer) is cls:
            if any(group.get("differentiable") for group in optimizer.param_groups):
                raise RunError("differentiable=True of an optimizer is not supported in train_step")
            return kind
    raise RunError(
        f"train_step runs SGD, Adam and AdamW on the workers, got {type(optimizer).__name__}; "
        "with any other optimizer use the compiled module itself: loss.backward(); optimizer.step()"
    )


def read_state(
    optimizer: torch.optim.Optimizer, groups: tuple[Group, ...], model: nn.Module
) -> tuple[Tensors, dict[str, int]]:
    """State tensors by ref (``state:exp_avg:fc.weight``), and how often each parameter was updated.

    What the optimizer has not made yet is zeros, as its first step would have it. SGD keeps no count: a parameter
    that has a momentum counts as updated once, which makes no difference to any further step.
    """
    tensors, counts = present_state(optimizer, groups, model)
    parameters = dict(model.named_parameters())
    for group in groups:
        for name in group.names:
            for key in group.states:
                ref = state_ref(key, name)
                counts.setdefault(name, int(key == "momentum_buffer" and ref in tensors))
                if ref not in tensors:
                    tensors[ref] = torch.zeros_like(parameters[name]).detach()
    return tensors, counts


def present_state(
    optimizer: torch.optim.Optimizer, groups: tuple[Group, ...], model: nn.Module
) -> tuple[Tensors, dict[str, int]]:
    """The state tensors that the optimizer has, by ref, and the counts that it keeps."""
    parameters = dict(model.named_parameters())
    tensors: Tensors = {}
    counts: dict[str, int] = {}
    for group in groups:
        for name in group.names:
            state: Mapping[str, Any] = optimizer.state.get(parameters[name], {})
            if "step" in state:
                counts[name] = int(state["step"])
            for key in group.states:
                if state.get(key) is not None:
                    tensors[state_ref(key, name)] = state[key]
    return tensors, counts


def write_state(
    optimizer: torch.optim.Optimizer,
    groups: tuple[Group, ...],
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    counts: Mapping[str, int],
) -> None:
    """Put state that came from workers into the optimizer, in torch's own format.

    Parameters that were never updated have none, as in torch.
    """
    parameters = dict(model.named_parameters())
    for group in groups:
        for name in group.names:
            parameter = parameters[name]
            found = {key: tensors[state_ref(key, name)] for key in group.states if state_ref(key, name) in tensors}
            if not counts.get(name) or not group.states:
                optimizer.state.pop(parameter, None)
                continue
            state = optimizer.state[parameter]
            for key, tensor in found.items():
                state[key] = tensor if tensor.device == parameter.device else tensor.to(parameter.device)
            if group.kind == "adamw" and isinstance(state.get("step"), torch.Tensor):
                state["step"].fill_(counts[name])
            elif group.kind == "adamw":
                state["step"] = torch.tensor(float(counts[name]))


def state_ref(key: str, name: str) -> str:
    """The port ref of a state tensor of a parameter."""
    return f"state:{key}:{name}"


def check_dtypes(groups: tuple[Group, ...], model: nn.Module) -> None:
    """Raises RunError for parameters that update graphs do not take (complex ones)."""
    parameters = dict(model.named_parameters())
    for group in groups:
        for name in group.names:
            if not parameters[name].is_floating_point():
                raise RunError(f"parameter {name!r} is {ir_dtype(parameters[name].dtype)}; train_step updates floats")
