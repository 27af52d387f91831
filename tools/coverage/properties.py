"""What must hold of every generated program. A property raises :class:`Broken`, or counts what it could not judge."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from daggc.backend.codegen import compile_graph
from daggc.errors import DifferentiationError, PlanError, RunError
from daggc.interp import interpret, interpret_graph
from daggc.ir.graph import Graph, Program
from daggc.ir.parser import parse
from daggc.ir.printer import print_program
from daggc.ir.serialize import from_json, to_json
from daggc.ir.types import dtype_of
from daggc.ir.verifier import verify
from daggc.ops import REGISTRY
from daggc.passes.manager import PASSES, pipeline, run
from daggc.passes.split import join
from daggc.passes.vjp import vjp
from daggc.plan.device import cluster_of, cpu_device
from daggc.plan.plan import plan_model
from daggc.report.running import to_array, to_tensor
from daggc.testing import finite_difference, inner, random_direction, random_inputs
from daggc.testing.rounding import EPS, NORMS, ROUNDINGS, rounded_otherwise

Arrays = Mapping[str, np.ndarray]
CLUSTERS = [cluster_of([cpu_device(index) for index in range(count)]) for count in (2, 3)]
AMPLIFIED = 64  # times what single roundings at every node change: the order of a sum, another exp
LOST = 1e-3  # of a result: when roundings change more than this, the comparison says little, and is counted


class Broken(AssertionError):
    """A property does not hold of a program."""

    def __init__(self, property: str, message: str) -> None:
        super().__init__(f"{property}: {message}")
        self.property = property


@dataclass
class Judged:
    """One program under test, and what came of it.

    Attributes:
        counts: how many times each property was checked, and under ``skipped: ...`` why one was not.
    """

    program: Program
    differentiable: bool
    seed: int
    counts: Counter[str] = field(default_factory=Counter)

    def check(self) -> Program | None:
        """Check everything. Returns the differentiated program, where there is one; raises Broken."""
        self._guard("verify", lambda: verify(self.program, REGISTRY))
        self._guard("round trip", lambda: self._round_trip(self.program))
        inputs = random_inputs(self.program.forward)
        wanted = self._guard("interpret", lambda: interpret(self.program, inputs))
        for name in sorted(PASSES):
            if name != "vjp":
                self._guard(f"pass {name}", lambda name=name: self._pass(name, inputs, wanted))
        self._guard("pass all", lambda: self._pass("fold,canonicalize,cse,dce", inputs, wanted))
        forward = self.program.forward
        arrays = [inputs[port.ref] for port in forward.inputs]
        self._guard("generated forward", lambda: self._generated("generated forward", forward, arrays))
        after = self._guard("vjp", self._vjp)
        if after is None:
            self._guard("plan", lambda: self._plan(inputs, wanted, training=False))
            return None
        both = {**inputs, **random_direction(after.backward.inputs_of("cotangent"), seed=1)}
        results = self._guard("vjp keeps outputs", lambda: self._keeps_outputs(after, both, wanted))
        self._guard("generated backward", lambda: self._backward(after, both))
        if self.differentiable:
            self._guard("gradient", lambda: self._gradient(after, inputs, both, results))
        self._guard("plan", lambda: self._plan(both, results, training=True))
        return after

    def _guard(self, property: str, function: Callable):
        """Run a check; any error in it means that the property is broken."""
        try:
            result = function()
        except Broken:
            raise
        except Exception as wrong:
            raise Broken(property, f"{type(wrong).__name__}: {wrong}") from wrong
        self.counts[property] += 1
        return result

    def _round_trip(self, program: Program) -> None:
        if parse(print_program(program)) != program:
            raise Broken("round trip", "text")
        if from_json(to_json(program)) != program:
            raise Broken("round trip", "JSON")

    def _pass(self, name: str, inputs: Arrays, wanted: Arrays) -> None:
        after = run(self.program, pipeline(name))
        same_bits(f"pass {name}", interpret(after, inputs), wanted)

    def _vjp(self) -> Program | None:
        try:
            after = vjp(self.program)
        except DifferentiationError as wrong:
            inside = any(node.attrs.graphs for node in self.program.forward.nodes)  # an output may be a constant there
            if self.differentiable and not inside:
                raise
            refused = "holds for real numbers" in str(wrong)
            self.counts[f"skipped: vjp ({'of complex numbers' if refused else 'nothing to differentiate'})"] += 1
            return None
        verify(after, REGISTRY)
        if self.seed % 4 == 0:
            self._round_trip(after)
        return after

    def _keeps_outputs(self, after: Program, inputs: Arrays, wanted: Arrays) -> dict[str, np.ndarray]:
        results = interpret(after, inputs)
        same_bits("vjp keeps outputs", {ref: results[ref] for ref in wanted if ref in results}, wanted)
        return results

    def _backward(self, after: Program, inputs: Arrays) -> None:
        joint = join(after.forward, after.backward)
        self._generated("generated backward", joint, [inputs[port.ref] for port in joint.inputs])

    def _generated(self, property: str, graph: Graph, arrays: Sequence[np.ndarray]) -> None:
        """The generated code gives what the interpreter gives, as far as rounding leaves that open."""
        try:
            results = run_torch(graph, arrays)
        except RunError as wrong:
            if "not implemented for" not in str(wrong):
                raise
            self.counts[f"skipped: {property} (no CPU kernel)"] += 1
            return
        wanted = interpret_graph(graph, arrays)
        moved: list[list[np.ndarray]] | None = None
        for index, (port, got, want) in enumerate(zip(graph.outputs, results, wanted, strict=True)):
            if (got.dtype, got.shape) != (want.dtype, want.shape):
                raise Broken(property, f"{port.ref}: {want.dtype}{want.shape} wanted, got {got.dtype}{got.shape}")
            dtype = dtype_of(want)
            if disagreement(got, want) <= ROUNDINGS * EPS.get(dtype, 0) / 8:
                continue
            moved = moved or [rounded_otherwise(graph, arrays, seed) for seed in range(3)]
            slack = max(disagreement(other[index], want) for other in moved)
            allowed = ROUNDINGS * EPS.get(dtype, 0) + AMPLIFIED * slack
            if slack <= LOST and disagreement(got, want) > allowed:  # look closer before it is called wrong
                more = (rounded_otherwise(graph, arrays, seed) for seed in range(3, 40))
                slack = next((far for other in more if (far := disagreement(other[index], want)) > LOST), slack)
            if dtype not in EPS and slack > 0:
                self.counts[f"skipped: {property} (rounding decides an integer)"] += 1
            elif slack > LOST:
                self.counts[f"skipped: {property} (ill-conditioned)"] += 1
            elif disagreement(got, want) > allowed:
                size = disagreement(got, want)
                raise Broken(property, f"{port.ref}: differs by {size:.2e}, {allowed:.2e} allowed: {want} and {got}")

    def _gradient(self, after: Program, inputs: Arrays, both: Arrays, results: Arrays) -> None:
        """The gradient along a random direction; by autograd of the generated code where there is a kink."""
        grads = {ref.removeprefix("grad:"): array for ref, array in results.items() if ref.startswith("grad:")}
        if not all(np.isfinite(array).all() for array in grads.values()):
            self.counts["skipped: gradient (not finite)"] += 1
            return
        forward = self.program.forward
        cotangents = {
            ref.removeprefix("cotangent:"): array for ref, array in both.items() if ref.startswith("cotangent:")
        }
        direction = random_direction([port for port in forward.inputs if port.ref in grads], seed=2)
        derivative = sum(inner(grads[ref], along) for ref, along in direction.items())
        slope = finite_difference(forward, inputs, direction, cotangents)
        size = sum(abs(inner(np.abs(grads[ref]), np.abs(along))) for ref, along in direction.items())
        if slope.reliable:
            if not abs(derivative - slope.value) <= 1e-5 * (1 + abs(slope.value)) + slope.error + 1e-9 * size:
                raise Broken("gradient", f"VJP gives {derivative}, differences give {slope}")
            self.counts["gradient against differences"] += 1
            return
        found = autograd(forward, inputs, cotangents, list(grads))
        if isinstance(found, str):
            self.counts[f"skipped: gradient (differences see a kink, {found})"] += 1
            return
        joint = join(after.forward, after.backward)
        moved = [rounded_otherwise(joint, [both[port.ref] for port in joint.inputs], seed) for seed in range(3)]
        outputs = [port.ref for port in joint.outputs]
        for ref, grad in grads.items():
            index = outputs.index(f"grad:{ref}")
            slack = max(disagreement(other[index], grad) for other in moved)
            if slack > LOST:
                self.counts["skipped: gradient (ill-conditioned)"] += 1
            elif disagreement(found[ref], grad) > 1e-10 + AMPLIFIED * slack:
                raise Broken("gradient", f"VJP gives {grad} for {ref}, autograd {found[ref]}")
        self.counts["gradient against autograd"] += 1

    def _plan(self, inputs: Arrays, wanted: Arrays, training: bool) -> None:
        cluster = CLUSTERS[self.seed % 2]
        try:
            plan = plan_model(self.program, cluster, training=training, split_backward=self.seed % 3 == 0)
        except PlanError as wrong:
            if self.program.forward.nodes and "has no call" not in str(wrong):
                raise
            self.counts["skipped: plan (an output is an input, and nothing else is computed)"] += 1
            return
        verify(plan.program, REGISTRY)
        same_bits("plan", interpret(plan.program, inputs), wanted)


def same_bits(property: str, got: Arrays, wanted: Arrays) -> None:
    """Every array equal bit for bit, the sign of zero included; any NaN equals any other."""
    if got.keys() != wanted.keys():
        raise Broken(property, f"results {', '.join(wanted)} wanted, got {', '.join(got)}")
    for ref, want in wanted.items():
        array = got[ref]
        if (array.dtype, array.shape) != (want.dtype, want.shape):
            raise Broken(property, f"{ref}: {want.dtype}{want.shape} wanted, got {array.dtype}{array.shape}")
        if array.tobytes() != want.tobytes():
            numbers = ~((array != array) & (want != want))
            if array[numbers].tobytes() != want[numbers].tobytes():
                raise Broken(property, f"{ref}: {want} wanted, got {array}")


def disagreement(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference relative to the largest number; infinite where only one is NaN or infinite."""
    if got.dtype.kind in "biu":
        return 0.0 if np.array_equal(got, wanted) else math.inf
    if not wanted.size:
        return 0.0
    wide = np.complex128 if got.dtype.kind == "c" else np.float64
    got, wanted = got.astype(wide), wanted.astype(wide)
    finite = np.isfinite(wanted)
    if not finite.all():
        if not np.array_equal(got[~finite], wanted[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
            return math.inf
        got, wanted = got[finite], wanted[finite]
        if not wanted.size:
            return 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.nan_to_num(np.abs(got - wanted).max() / max(1.0, np.abs(wanted).max()), nan=math.inf))


def autograd(graph: Graph, inputs: Arrays, cotangents: Arrays, wrt: Sequence[str]) -> dict[str, np.ndarray] | str:
    """Gradients of the generated code by torch, by ref; or why there are none."""
    read = {value.name for node in graph.walk() for value in node.inputs} | {p.value.name for p in graph.outputs}
    if any(value.name in read for node in graph.walk() if node.op in NORMS for value in node.outputs[1:]):
        return "torch takes a norm's statistics for constants"
    leaves = {port.ref: to_tensor(inputs[port.ref]).requires_grad_(port.ref in wrt) for port in graph.inputs}
    try:
        outputs = compile_graph(graph).function(torch.device("cpu"), *leaves.values())
        pairs = [
            (output, to_tensor(cotangents[port.ref]))
            for port, output in zip(graph.outputs, outputs, strict=True)
            if port.ref in cotangents and output.requires_grad
        ]
        found = torch.autograd.grad(
            [pair[0] for pair in pairs], [leaves[ref] for ref in wrt], [pair[1] for pair in pairs], allow_unused=True
        )
    except (RuntimeError, NotImplementedError):
        return "torch has no derivative"
    if any(grad is None for grad in found):
        return "torch has no derivative"
    return {ref: to_array(grad) for ref, grad in zip(wrt, found, strict=True)}


def run_torch(graph: Graph, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [to_array(result) for result in compile_graph(graph)([to_tensor(array) for array in arrays])]
