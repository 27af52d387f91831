"""The op table's samples, as graphs of one node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from daggc.errors import TypeRuleError
from daggc.ir.attrs import Attrs
from daggc.ir.graph import Graph
from daggc.ops import REGISTRY
from daggc.ops.opdef import OpDef, Registry, Sample
from daggc.testing.arrays import port_name


@dataclass(frozen=True)
class OpSample:
    """A sample of an op. ``str()`` names it in test reports: ``layer_norm-1``."""

    op: OpDef
    sample: Sample
    index: int

    def __str__(self) -> str:
        return f"{self.op.name}-{self.index}"


def op_samples(ops: Registry = REGISTRY) -> Iterator[OpSample]:
    """Every sample of every op, in order of names."""
    for name in sorted(ops):
        for index, sample in enumerate(ops[name].samples):
            yield OpSample(ops[name], sample, index)


def with_dtype(sample: OpSample, dtype: str, ops: Registry = REGISTRY) -> OpSample | None:
    """The sample with another dtype in place of f64, also in its attributes; None if the op refuses it."""
    inputs = tuple(
        replace(arg, type=arg.type.with_(dtype=dtype)) if arg.type.dtype == "f64" else arg
        for arg in sample.sample.inputs
    )
    attrs = {name: dtype if value == "f64" else value for name, value in sample.sample.attrs.items()}
    try:
        ops.infer(sample.op.name, [arg.type for arg in inputs], Attrs(attrs))
    except TypeRuleError:
        return None
    return replace(sample, sample=Sample(inputs, attrs))


def has_true_derivative(sample: OpSample) -> bool:
    """Whether the VJP is the derivative of the value: it is not where a model asks for zero instead.

    Nor is that of ``ctc_loss``, which is one of scores before a log_softmax; ``nextafter`` has none in torch.
    """
    return (
        sample.op.name not in ("stop_gradient", "ctc_loss", "nextafter")
        and sample.sample.attrs.get("padding_idx") is None
    )


def sample_graph(sample: OpSample, ops: Registry = REGISTRY) -> Graph:
    """``forward`` with the sample's inputs, its one node and all its outputs."""
    b = ops.builder("forward")
    inputs = [
        b.input(arg.type, "key" if arg.domain == "key" else "input", str(index), name=port_name(arg.domain))
        for index, arg in enumerate(sample.sample.inputs)
    ]
    for index, value in enumerate(b.emit_many(sample.op.name, *inputs, **sample.sample.attrs)):
        b.output(value, "output", str(index))
    return b.build()
