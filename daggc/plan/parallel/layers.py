"""A model as a row of layers, each with what it runs, holds and sends, for any microbatch and tensor parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from daggc.plan.parallel.kernels import Kernel


@dataclass(frozen=True)
class Layer:
    """A part of a model that is not cut further by a pipeline. Bytes are of one sample.

    Attributes:
        forward, backward: kernels, in order; the backward does not hold those that recomputation adds.
        parameters: numbers that tensor parallelism divides, and numbers that every device has.
        kept: bytes that the backward reads, that tensor parallelism divides, and that every device has.
        sent: bytes that go on to the next layer.
        reduced: bytes that devices which share the layer sum up, in the forward and in the backward.
    """

    name: str
    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]
    parameters: tuple[float, float]
    kept: tuple[float, float]
    sent: float
    reduced: tuple[float, float]

    def key(self) -> tuple[object, ...]:
        """Equal for layers that take the same time."""
        return self.forward, self.backward, self.parameters, self.reduced

    def parameters_on(self, tensor: int) -> float:
        """Numbers on each of the devices that share it."""
        return self.parameters[0] / tensor + self.parameters[1]

    def kept_on(self, samples: float, tensor: int) -> float:
        """Bytes that each of the devices that share it keeps of a microbatch for its backward."""
        return samples * (self.kept[0] / tensor + self.kept[1])

    def flops(self) -> float:
        """FLOPs of a forward and a backward of one sample."""
        return sum(kernel.flops for kernel in (*self.forward, *self.backward))


@dataclass(frozen=True)
class Layers:
    """A model.

    Attributes:
        layers: in order.
        itemsize: bytes of a parameter.
        tied: numbers of the first layer that the last needs too: the embedding of a language model that is its head.
    """

    layers: tuple[Layer, ...]
    itemsize: int = 2
    tied: float = 0.0

    @property
    def parameters(self) -> float:
        """Numbers, those that are shared counted once."""
        return sum(sum(layer.parameters) for layer in self.layers)

    @cached_property
    def flops(self) -> float:
        """FLOPs of a forward and a backward of one sample; nothing made again."""
        return sum(layer.flops() for layer in self.layers)

    @cached_property
    def numbers(self) -> tuple[Sequence[int], tuple[Layer, ...]]:
        """Layers that take the same time are one: for each layer its number, and the different ones."""
        found: dict[tuple[object, ...], int] = {}
        numbers = [found.setdefault(layer.key(), len(found)) for layer in self.layers]
        return numbers, tuple(self.layers[numbers.index(number)] for number in range(len(found)))
