"""A Hypothesis strategy of whole programs: any ops of the table, wired together.

A program grows node by node. Each step draws an op and one of its samples, finds a value for each argument
(mostly a value that is there already, the latest first, made to fit), and adds the op. Programs are therefore
deep, with values that have many users, rather than bags of single ops. An argument's domain is kept: a
``positive`` one reads ``0.2 + 1.8 * sigmoid(x)``, an ``index:5`` one the remainder by 5, and so on.

The numbers are computed along the way, on the arrays that ``random_inputs(graph, 0)`` gives, so that
magnitudes can be kept near one: what grew is scaled by a power of two before it is read again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache, partial

from hypothesis import strategies as st

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attrs
from daggc.ir.graph import Program
from daggc.ir.tree import LEAF, Tree
from daggc.ops import REGISTRY
from daggc.ops.elementwise import piecewise_constant
from daggc.ops.opdef import NOT_DIFFERENTIABLE, Derivative
from daggc.testing.choices import Choices, Drawn, pick, pick_weighted
from daggc.testing.grow import Grower
from daggc.testing.likeness import Likeness, of_models
from daggc.testing.samples import OpSample, has_true_derivative, op_samples, sample_graph, with_dtype

_LENGTH = 20  # how long programs are on average, if max_ops allows
# Not differentiated as a function of any numbers, nor in torch: pinv drops singular values below a tolerance that is
# an input of it, and its derivative is that of matrices of which none was dropped.
_JUMPS = ("pinv",)
_PATHS = ("", "blocks.0.mlp", 'odd"\\name', "größe.0")


@st.composite
def programs(
    draw: st.DrawFn,
    *,
    ops: Iterable[str] | None = None,
    max_ops: int = 8,
    dtypes: tuple[str, ...] = ("f64",),
    differentiable: bool = False,
    like_models: bool = False,
) -> Program:
    """Programs with a well-typed ``@forward``.

    Args:
        ops: names of the ops to draw from; all that have samples, if None. Ops that make values fit (``cast``,
            ``reshape``, ``broadcast``, ``slice``, ``concat``, ``sigmoid``, ...) appear regardless.
        max_ops: how many ops are drawn at most; those that make values fit come on top.
        dtypes: dtypes in place of the samples' f64, where an op takes them.
        differentiable: only smooth (almost everywhere) functions in f64, so that derivatives compare with finite
            differences; at least one output depends on a ``param`` or ``input``.
        like_models: ops follow each other as they do in captured models, most of the time.
    """
    return grow_program(
        Drawn(draw), ops=ops, max_ops=max_ops, dtypes=dtypes, differentiable=differentiable, like_models=like_models
    )


def grow_program(
    choices: Choices,
    *,
    ops: Iterable[str] | None = None,
    max_ops: int = 8,
    dtypes: tuple[str, ...] = ("f64",),
    differentiable: bool = False,
    like_models: bool = False,
    length: int = _LENGTH,
) -> Program:
    """The program that these choices lead to; see :func:`programs`. ``length``: ops drawn on average, at most."""
    chosen = tuple(sorted(REGISTRY)) if ops is None else tuple(sorted(ops))
    table = _by_op(chosen, dtypes, differentiable)
    likeness = of_models() if like_models else None
    grower = Grower(choices, differentiable, likeness)

    def grow(step: int, choices: Choices) -> bool:
        """Add an op; False if the program is long enough. Steps make the same choices, so that any can be dropped."""
        enough = choices.below(length + 1) == 0
        if step and enough:
            return False
        grower.choices = choices
        with grower.b.at(path=pick(choices, _PATHS), source=f"generated.py:{step}" if step % 2 else ""):
            if likeness is None or not choices.below(4) or not _follow(grower, choices, table, likeness):
                grower.add(*pick(choices, pick(choices, list(table.values()))))
        return True

    step = 0
    while step < max_ops and choices.part(partial(grow, step)):
        step += 1
    grower.choices = choices
    grower.finish()
    forward = grower.b.build()
    in_tree = Tree("tuple", (Tree("tuple", (LEAF,) * len(forward.inputs_of("input"))), Tree("dict")))
    outputs = len(forward.outputs_of("output"))
    out_tree = LEAF if outputs == 1 else Tree("tuple", (LEAF,) * outputs)
    return Program({"forward": forward}, in_tree, out_tree)


Choice = tuple[OpSample, tuple[bool, ...]]  # a sample, and for each argument whether the op has a cotangent for it
Table = dict[str, tuple[Choice, ...]]


def _follow(grower: Grower, choices: Choices, table: Table, likeness: Likeness) -> bool:
    """Let a recent value be read by an op that reads such values in models; False if there is none."""
    found = grower.recent()
    if found is None:
        return False
    value, maker = found
    weights = {key: count for key, count in likeness.readers.get(maker, {}).items() if key[0] in table}
    if not weights:
        return False
    op, at = pick_weighted(choices, weights)
    of_op = [choice for choice in table[op] if at < len(choice[0].sample.inputs)]
    fitting = [choice for choice in of_op if choice[0].sample.inputs[at].type.dtype == value.type.dtype]
    alike = [choice for choice in fitting if choice[0].sample.inputs[at].type.rank == value.type.rank]
    if not of_op:
        return False
    grower.add(*pick(choices, alike or fitting or of_op), at, value)
    return True


@lru_cache(maxsize=32)
def _by_op(names: tuple[str, ...], dtypes: tuple[str, ...], differentiable: bool) -> Table:
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
    return {op: tuple(found) for op, found in groups.items()}


def _is_smooth(sample: OpSample) -> bool:
    """Whether floats are f64 throughout and what depends on floats does so differentiably."""
    inputs = [arg.type for arg in sample.sample.inputs]
    outputs = REGISTRY.infer(sample.op.name, inputs, Attrs(sample.sample.attrs))
    if not has_true_derivative(sample) or sample.op.name in _JUMPS:
        return False
    if sample.op.name == "cdist" and sample.sample.attrs["p"] == math.inf:
        return False  # of equal largest differences its gradient, as torch's, counts each
    if any(type_.differentiable and type_.dtype != "f64" for type_ in (*inputs, *outputs)):
        return False
    jumps = sample.op.vjp in (NOT_DIFFERENTIABLE, piecewise_constant)
    return not jumps or not any(type_.differentiable for type_ in inputs)


def _with_cotangent(sample: OpSample) -> tuple[bool, ...]:
    """For each argument, whether the op's VJP gives it a cotangent (a class weight, a running mean has none)."""
    inputs = sample.sample.inputs
    node = sample_graph(sample).nodes[0]
    made = any(value.type.differentiable for value in node.outputs)
    if isinstance(sample.op.vjp, Derivative) or node.attrs.graphs or not made:  # rules of ops with graphs need a pass
        return tuple(arg.type.differentiable for arg in inputs)
    b = REGISTRY.builder("vjp")
    for value in (*node.inputs, *node.outputs):
        b.input(value.type, "residual", value.name, name=value.name)
    cts = [b.input(v.type, "cotangent", v.name) if v.type.differentiable else None for v in node.outputs]
    try:
        given = sample.op.vjp(b, node, cts)
    except TypeRuleError:  # the rule is one for real numbers
        return tuple(arg.type.differentiable for arg in inputs)
    return tuple(ct is not None for ct in given)
