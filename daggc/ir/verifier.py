"""The rules every program keeps, checked by re-inferring every type.

1. Values are defined once, before use; a use names the type of its definition. A graph inside a node sees only
   its own.
2. Every node's output types are what its op's type rule says.
3. In a placed graph (an input or output has a device) every value has one, only ``transfer`` and ``call``
   change it, and a ``call``'s body exists and takes and gives the types of the call.
4. ``input`` ports match the leaves of ``in_tree``, ``output`` ports those of ``out_tree``.
"""

from __future__ import annotations

from daggc.errors import IRError
from daggc.ir.builder import TypeRules
from daggc.ir.graph import Graph, Node, Program, Value
from daggc.ir.printer import print_node
from daggc.ir.types import TensorType

_AROUND = 3  # lines of IR shown on either side of the offending one


def verify(program: Program, rules: TypeRules) -> None:
    """Raises IRError with the offending lines of IR if a rule is broken."""
    for name, graph in program.graphs.items():
        if name != graph.name:
            raise IRError(f"graph @{graph.name} is filed under the name {name!r}")
        verify_graph(graph, rules, program)
    _verify_trees(program)
    for alias, target in program.tied.items():
        if alias == target:
            raise IRError(f"{alias!r} is tied to itself")


def verify_graph(graph: Graph, rules: TypeRules, program: Program | None = None) -> None:
    """Check one graph; ``call`` bodies are looked up in ``program``."""
    defined: dict[str, Value] = {}
    for port in graph.inputs:
        if port.value.name in defined:
            raise IRError(f"graph @{graph.name}: input {port.value} is defined twice")
        defined[port.value.name] = port.value
    refs = [port.ref for port in graph.inputs]
    if len(set(refs)) != len(refs):
        twice = next(ref for ref in refs if refs.count(ref) > 1)
        raise IRError(f"graph @{graph.name}: two inputs stand for {twice!r}")
    for index, node in enumerate(graph.nodes):
        try:
            _verify_node(node, defined, rules, program)
        except IRError as wrong:
            raise IRError(f"graph @{graph.name}: {wrong}\n{_excerpt(graph, index)}") from None
    for port in graph.outputs:
        if defined.get(port.value.name) != port.value:
            raise IRError(f"graph @{graph.name}: output {port.value}: {port.value.type} is not defined")


def _verify_node(node: Node, defined: dict[str, Value], rules: TypeRules, program: Program | None) -> None:
    for value in node.inputs:
        known = defined.get(value.name)
        if known is None:
            raise IRError(f"{node.op} uses {value} before it is defined")
        if known.type != value.type:
            raise IRError(f"{node.op} uses {value} as {value.type}, but it is {known.type}")
    if node.op == "call" and program is not None:
        _verify_call(node, program)
    for graph in node.attrs.graphs:
        verify_graph(graph, rules, program)
    inferred = rules.infer(node.op, [value.type for value in node.inputs], node.attrs)
    declared = tuple(value.type for value in node.outputs)
    if inferred != declared:
        raise IRError(f"{node.op} gives ({_types(inferred)}), but ({_types(declared)}) is declared")
    for value in node.outputs:
        if value.name in defined:
            raise IRError(f"{value} is defined twice")
        defined[value.name] = value


def _verify_call(node: Node, program: Program) -> None:
    body = program[str(node.attrs.get("callee"))]
    for role, values, ports in (("takes", node.inputs, body.inputs), ("gives", node.outputs, body.outputs)):
        wanted = tuple(port.value.type.with_(device=None) for port in ports)
        got = tuple(value.type.with_(device=None) for value in values)
        if wanted != got:
            raise IRError(f"@{body.name} {role} ({_types(wanted)}), the call has ({_types(got)})")


def _verify_trees(program: Program) -> None:
    if "forward" not in program.graphs:
        return
    forward = program.forward
    for tree, ports, role in (
        (program.in_tree, forward.inputs_of("input"), "input"),
        (program.out_tree, forward.outputs_of("output"), "output"),
    ):
        if tree is not None and tree.leaves != len(ports):
            raise IRError(f"{role}s: the pytree has {tree.leaves} leaves, @forward has {len(ports)} {role} ports")


def _types(types: tuple[TensorType, ...]) -> str:
    return ", ".join(map(str, types))


def _excerpt(graph: Graph, index: int) -> str:
    first = max(0, index - _AROUND)
    shown = graph.nodes[first : index + _AROUND + 1]
    return "\n".join(
        f"{'>' if first + offset == index else ' '} {print_node(node)}" for offset, node in enumerate(shown)
    )
