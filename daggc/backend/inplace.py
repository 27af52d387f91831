"""Which nodes of a graph may write their result into the memory of an input.

Only memory that the graph's own code made is written to, once nothing reads it any more, under any name: inputs are
never changed (but those that the caller gives away), and what is returned stays as it was made.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from daggc.ir.graph import Graph, Node

# Ops that write into their first input: how the expression is written then, if the inputs are of one type.
_INTO: Mapping[str, str] = {
    "add": "{0}.add_({1})",
    "sub": "{0}.sub_({1})",
    "mul": "{0}.mul_({1})",
    "relu": "torch.relu_({0})",
}
_UPDATES = ("sgd_update", "adamw_update")  # kernels of the name and an underscore write into the parameter

# Ops whose results lie in new memory, all of it theirs, its elements in the order of some permutation of the axes.
_DENSE = frozenset(
    (
        *_INTO, "div", "matmul", "linear", "conv", "conv_input_grad", "conv_weight_grad", "relu_backward", "gelu",
        "gelu_backward", "layer_norm_backward", "batch_norm_backward", "embedding",
    )
)  # fmt: skip
_DENSE_FIRST = frozenset(("layer_norm", "batch_norm"))  # their first result, that is
# Ops whose results lie in new memory, however they fill it.
_FRESH = _DENSE | {"sum", "attention", "attention_backward", "log_softmax", "softmax", "tanh", "exp", "max_pool"}
_KEPT = ("call", "check", "python.call", "torch.call")  # code that may keep what it is given


def in_place(graph: Graph, donated: Collection[str] = ()) -> frozenset[int]:
    """Indices of the nodes whose first result may be written into their first input.

    Args:
        donated: names of inputs whose memory the caller gives away: nothing else lies in it, and nobody reads it
            after the call.
    """
    roots: dict[str, frozenset[str]] = {}  # value -> whose memory it may lie in
    for port in graph.inputs:
        roots[port.value.name] = frozenset((port.value.name,))
    for node in graph.nodes:
        given = frozenset[str]().union(*(roots[value.name] for value in node.inputs))
        for at, value in enumerate(node.outputs):
            own = node.op in _FRESH or (at == 0 and node.op in _DENSE_FIRST) or node.op in _UPDATES
            roots[value.name] = frozenset((value.name,)) if own else given
    last: dict[str, int] = {}  # memory -> the last node that may read it
    for index, node in enumerate(graph.nodes):
        for value in node.inputs:
            for root in roots[value.name]:
                last[root] = max(last.get(root, 0), len(graph.nodes) if node.op in _KEPT else index)
    for port in graph.outputs:
        last.update(dict.fromkeys(roots[port.value.name], len(graph.nodes)))
    writable = set(donated)
    found: set[int] = set()
    for index, node in enumerate(graph.nodes):
        if _can_write(node, writable, roots) and last[node.inputs[0].name] == index:
            found.add(index)
        if node.op in _DENSE:
            writable.update(value.name for value in node.outputs)
        elif node.op in _DENSE_FIRST:
            writable.add(node.outputs[0].name)
    return frozenset(found)


def _can_write(node: Node, writable: Collection[str], roots: Mapping[str, frozenset[str]]) -> bool:
    """Whether the op writes into its first input, and that is all there is in its memory that the op reads."""
    if node.op not in _INTO and node.op not in _UPDATES:
        return False
    into, *others = node.inputs
    if into.name not in writable or into.type != node.outputs[0].type:
        return False
    return all(value.type == into.type or node.op in _UPDATES for value in others) and not any(
        into.name in roots[value.name] for value in others
    )


def written(node: Node, arguments: list[str], expression: str) -> str:
    """The expression that writes the node's result into its first input.

    Args:
        expression: what the op lowers to otherwise.
    """
    if node.op in _UPDATES:
        return expression.replace(f"kernels.{node.op}(", f"kernels.{node.op}_(", 1)
    return _INTO[node.op].format(*arguments)
