"""What a layer runs on each of the devices that share it, and how long that takes.

A kernel is a matrix product, an attention, or something that only moves bytes. It grows with the samples of a
microbatch, and shrinks with the number of devices that its layer is cut over (tensor parallelism).

How much of its peak a device reaches in a product follows from its shape. A device computes tiles of the result, as
many at a time as it has processors (a wave). Edges of tiles may lie outside of the result, the last wave may be nearly
empty, small tiles wait for memory on the chip, and each tile begins by filling its pipeline:

    t = max(flops / (peak * reached * useful part of the waves * k / (k + fill)), bytes / bandwidth) + launch

``reached`` is the one number that is not known beforehand: what a perfect product reaches of the peak that is printed
on the device (clocks under load, instructions beside the products).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from daggc.plan.device import Device

PRODUCTS = ("gemm", "conv", "attention")
_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 64))


@dataclass(frozen=True, slots=True)
class Product:
    """``count`` products of [m, k] by [k, n] for one sample, on one device.

    Attributes:
        grows: the size that is multiplied by the samples: ``count``, ``m``, ``n`` or ``k``.
        cut: the size that tensor parallelism divides; none if it is empty.
    """

    count: float
    m: float
    n: float
    k: float
    grows: str
    cut: str = ""

    def on(self, samples: float, tensor: int) -> Product:
        """Its sizes on one of the devices that share it, for a microbatch."""
        grown = replace(self, **{self.grows: getattr(self, self.grows) * samples})
        return replace(grown, **{self.cut: getattr(grown, self.cut) / tensor}) if self.cut else grown

    def useful(self, processors: int, fill: float) -> float:
        """The part of a device's peak that its shape allows."""
        best = max(self._in_tiles(tile, processors) for tile in _TILES)
        return best * self.k / (self.k + fill)

    def _in_tiles(self, tile: tuple[int, int], processors: int) -> float:
        tiles = math.ceil(self.count) * math.ceil(self.m / tile[0]) * math.ceil(self.n / tile[1])
        slots = math.ceil(tiles / processors) * processors
        return self.count * self.m * self.n / (slots * tile[0] * tile[1]) * _pace(tile)


def _pace(tile: tuple[int, int]) -> float:
    """Of the largest tile's pace: one of a by b reads a + b numbers for a * b products; a quarter of that shows."""
    reuse, best = (a * b / (a + b) for a, b in (tile, _TILES[0]))
    return 0.75 + 0.25 * reuse / best


@dataclass(frozen=True, slots=True)
class Kernel:
    """One op of a layer.

    Attributes:
        op_class: as in :class:`daggc.ops.opdef.Cost`.
        flops: for each sample.
        bytes: read and written for each sample.
        fixed: bytes whatever the number of samples: weights.
        cut: whether tensor parallelism divides it.
        product: of a matrix product, its shape.
    """

    op_class: str
    flops: float
    bytes: float
    fixed: float = 0.0
    cut: bool = False
    product: Product | None = None

    def flops_on(self, samples: float, tensor: int) -> float:
        """FLOPs on one of the devices that share it, for a microbatch."""
        return self.flops * samples / (tensor if self.cut else 1)


@dataclass(frozen=True)
class Chip:
    """How a device computes.

    Attributes:
        reached: of its peak in a perfect matrix product; 0.73 is what Megatron-LM's published trainings tell
            (tools/megatron).
        processors: tiles that it computes at a time; 0 where products have no tiles (a CPU).
        fill: inner size whose time a tile spends before its first product.
        streams: of its memory's bandwidth, what a kernel reaches that only moves bytes.
    """

    device: Device
    reached: float = 0.73
    processors: int = 108
    fill: float = 64.0
    streams: float = 0.85

    def seconds(self, kernel: Kernel, samples: float, tensor: int) -> float:
        """Time of a kernel on each of the ``tensor`` devices that share its layer, for a microbatch."""
        moved = (kernel.bytes * samples + kernel.fixed) / (tensor if kernel.cut else 1)
        if not moved:
            return 0.0  # a view
        flops = kernel.flops_on(samples, tensor)
        if kernel.op_class in PRODUCTS:
            rate = self.device.flops.get(kernel.op_class, self.device.rate("gemm")) * self.reached
            if kernel.product is not None and self.processors:
                rate *= kernel.product.on(samples, tensor).useful(self.processors, self.fill)
        else:
            rate = self.device.rate(kernel.op_class)
        return max(flops / rate, moved / (self.device.bandwidth * self.streams)) + self.device.launch
