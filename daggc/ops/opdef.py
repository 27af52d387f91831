"""What an op is: one definition that holds its type rule, meaning, derivative, cost and torch forms.

A family file (``elementwise.py``, ``norm.py``, ...) registers its ops when imported. Every field of
:class:`OpDef` is required, so an op with a missing rule fails at import. All rules are functions of the
:class:`~daggc.ir.graph.Node`, which has the types of inputs and outputs and the attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import numpy as np

from daggc.errors import IRError, TypeRuleError
from daggc.ir.attrs import Attr, Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Graph, Node, Value
from daggc.ir.types import TensorType


class Derivative(Enum):
    """Stands in place of a VJP rule."""

    NONE = "the output does not depend smoothly on any input: comparisons, indices, masks"
    BY_DECOMPOSITION = "differentiate what decompose() emits"


NOT_DIFFERENTIABLE = Derivative.NONE
BY_DECOMPOSITION = Derivative.BY_DECOMPOSITION


class ComplexRule(Enum):
    """What a VJP rule gives for complex numbers, whose cotangent is dL/d(re) + i dL/d(im), as in torch."""

    NONE = "nothing that is right: the rule is one of real numbers"
    AS_IT_IS = "the cotangent: the rule multiplies by real numbers only, or conjugates where it has to"
    HOLOMORPHIC = "that of a product with the complex derivative: cotangents are conjugated before and after it"


REAL_ONLY = ComplexRule.NONE
AS_IT_IS = ComplexRule.AS_IT_IS
HOLOMORPHIC = ComplexRule.HOLOMORPHIC


@dataclass(frozen=True, slots=True)
class Cost:
    """What running a node takes. ``op_class``: gemm, conv, attention, reduction, elementwise, view, opaque.

    ``workspace``: bytes that its kernel allocates beside its results, where they count.
    ``kernel``: which of its kernels the op runs, where it has several of quite different speed.
    """

    flops: float
    bytes: float
    op_class: str
    workspace: float = 0.0
    kernel: str = ""


@dataclass(frozen=True, slots=True)
class Axes:
    """How the axes of outputs follow from those of inputs, one label a dimension, as in einsum.

    Two dimensions with one label correspond: slicing both along it commutes with the op. ``None`` marks a
    dimension that the op needs whole. A label of an input that no output has is reduced; ``reduced`` says how
    slices combine: ``sum`` or ``mean``. Labels of size 1 may meet other sizes nowhere: broadcasting is an op.
    """

    inputs: tuple[tuple[str | None, ...], ...]
    outputs: tuple[tuple[str | None, ...], ...]
    reduced: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Arg:
    """A sample input. ``domain`` says which numbers are drawn:

    real (normal), positive (0.2 to 2), unit (0.05 to 0.95), large (1.2 to 4), nonzero, distinct (no ties), bool,
    index:N (integers in [0, N)), small (integers in [-4, 4]), count (integers from 1 to 9), key (a random key),
    and matrices that can be inverted, with singular values apart: regular, hermitian, triangular (the lower).
    """

    type: TensorType
    domain: str = "real"


@dataclass(frozen=True, slots=True)
class Sample:
    """Input types and attributes an op accepts; feeds the op tests and the program generator."""

    inputs: tuple[Arg, ...]
    attrs: Mapping[str, Attr] = field(default_factory=dict)


class Pullbacks(Protocol):
    """What the VJP rule of an op with graphs inside is given as its fourth argument."""

    wanted: Sequence[bool]  # for each input of the node, whether its cotangent is asked for

    def __call__(self, graph: Graph, wrt: Sequence[int], given: Sequence[int]) -> Graph:
        """The pullback of a graph: it takes the graph's inputs and cotangents of the ``given`` outputs, and gives
        the cotangents of the inputs ``wrt``, all by position; zeros for those that nothing reaches."""
        ...

    def reached(self, graph: Graph, wrt: Sequence[int], given: Sequence[int]) -> list[int]:
        """Those of the inputs ``wrt`` that the ``given`` outputs depend on."""
        ...


Infer = Callable[[Sequence[TensorType], Attrs], tuple[TensorType, ...]]
Evaluate = Callable[..., np.ndarray | tuple[np.ndarray, ...]]  # (node, *arrays)
VJP = Callable[..., Sequence[Value | None]]  # (builder, node, cotangents), and pullbacks if it has graphs inside
Importer = Callable[..., Any]  # (builder, *args, **kwargs) with Values for tensors -> Value(s)
Decompose = Callable[..., tuple[Value, ...]]  # (builder, node, *inputs)


@dataclass(frozen=True)
class OpDef:
    """One op.

    An op with graphs inside (attributes that are graphs, as ``cond`` has) gets them, in the order of the
    attributes' names, before the inputs: ``evaluate`` as functions of arrays that give a list, ``lower`` as names
    of functions ``(device, *inputs)`` that give a tuple; its ``vjp`` gets :class:`Pullbacks`.

    Attributes:
        infer: ``(input types, attrs) -> output types``; raises TypeRuleError.
        evaluate: ``(node, *arrays) -> array or tuple of arrays``: the meaning, in NumPy; or BY_DECOMPOSITION.
        vjp: ``(builder, node, cotangents) -> cotangents of the inputs``, None where there is none. Cotangents
            of outputs that nothing used are None. Or NOT_DIFFERENTIABLE, or BY_DECOMPOSITION.
        cost: ``node -> Cost``.
        axes: ``node -> Axes``, or None if the op needs all its inputs whole.
        lower: ``(node, names of arguments) -> Python expression`` over ``torch`` and ``kernels``
            (``daggc.backend.kernels``); a tuple where the op has several outputs.
        aten: ATen overload name, such as ``add.Tensor`` -> importer; ops of other libraries with their namespace,
            ``library::name.overload``. An importer takes the builder and the ATen op's arguments (tensors as
            Values, dtypes as IR names) and returns the Value or tuple of Values (None where ATen gives an output
            that daggc does not have).
        samples: inputs and attributes that the op accepts.
        decompose: ``(builder, node, *inputs) -> outputs`` in simpler ops, where there is such a form.
        complex: what the VJP rule is worth where numbers are complex. Differentiation refuses a rule that is
            REAL_ONLY there, and the importer leaves such nodes to the door ``torch.call``.
    """

    name: str
    infer: Infer
    evaluate: Evaluate | Derivative
    vjp: VJP | Derivative
    cost: Callable[[Node], Cost]
    axes: Callable[[Node], Axes | None]
    lower: Callable[[Node, Sequence[str]], str]
    aten: Mapping[str, Importer]
    samples: Sequence[Sample]
    decompose: Decompose | None = None
    complex: ComplexRule = REAL_ONLY

    def __post_init__(self) -> None:
        by_decomposition = BY_DECOMPOSITION in (self.evaluate, self.vjp)
        if by_decomposition and self.decompose is None:
            raise IRError(f"op {self.name!r} has a rule by decomposition, but no decomposition")


class Registry(Mapping[str, OpDef]):
    """The op table: definitions by name, importers by ATen overload."""

    def __init__(self) -> None:
        self._ops: dict[str, OpDef] = {}
        self.importers: dict[str, Importer] = {}

    def register(self, op: OpDef) -> OpDef:
        if op.name in self._ops:
            raise IRError(f"op {op.name!r} is registered twice")
        for overload in op.aten:
            if overload in self.importers:
                raise IRError(f"op {op.name!r}: ATen {overload} is imported by another op already")
        self._ops[op.name] = op
        self.importers.update(op.aten)
        return op

    def __getitem__(self, name: str) -> OpDef:
        try:
            return self._ops[name]
        except KeyError:
            raise IRError(f"there is no op named {name!r}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._ops

    def __iter__(self):
        return iter(self._ops)

    def __len__(self) -> int:
        return len(self._ops)

    def infer(self, op: str, inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        """The output types of an op. Raises TypeRuleError if the inputs or attributes do not fit."""
        definition = self[op]
        if op not in PLACED and any(type_.device is not None for type_ in inputs):
            raise TypeRuleError(f"{op}: an op in a placed graph is inside a call; only call and transfer are placed")
        try:
            _check_kinds(attrs)
            return definition.infer(inputs, attrs)
        except TypeRuleError as wrong:
            raise TypeRuleError(f"{op}({', '.join(map(str, inputs))}) {{{attrs}}}: {wrong}") from None
        except (IRError, KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as wrong:
            # a wrong number of inputs, a missing attribute, one of another kind
            raise TypeRuleError(
                f"{op}({', '.join(map(str, inputs))}) {{{attrs}}}: {type(wrong).__name__}: {wrong}"
            ) from None

    def builder(self, name: str) -> Builder:
        return Builder(self, name)


# Attributes by what they hold wherever they occur, so that type rules need not say so each; None where it is allowed.
_INTEGERS = frozenset(
    (
        *(
            "dim",
            "dims",
            "shape",
            "sizes",
            "size",
            "kernel",
            "stride",
            "padding",
            "dilation",
            "output_padding",
            "groups",
        ),
        *("output_size", "input_shape", "normalized_shape", "weight_shape", "num_weights", "k", "blank", "length"),
        *("padding_idx", "divisor_override", "ignore_index", "stream"),
    )
)
_NUMBERS = frozenset(
    (
        *("alpha", "beta", "beta1", "beta2", "dampening", "momentum", "weight_decay", "eps", "threshold", "ord"),
        *("negative_slope", "input_scale", "min_val", "max_val", "mean", "std", "low", "high", "correction", "p"),
        *("rcond", "scales", "scale"),
    )
)
_OR_NONE = frozenset(("padding_idx", "divisor_override", "eps", "scales", "ignore_index"))


def _check_kinds(attrs: Attrs) -> None:
    """Raise TypeRuleError if an attribute that holds numbers everywhere holds something else."""
    for name, value in attrs.items():
        if name in _INTEGERS:
            kinds, wanted = (int,), "integers"
        elif name in _NUMBERS:
            kinds, wanted = (int, float), "numbers"
        else:
            continue
        if value is None and name in _OR_NONE:
            continue
        if type(value) is str and name == "padding":  # of convolutions written as torch has them: same, valid
            continue
        for item in value if isinstance(value, tuple) else (value,):
            require(type(item) in kinds, f"{name} holds {wanted}, got {value!r}")


PLACED = ("call", "transfer")
REGISTRY = Registry()
register = REGISTRY.register


def require(condition: bool, message: str) -> None:
    """Raise TypeRuleError(message) unless the condition holds."""
    if not condition:
        raise TypeRuleError(message)


# --- rules that many ops share ------------------------------------------------------------------------


def node_bytes(node: Node) -> int:
    """Bytes of all inputs and outputs: what a kernel that touches each once moves."""
    return sum(value.type.nbytes for value in (*node.inputs, *node.outputs))


def out_numel(node: Node) -> int:
    return sum(value.type.numel for value in node.outputs)


def elementwise_cost(flops_per_element: float) -> Callable[[Node], Cost]:
    return lambda node: Cost(flops_per_element * out_numel(node), node_bytes(node), "elementwise")


def reduction_cost(flops_per_element: float = 1.0) -> Callable[[Node], Cost]:
    """FLOPs in proportion to the largest input."""
    return lambda node: Cost(
        flops_per_element * max(value.type.numel for value in node.inputs), node_bytes(node), "reduction"
    )


def view_cost(node: Node) -> Cost:
    """Nothing moves: torch makes a view."""
    return Cost(0, 0, "view")


def copy_cost(node: Node) -> Cost:
    """One pass over the data, no arithmetic."""
    return Cost(0, node_bytes(node), "elementwise")


def letters(rank: int) -> tuple[str, ...]:
    """Labels for ``rank`` axes."""
    return tuple(f"d{axis}" for axis in range(rank))


def same_axes(node: Node) -> Axes:
    """Inputs and outputs all have one shape, element by element."""
    return Axes(
        tuple(letters(value.type.rank) for value in node.inputs),
        tuple(letters(value.type.rank) for value in node.outputs),
    )


def leading_axes(whole: int) -> Callable[[Node], Axes]:
    """Every input and output shares the leading axes of the first input; its last ``whole`` axes are needed whole.

    Inputs of another rank (weights) are needed whole.
    """

    def rule(node: Node) -> Axes:
        rank = node.inputs[0].type.rank
        lead = letters(rank - whole)

        def label(value: Value) -> tuple[str | None, ...]:
            if value.type.shape[: rank - whole] != node.inputs[0].type.shape[: rank - whole]:
                return (None,) * value.type.rank
            return (*lead, *(None,) * (value.type.rank - len(lead)))

        return Axes(tuple(map(label, node.inputs)), tuple(map(label, node.outputs)))

    return rule


def whole(node: Node) -> None:
    """The op needs every input whole: it cannot be cut along any axis."""


def upcast(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Evaluate f16 and bf16 in f32 and round once at the end, as torch's kernels do."""

    def evaluate(node: Node, *arrays: np.ndarray) -> np.ndarray:
        wide = [a.astype(np.float32) if a.dtype.itemsize == 2 and a.dtype.kind in "fV" else a for a in arrays]
        return np.asarray(function(node, *wide)).astype(node.outputs[0].type.numpy_dtype, copy=False)

    return evaluate


def torch_dtype(dtype: str) -> str:
    """The Python expression of a dtype in generated code: ``torch.float32``."""
    return f"torch.{_TORCH_DTYPE[dtype]}"


_TORCH_DTYPE = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u8": "uint8",
    "bool": "bool",
    "c64": "complex64",
    "c128": "complex128",
}


def scalar(value: complex | float | int | bool) -> str:
    """The Python expression of a number in generated code."""
    if isinstance(value, complex):
        return f"complex({scalar(value.real)}, {scalar(value.imag)})"
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    return repr(value)


F64 = "f64"


def t(*shape: int, dtype: str = F64) -> TensorType:
    """Short for a tensor type in samples."""
    return TensorType(dtype, shape)


def sample(*shapes: tuple[int, ...], domain: str = "real", **attrs: Attr) -> Sample:
    """A sample of f64 inputs of the given shapes, all of one domain."""
    return Sample(tuple(Arg(t(*shape), domain) for shape in shapes), attrs)
