"""A Hypothesis strategy of whole programs: any ops of the table, wired together.

A program grows node by node. Each step draws an op and one of its samples, finds a value for each argument
(mostly a value that is there already, the latest first, made to fit), and adds the op. Programs are therefore
deep, with values that have many users, rather than bags of single ops. An argument's domain is kept: a
``positive`` one reads ``0.2 + 1.8 * sigmoid(x)``, an ``index:5`` one the remainder by 5, and so on.

The numbers are computed along the way, on the arrays that ``random_inputs(graph, 0)`` gives, so that
magnitudes can be kept near one: what grew is scaled by a power of two before it is read again.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from hypothesis import strategies as st

from daggc.ir.attrs import Attrs
from daggc.ir.graph import Program
from daggc.ir.tree import LEAF, Tree
from daggc.ops import REGISTRY
from daggc.ops.opdef import NOT_DIFFERENTIABLE, Derivative
from daggc.testing.grow import Grower
from daggc.testing.samples import OpSample, has_true_derivative, op_samples, sample_graph, with_dtype

_LENGTH = 20  # how long programs are on average, if max_ops allows
_PATHS = ("", "blocks.0.mlp", 'odd"\\name', "größe.0")


@st.composite
def programs(
    draw: st.DrawFn,
    *,
    ops: Iterable[str] | None = None,
    max_ops: int = 8,
    dtypes: tuple[str, ...] = ("f64",),
    differentiable: bool = False,
) -> Program:
    """Programs with a well-typed ``@forward``.

    Args:
        ops: names of the ops to draw from; all that have samples, if None. Ops that make values fit (``cast``,
            ``reshape``, ``broadcast``, ``slice``, ``concat``, ``sigmoid``, ...) appear regardless.
        max_ops: how many ops are drawn at most; those that make values fit come on top.
        dtypes: float dtypes in place of the samples' f64, where an op takes them.
        differentiable: only smooth (almost everywhere) functions in f64, so that derivatives compare with finite
            differences; at least one output depends on a ``param`` or ``input``.
    """
    chosen = tuple(sorted(REGISTRY)) if ops is None else tuple(sorted(ops))
    table = _by_op(chosen, dtypes, differentiable)
    grower = Grower(draw, differentiable)
    for step in range(max_ops):
        if step and draw(st.integers(0, _LENGTH)) == 0:  # asked at each step, so that any step can shrink away
            break
        sample, smooth = draw(st.sampled_from(draw(st.sampled_from(table))))
        with grower.b.at(path=draw(st.sampled_from(_PATHS)), source=f"generated.py:{step}" if step % 2 else ""):
            grower.add(sample, smooth)
    grower.finish()
    forward = grower.b.build()
    in_tree = Tree("tuple", (Tree("tuple", (LEAF,) * len(forward.inputs_of("input"))), Tree("dict")))
    outputs = len(forward.outputs_of("output"))
    out_tree = LEAF if outputs == 1 else Tree("tuple", (LEAF,) * outputs)
    return Program({"forward": forward}, in_tree, out_tree)


Choice = tuple[OpSample, tuple[bool, ...]]  # a sample, and for each argument whether the op has a cotangent for it


@lru_cache(maxsize=32)
def _by_op(names: tuple[str, ...], dtypes: tuple[str, ...], differentiable: bool) -> tuple[tuple[Choice, ...], ...]:
    """The samples to draw from, grouped by op."""
    groups: dict[str, list[Choice]] = {}
    for sample in op_samples():
        if sample.op.name not in names:
            continue
        for dtype in dtypes:
            typed = with_dtype(sample, dtype)
            if typed is None or (differentiable and not _is_smooth(typed)):
                continue
            groups.setdefault(sample.op.name, []).append((typed, _with_cotangent(typed)))
    return tuple(tuple(choices) for choices in groups.values())


def _is_smooth(sample: OpSample) -> bool:
    """Whether floats are f64 throughout and what depends on floats does so differentiably."""
    inputs = [arg.type for arg in sample.sample.inputs]
    outputs = REGISTRY.infer(sample.op.name, inputs, Attrs(sample.sample.attrs))
    if not has_true_derivative(sample):
        return False
    if any(type_.differentiable and type_.dtype != "f64" for type_ in (*inputs, *outputs)):
        return False
    return sample.op.vjp is not NOT_DIFFERENTIABLE or not any(type_.differentiable for type_ in inputs)


def _with_cotangent(sample: OpSample) -> tuple[bool, ...]:
    """For each argument, whether the op's VJP gives it a cotangent (a class weight, a running mean has none)."""
    inputs = sample.sample.inputs
    node = sample_graph(sample).nodes[0]
    if isinstance(sample.op.vjp, Derivative) or not any(value.type.differentiable for value in node.outputs):
        return tuple(arg.type.differentiable for arg in inputs)
    b = REGISTRY.builder("vjp")
    for value in (*node.inputs, *node.outputs):
        b.input(value.type, "residual", value.name, name=value.name)
    cts = [b.input(v.type, "cotangent", v.name) if v.type.differentiable else None for v in node.outputs]
    given = sample.op.vjp(b, node, cts)
    return tuple(ct is not None for ct in given)
