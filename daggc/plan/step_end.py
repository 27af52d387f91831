"""What a step does after the last backward: gradients are reduced, looked at, and parameters updated.

    B0.1 -+-> R0 ---> N0 -.          .-> U0       R  the sums of a stage's replicas are added
          `-> R0/1 -> N0/1 -> verdict -> U0/1     N  squares are summed up, and infinities looked for
    B1.1 -----------> N1 -'          `-> U1       U  new parameters and optimizer state

Reductions are there with replicas; what looks at all gradients before any is used, only where they are clipped, or the
loss is scaled. In that case there is one more update, of the scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from daggc.ir.graph import Port, Value
from daggc.plan import bodies as make
from daggc.plan.bodies import SCALING_STATE, Group, Scaling, state_target
from daggc.plan.construction import Construction, identifier, numbered

Parameter = tuple[Port, Group]
Home = tuple[int, int]  # a stage, and the replica of it that parameters and their optimizer state live at
Gradients = Mapping[tuple[str, int], Value]  # by parameter and replica


@dataclass(frozen=True)
class Ending:
    """What is done with gradients.

    Attributes:
        clip: multiply them by ``min(max norm / (global norm + 1e-6), 1)``.
        scaling: they are of a scaled loss; unscale them, and skip the updates if one is not finite.
        donate: optimizer state may be updated in place.
    """

    clip: bool = False
    scaling: Scaling | None = None
    donate: bool = False


@dataclass(frozen=True)
class _Verdict:
    """What every update must know."""

    factor: Value | None = None
    norm: Value | None = None
    finite: Value | None = None
    step: Value | None = None


def declare_scaling(step: Construction, ending: Ending, stage: int) -> None:
    """The state of loss scaling lives where the loss is made: there each backward begins with it."""
    if ending.scaling is not None:
        for key, type_ in SCALING_STATE.items():
            step.input(type_, "state", key, key, step.replicas[stage][0])


def end(
    step: Construction,
    homes: Mapping[Home, Sequence[Parameter]],
    gradients: Gradients,
    loss_stage: int,
    ending: Ending,
) -> dict[str, Value]:
    """Emit all that comes after the last backward.

    Args:
        homes: the parameters of each home, in the order in which the homes' gradients are done.
        gradients: of each replica, the sum over its microbatches.

    Returns:
        New parameters and state, and ``output:grad_norm`` with ``clip``, ``output:finite`` with ``scaling``, by ref.
    """
    reduced = {home: _reduce(step, *home, params, gradients) for home, params in homes.items()}
    verdict = _verdict(step, reduced, loss_stage, ending)
    results: dict[str, Value] = {}
    for home, params in homes.items():
        results |= _update(step, *home, params, reduced[home], verdict, ending.donate)
    if verdict.norm is not None:
        results["output:grad_norm"] = verdict.norm
    if ending.scaling is not None and verdict.finite is not None:
        results["output:finite"] = verdict.finite
        body = make.scale_update("loss_scale.update", ending.scaling)
        inputs = [verdict.finite, *(step.inputs[f"state:{key}"] for key in SCALING_STATE)]
        names = [f"new_{key}" for key in SCALING_STATE]
        new = step.call(body, inputs, names, "scale", loss_stage, "update")
        results |= {f"state:{key}": value for key, value in zip(SCALING_STATE, new, strict=True)}
    return results


def _reduce(
    step: Construction, stage: int, owner: int, params: Sequence[Parameter], gradients: Gradients
) -> Sequence[Value]:
    """The gradients of parameters at their home: the sums of the stage's replicas, added in order."""
    names = [port.target for port, _ in params]
    groups = [
        [gradients[name, replica] for name in names]
        for replica in range(len(step.replicas[stage]))
        if (names[0], replica) in gradients
    ]
    if len(groups) == 1:
        return groups[0]
    body = make.sums(numbered(f"stage{stage}.reduce", owner), [value.type for value in groups[0]], len(groups))
    inputs = [value for group in groups for value in group]
    results = [identifier(f"reduced_{name}") for name in names]
    return step.call(body, inputs, results, numbered(f"R{stage}", owner, "/"), stage, "reduce", replica=owner)


def _verdict(step: Construction, reduced: Mapping[Home, Sequence[Value]], loss_stage: int, ending: Ending) -> _Verdict:
    """Look at all gradients, at each home at its own, and put together what was found."""
    clip, scaled = ending.clip, ending.scaling is not None
    if not reduced or not (clip or scaled):
        return _Verdict()
    scale = [step.inputs["state:loss_scale"]] if scaled else []
    norms: list[Value] = []
    flags: list[Value] = []
    for (stage, owner), gradients in reduced.items():
        what = "check" if scaled else "squared_norm"
        body = make.measures(numbered(f"stage{stage}.{what}", owner), [v.type for v in gradients], clip, scaled)
        names = [numbered(f"squared_norm_{stage}", owner, "_")] if clip else []
        names += [numbered(f"finite_{stage}", owner, "_")] if scaled else []
        task, inputs = numbered(f"N{stage}", owner, "/"), [*gradients, *(scale if clip else ())]
        found = step.call(body, inputs, names, task, stage, "norm", replica=owner)
        norms += found[:1] if clip else ()
        flags += found[-1:] if scaled else ()
    inputs = [*norms, step.scalar("clip")] if clip else []
    inputs += [*flags, *scale, step.scalar("step"), step.inputs["state:skipped"]] if scaled else []
    task, stage = ("unscale", loss_stage) if scaled else ("clip", min(stage for stage, _ in reduced))
    names = ["coefficient", *(["grad_norm"] if clip else ()), *(("finite", "step_number") if scaled else ())]
    body = make.verdict(task, len(reduced), clip, scaled)
    found = dict(zip(names, step.call(body, inputs, names, task, stage, "norm"), strict=True))
    return _Verdict(found["coefficient"], found.get("grad_norm"), found.get("finite"), found.get("step_number"))


def _update(
    step: Construction,
    stage: int,
    owner: int,
    params: Sequence[Parameter],
    gradients: Sequence[Value],
    verdict: _Verdict,
    donate: bool,
) -> dict[str, Value]:
    """The update of parameters of one home; its results by ``kind:target``."""
    name = numbered(f"stage{stage}.update", owner)
    factor, finite = verdict.factor, verdict.finite
    body, targets = make.updates(name, params, factor is not None, donate, finite is not None)
    inputs: list[Value] = []
    for (port, group), gradient in zip(params, gradients, strict=True):
        inputs += [step.inputs[port.ref], gradient]
        inputs += [step.inputs[f"state:{state_target(state, port.target)}"] for state in group.states]
    inputs += [step.scalar(f"lr:{group}") for group in make.groups_of(params)]
    inputs.append(step.scalar("step") if verdict.step is None else verdict.step)
    inputs += [value for value in (factor, finite) if value is not None]
    names = [identifier(f"new_{target}") for _, target in targets]
    results = step.call(body, inputs, names, numbered(f"U{stage}", owner, "/"), stage, "update", replica=owner)
    return {f"{kind}:{target}": value for (kind, target), value in zip(targets, results, strict=True)}
