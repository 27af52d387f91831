"""The NumPy interpreter: the meaning of the IR, where neither torch nor dask is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from daggc.errors import IRError, RunError, located
from daggc.ir.graph import Graph, Node, Port, Program
from daggc.ops import REGISTRY
from daggc.ops.opdef import Derivative, Registry

Arrays = Mapping[str, np.ndarray]
RunGraph = Callable[[Program, Graph, list[np.ndarray]], Sequence[np.ndarray]]


def interpret(
    program: Program, inputs: Arrays, ops: Registry = REGISTRY, run_graph: RunGraph | None = None
) -> dict[str, np.ndarray]:
    """Run ``@forward`` and, where cotangents are given, ``@backward``.

    Args:
        inputs: arrays by port: ``param:fc.weight`` or, where that is unambiguous, ``fc.weight``. Cotangents
            are ``cotangent:output:0``; with at least one given, absent ones are zeros.
        run_graph: runs one graph in place of :func:`interpret_graph`, on torch say: (program, graph, arrays in
            the order of its inputs) -> arrays in the order of its outputs.

    Returns:
        Outputs by port: ``output:0``, ``buffer:bn.running_mean`` and, after a backward, ``grad:param:fc.weight``.

    Raises:
        RunError: an input is missing, or of another dtype or shape than its port's.
    """
    graph = program["forward"] if "forward" in program.graphs else program["main"]
    run = run_graph or (lambda program, graph, arrays: interpret_graph(graph, arrays, program, ops))
    results = run(program, graph, _port_arrays(graph, inputs))
    named = {port.ref: array for port, array in zip(graph.outputs, results, strict=True)}
    cotangents = {name for name in inputs if name.startswith("cotangent:")}
    if "backward" in program.graphs and cotangents - {port.ref for port in graph.inputs}:
        backward = program.backward
        given = {**inputs, **{ref: array for ref, array in named.items() if ref.startswith("residual:")}}
        for port in backward.inputs_of("cotangent"):
            given.setdefault(port.ref, np.zeros(port.value.type.shape, port.value.type.numpy_dtype))
        gradients = run(program, backward, _port_arrays(backward, given))
        named |= {port.ref: array for port, array in zip(backward.outputs, gradients, strict=True)}
    # In C order: safetensors writes the bytes of other layouts as if they were, and says nothing.
    return {ref: np.asarray(array, order="C") for ref, array in named.items() if not ref.startswith("residual:")}


def _port_arrays(graph: Graph, inputs: Arrays) -> list[np.ndarray]:
    """The arrays of a graph's inputs, in order. Raises RunError if one is missing or of another type."""
    targets = [port.target for port in graph.inputs]
    arrays: list[np.ndarray] = []
    for port in graph.inputs:
        array = inputs.get(port.ref)
        if array is None and targets.count(port.target) == 1:
            array = inputs.get(port.target)
        if array is None:
            named = [name for name in inputs if not {name, name.partition(":")[2]} & set(targets)]  # not weights
            unknown = f"; given beside what it takes: {', '.join(named[:5])}" if named else ""
            raise RunError(f"@{graph.name} needs {port.ref!r}, a {port.value.type}, which was not given{unknown}")
        arrays.append(check_array(np.asarray(array), port))
    return arrays


def check_array(array: np.ndarray, port: Port) -> np.ndarray:
    """Return the array. Raises RunError if it is not of the port's dtype and shape."""
    type_ = port.value.type
    if array.dtype != type_.numpy_dtype or array.shape != type_.shape:
        raise RunError(f"{port.ref!r} must be a {type_}, got {array.dtype}{list(array.shape)}")
    return array


def interpret_graph(
    graph: Graph, arrays: Sequence[np.ndarray], program: Program | None = None, ops: Registry = REGISTRY
) -> list[np.ndarray]:
    """Run one graph on arrays in the order of its inputs; ``call`` bodies are looked up in ``program``."""
    values = {port.value.name: array for port, array in zip(graph.inputs, arrays, strict=True)}
    for node in graph.nodes:
        results = evaluate_node(node, [values[value.name] for value in node.inputs], program, ops)
        for value, result in zip(node.outputs, results, strict=True):
            if result.dtype != value.type.numpy_dtype or result.shape != value.type.shape:
                raise RunError(
                    f"op {node.op!r} was to give {value.type}, it gave {result.dtype}{list(result.shape)}; "
                    "this is a defect of its evaluate rule"
                )
            values[value.name] = result
    return [values[port.value.name] for port in graph.outputs]


def evaluate_node(
    node: Node, arrays: Sequence[np.ndarray], program: Program | None = None, ops: Registry = REGISTRY
) -> Sequence[np.ndarray]:
    """Run one node."""
    if node.op == "call":
        if program is None:
            raise IRError("a call was met, but no program was given to look up its body")
        return interpret_graph(program[str(node.attrs["callee"])], arrays, program, ops)
    rule = ops[node.op].evaluate
    if isinstance(rule, Derivative):
        return interpret_graph(decomposition(node, ops), arrays, program, ops)
    bodies = [partial(_run_body, graph, program, ops) for graph in node.attrs.graphs]
    try:
        with np.errstate(all="ignore"):
            result = rule(node, *bodies, *arrays)
    except (ValueError, IndexError, ArithmeticError) as wrong:
        raise RunError(located(f"op {node.op!r} failed: {wrong}", node.path, node.source)) from wrong
    # In C order: BLAS adds up in another order for other strides, and a view must mean what its copy means.
    return [np.asarray(array, order="C") for array in (result if isinstance(result, tuple) else (result,))]


def _run_body(graph: Graph, program: Program | None, ops: Registry, *arrays: np.ndarray) -> list[np.ndarray]:
    return interpret_graph(graph, arrays, program, ops)


def decomposition(node: Node, ops: Registry = REGISTRY) -> Graph:
    """The graph of simpler ops that a node stands for. Raises IRError if its op has none."""
    decompose = ops[node.op].decompose
    if decompose is None:
        raise IRError(f"op {node.op!r} has no decomposition")
    b = ops.builder(node.op)
    inputs = [b.input(value.type, "input", str(index)) for index, value in enumerate(node.inputs)]
    for index, value in enumerate(decompose(b, node, *inputs)):
        b.output(value, "output", str(index))
    return b.build()
