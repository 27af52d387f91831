"""Which reshapes copy, as torch has it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from daggc.ir.types import TensorType
from daggc.ops import REGISTRY
from daggc.plan.cost import COPY, Costs
from daggc.plan.layout import contiguous, copying, reshaped


@st.composite
def factored(draw: st.DrawFn, numel: int) -> tuple[int, ...]:
    """A shape of so many elements."""
    shape: list[int] = []
    while numel > 1 and len(shape) < 4:
        size = draw(st.sampled_from([d for d in range(1, numel + 1) if numel % d == 0]))
        shape.append(size)
        numel //= size
    return (*shape, numel)


@st.composite
def strided(draw: st.DrawFn) -> torch.Tensor:
    """A tensor that was permuted, cut and broadcast."""
    x = torch.empty(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    for _ in range(draw(st.integers(0, 3))):
        axis = draw(st.integers(0, x.dim() - 1))
        kind = draw(st.sampled_from(["permute", "slice", "expand"]))
        if kind == "permute":
            x = x.permute(draw(st.permutations(range(x.dim()))))
        elif kind == "slice":
            x = x.narrow(axis, 0, draw(st.integers(1, x.shape[axis])))
        elif x.shape[axis] == 1:
            x = x.expand(*x.shape[:axis], draw(st.integers(1, 3)), *x.shape[axis + 1 :])
    return x


@given(st.data())
def test_views_have_the_strides_that_torch_gives_them(data: st.DataObject) -> None:
    x = data.draw(strided())
    shape = data.draw(factored(x.numel()))
    found = reshaped(x.shape, x.stride(), shape)
    try:
        expected = x.view(shape).stride()
    except RuntimeError:
        assert found is None
        return
    assert found is not None
    assert [s for s, size in zip(found, shape, strict=True) if size > 1] == [
        s for s, size in zip(expected, shape, strict=True) if size > 1
    ]


def test_contiguous() -> None:
    for shape in ((), (3,), (2, 3, 4), (2, 1, 5)):
        assert contiguous(shape) == torch.empty(shape).stride()


def heads(fused: bool) -> Costs:
    """Attention over heads, whose results are then laid side by side."""
    b = REGISTRY.builder("forward")
    x = b.input(TensorType("f32", (2, 8, 12)), "input", "0")
    split = REGISTRY.importers["view.default"](b, x, [2, 8, 3, 4])
    q = REGISTRY.importers["transpose.int"](b, split, 1, 2)
    if fused:
        y = REGISTRY.importers["scaled_dot_product_attention.default"](b, q, q, q)
    else:
        y = REGISTRY.importers["exp.default"](b, b.emit("matmul", q, REGISTRY.importers["transpose.int"](b, q, 2, 3)))
        y = b.emit("matmul", y, q)
    y = REGISTRY.importers["transpose.int"](b, y, 1, 2)
    b.output(REGISTRY.importers["reshape.default"](b, y, [2, 8, 12]), "output", "0")
    return Costs.of(b.build().nodes)


def test_fused_attention_leaves_heads_where_they_were() -> None:
    assert COPY not in {kind.op for kind in heads(fused=True).names}
    costs = heads(fused=False)
    (copied,) = [index for index, kind in enumerate(costs.kinds) if costs.names[kind].op == COPY]
    assert costs.nodes[copied] is costs.nodes[-1]
    assert costs.bytes[copied] == 2 * 2 * 8 * 12 * 4
    assert costs.keys[copied].startswith("copy reshape(f32[2,8,3,4])")


def test_elementwise_ops_keep_a_layout() -> None:
    b = REGISTRY.builder("forward")
    x = b.emit("permute", b.input(TensorType("f32", (3, 4)), "input", "0"), dims=(1, 0))
    values = [b.emit("exp", x), b.emit("add", x, b.emit("exp", x))]
    for value in values:
        b.emit("reshape", b.emit("permute", value, dims=(1, 0)), shape=(12,))
        b.emit("reshape", value, shape=(12,))
    nodes = b.build().nodes
    copies = copying(nodes, [REGISTRY[node.op].cost(node).op_class for node in nodes])
    assert [copy for node, copy in zip(nodes, copies, strict=True) if node.op == "reshape"] == [False, True] * 2
