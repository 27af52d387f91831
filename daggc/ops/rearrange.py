"""Importers of what moves elements by a plan: pixel and channel shuffles, and unpooling to places once taken."""

from __future__ import annotations

import math
from collections.abc import Sequence

from daggc.errors import TypeRuleError
from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ops.build import full, permute, reshape
from daggc.ops.opdef import Importer, require
from daggc.ops.pooling import numbers, with_batch


def import_pixel_shuffle(b: Builder, x: Value, upscale_factor: int) -> Value:
    """Channels ``[..., c * r * r, h, w]`` become blocks of pixels ``[..., c, h * r, w * r]``."""
    r = upscale_factor
    fits = x.type.rank >= 3 and r > 0 and x.type.shape[-3] % (r * r) == 0
    require(fits, f"channels that divide into blocks of {r} by {r} are required, got {x.type}")
    *lead, channels, height, width = x.type.shape
    blocks = reshape(b, x, (*lead, channels // (r * r), r, r, height, width))
    n = len(lead)
    order = (*range(n), n, n + 3, n + 1, n + 4, n + 2)
    return reshape(b, permute(b, blocks, order), (*lead, channels // (r * r), height * r, width * r))


def import_pixel_unshuffle(b: Builder, x: Value, downscale_factor: int) -> Value:
    """The inverse of :func:`import_pixel_shuffle`."""
    r = downscale_factor
    fits = x.type.rank >= 3 and r > 0 and x.type.shape[-1] % r == 0 == x.type.shape[-2] % r
    require(fits, f"an image that divides into blocks of {r} by {r} is required, got {x.type}")
    *lead, channels, height, width = x.type.shape
    blocks = reshape(b, x, (*lead, channels, height // r, r, width // r, r))
    n = len(lead)
    order = (*range(n), n, n + 2, n + 4, n + 1, n + 3)
    return reshape(b, permute(b, blocks, order), (*lead, channels * r * r, height // r, width // r))


def import_channel_shuffle(b: Builder, x: Value, groups: int) -> Value:
    """Channel ``i`` of each group follows channel ``i`` of the group before."""
    fits = x.type.rank >= 3 and groups > 0 and x.type.shape[1] % groups == 0
    require(fits, f"channels that divide into {groups} groups are required, got {x.type}")
    n, channels, *rest = x.type.shape
    grouped = reshape(b, x, (n, groups, channels // groups, *rest))
    return reshape(b, permute(b, grouped, (0, 2, 1, *range(3, 3 + len(rest)))), x.type.shape)


def import_max_unpool(rank: int) -> Importer:
    """Zeros but for x's elements, at indices into each plane of the output."""

    def importer(
        b: Builder,
        x: Value,
        indices: Value,
        output_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (),
    ) -> Value:
        if indices.type.shape != x.type.shape or indices.type.dtype != "i64":
            raise TypeRuleError(f"i64 indices of the shape of {x.type} are required, got {indices.type}")
        size = numbers(output_size, rank)

        def emit(x: Value) -> tuple[Value, ...]:
            planes = (*x.type.shape[:2], math.prod(x.type.shape[2:]))
            zeros = full(b, 0.0, (*planes[:2], math.prod(size)), x.type.dtype)
            placed = b.emit("scatter", zeros, reshape(b, indices, planes), reshape(b, x, planes), dim=2)
            return (reshape(b, placed, (*planes[:2], *size)),)

        require(x.type.is_float, f"floats are required, got {x.type}")
        return with_batch(b, x, rank, emit)[0]

    return importer
