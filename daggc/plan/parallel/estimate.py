"""The time and memory of a training step for one way to spread it: pipeline, tensor and data parallelism.

A model's layers are cut into ``pipeline * chunks`` runs, laid on the pipeline's ranks in turn (Narayanan et al. 2021).
With T_r the time of a microbatch's forward and backward on rank r, m microbatches and v chunks a rank:

    step = m max_r T_r + (sum_r T_r - max_r T_r) / v + sum of gradients over replicas + update

Sends occupy the sender. What a device holds: weights, gradients and optimizer state of its layers, and of each
microbatch in flight the inputs of its layers (recomputation) or all that its backward reads.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from daggc.plan.parallel.layers import Layers
from daggc.plan.parallel.machine import Machine


@dataclass(frozen=True)
class Choice:
    """One way to spread a step.

    Attributes:
        pipeline, tensor, data: devices along each axis; their product is the number of devices.
        microbatch: samples.
        microbatches: in a step, of each replica.
        chunks: runs of layers on each rank of the pipeline.
        recompute: whether the backward makes a layer's values again from its input.
    """

    pipeline: int
    tensor: int
    data: int
    microbatch: int
    microbatches: int
    chunks: int = 1
    recompute: bool = True

    def __str__(self) -> str:
        again = ", recomputed" if self.recompute else ""
        chunks = f" x {self.chunks} chunks" if self.chunks > 1 else ""
        return (
            f"pipeline {self.pipeline}{chunks}, tensor {self.tensor}, data {self.data}, "
            f"{self.microbatches} microbatches of {self.microbatch}{again}"
        )


@dataclass(frozen=True)
class Estimate:
    """What a choice costs. Seconds are of the busiest rank; ``memory`` is of the fullest, in bytes.

    Attributes:
        tflops: 1e12 FLOPs of forward and backward a second and device; what is made again does not count.
        parts: seconds by kind of work.
    """

    choice: Choice
    seconds: float
    memory: float
    tflops: float
    bubble: float
    parts: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in self.parts.items())
        return (
            f"{self.choice}: {self.seconds:.3f} s a step, {self.tflops:.1f} TFLOP/s a device, "
            f"{self.memory / 1e9:.1f} GB, bubble {self.bubble:.1%} ({parts})"
        )


@dataclass(frozen=True)
class Stages:
    """Times of the chunks of a pipeline for one microbatch, in order; chunk c is on rank ``c % pipeline``.

    Attributes:
        bounds: chunk c has the layers from ``bounds[c]`` to ``bounds[c + 1]``.
        forward, backward: seconds of each chunk, sends included.
        sends: seconds of them that go to sends.
        gradients: seconds in which each rank's gradients are summed over replicas.
        update: seconds of each rank's update.
        memory: bytes of each rank.
    """

    bounds: tuple[int, ...]
    forward: np.ndarray
    backward: np.ndarray
    sends: np.ndarray
    gradients: np.ndarray
    update: np.ndarray
    memory: np.ndarray


@dataclass
class Model:
    """Layers on a machine; keeps the times of layers that were asked for.

    Attributes:
        state_bytes: of each parameter: by default weights and gradients in their dtype, and in f32 the weights that
            are updated and Adam's two moments.
        update_bytes: that the update of a parameter moves.
        even: chunks have equally many of the layers that are alike; by default the slowest chunk is as fast as can be.
        overlap: the part of the backward of the last microbatch under which gradients are summed.
    """

    layers: Layers
    machine: Machine
    state_bytes: float = 0.0
    update_bytes: float = 48.0
    even: bool = False
    overlap: float = 0.0
    _times: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    _cuts: dict[tuple[int, int, bool, int], tuple[int, ...] | None] = field(default_factory=dict)

    def times(self, tensor: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of each layer's forward and backward for a microbatch, sums over tensor ranks included."""
        if (tensor, samples) not in self._times:
            numbers, different = self.layers.numbers
            link = self.machine.link(tensor)
            rows: list[tuple[float, float]] = []
            for layer in different:
                own = [
                    sum(self.machine.chip.seconds(kernel, samples, tensor) for kernel in kernels)
                    + self.machine.all_reduce(layer.reduced[phase] * samples, tensor, link)
                    for phase, kernels in enumerate((layer.forward, layer.backward))
                ]
                rows.append((own[0], own[1]))
            table = np.array(rows)[list(numbers)]
            self._times[tensor, samples] = table[:, 0], table[:, 1]
        return self._times[tensor, samples]

    def cut(self, choice: Choice) -> tuple[int, ...] | None:
        """Bounds of the chunks; None if there are not enough layers."""
        count = choice.pipeline * choice.chunks
        key = choice.tensor, choice.microbatch, choice.recompute, count
        if key not in self._cuts:
            forward, backward = self.times(choice.tensor, choice.microbatch)
            weights = forward * (2 if choice.recompute else 1) + backward
            self._cuts[key] = self._even(count) if self.even else least_largest(weights, count)
        return self._cuts[key]

    def _even(self, count: int) -> tuple[int, ...] | None:
        """The layers between the first and the last in equal runs; those two with their neighbours."""
        inner = len(self.layers.layers) - 2
        if inner % count:
            return None
        each = inner // count
        return (0, *(1 + each * chunk for chunk in range(1, count)), inner + 2)

    def stages(self, choice: Choice) -> Stages | None:
        """Times and memory of the ranks; None if there are not enough layers."""
        bounds = self.cut(choice)
        if bounds is None:
            return None
        p, t, v, b = choice.pipeline, choice.tensor, choice.chunks, choice.microbatch
        forward, backward = self.times(t, b)
        if choice.recompute:
            backward = backward + forward
        starts = list(bounds[:-1])
        f, w = np.add.reduceat(forward, starts), np.add.reduceat(backward, starts)
        sent = np.array([self.layers.layers[end - 1].sent for end in bounds[1:-1]])
        link = self.machine.link(p * t * choice.data)
        hop = np.array([self.machine.send(nbytes * b, t, link) for nbytes in sent]) if p > 1 else 0 * sent
        sends = np.zeros(len(f))
        f[:-1] += hop
        w[1:] += hop
        sends[:-1] += hop
        sends[1:] += hop
        held = self._parameters(bounds, choice)
        ring = self.machine.link(t * choice.data)
        itemsize = self.layers.itemsize
        gradients = np.array([self.machine.all_reduce(n * itemsize, choice.data, ring) for n in held])
        if p > 1 and self.layers.tied:
            shared = self.machine.all_reduce(self.layers.tied / t * itemsize, 2, link)
            gradients[[0, -1]] += shared
        exposed = np.maximum(gradients - self.overlap * w.reshape(v, p).sum(0), 0.0)
        chip = self.machine.chip
        update = held * self.update_bytes / (chip.device.bandwidth * chip.streams)
        memory = held * (self.state_bytes or 2 * itemsize + 12) + self._activations(bounds, choice)
        return Stages(bounds, f, w, sends, exposed, update, memory)

    def _parameters(self, bounds: Sequence[int], choice: Choice) -> np.ndarray:
        """Numbers on each device of each rank."""
        own = np.array([layer.parameters_on(choice.tensor) for layer in self.layers.layers])
        if choice.pipeline > 1:
            own[-1] += self.layers.tied / choice.tensor
        return np.add.reduceat(own, list(bounds[:-1])).reshape(choice.chunks, choice.pipeline).sum(0)

    def _activations(self, bounds: Sequence[int], choice: Choice) -> np.ndarray:
        """Bytes of activations on each rank at the worst moment."""
        p, v, t, b, m = choice.pipeline, choice.chunks, choice.tensor, choice.microbatch, choice.microbatches
        kept = np.array([layer.kept_on(b, t) for layer in self.layers.layers])
        ranks = np.arange(p)
        if v == 1:
            in_flight = np.minimum(m, p - ranks).astype(float)
        else:
            in_flight = np.minimum(m * v, 2 * (p - ranks - 1) + (v - 1) * p + 1)
        if not choice.recompute:
            per_chunk = np.add.reduceat(kept, list(bounds[:-1])).reshape(v, p).max(0)
            return in_flight * per_chunk
        before = np.array([0.0, *(layer.sent * b for layer in self.layers.layers[:-1])])  # inputs of layers
        per_chunk = np.add.reduceat(before, list(bounds[:-1])).reshape(v, p).max(0)
        working = np.maximum.reduceat(kept, list(bounds[:-1])).reshape(v, p).max(0)
        return in_flight * per_chunk + working

    def estimate(self, choice: Choice) -> Estimate | None:
        """Time and memory by the closed form; None if there are not enough layers for the pipeline."""
        stages = self.stages(choice)
        if stages is None:
            return None
        p, v, m = choice.pipeline, choice.chunks, choice.microbatches
        ranks = (stages.forward + stages.backward).reshape(v, p).sum(0)
        slowest = int(ranks.argmax())
        work = m * ranks[slowest]
        idle = (ranks.sum() - ranks[slowest]) / v
        after = float((stages.gradients + stages.update).max())
        seconds = float(work + idle + after)
        sends = m * float(stages.sends.reshape(v, p).sum(0)[slowest])
        parts = {
            "compute": float(work) - sends,
            "sends": sends,
            "bubble": float(idle),
            "gradients": float(stages.gradients.max()),
            "update": float(stages.update.max()),
        }
        samples = choice.microbatch * m * choice.data
        flops = self.layers.flops * samples / (p * choice.tensor * choice.data)
        memory = float(stages.memory.max())
        return Estimate(choice, seconds, memory, flops / seconds / 1e12, float(idle) / seconds, parts)


def least_largest(weights: np.ndarray, count: int) -> tuple[int, ...] | None:
    """Bounds of ``count`` runs of weights, none of them empty, whose largest sum is as small as can be.

    None if there are fewer weights. Runs that come late are the lighter ones: the first to begin are the fullest.
    """
    n = len(weights)
    if n < count:
        return None
    total = [0.0, *np.cumsum(weights).tolist()]
    low, high = max(float(weights.max()), total[-1] / count), total[-1]

    def bounds(limit: float) -> tuple[int, ...]:
        found = [0]
        for left in range(count - 1, 0, -1):  # runs after this one, each of which needs a weight
            start = found[-1]
            stop = bisect_right(total, total[start] + limit * (1 + 1e-9)) - 1
            found.append(min(max(stop, start + 1), n - left))
        return (*found, n)

    def fits(found: tuple[int, ...], limit: float) -> bool:
        return total[n] - total[found[-2]] <= limit * (1 + 1e-9)

    if count == 1:
        return 0, n
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(bounds(middle), middle) else (middle, high)
    return bounds(high)
