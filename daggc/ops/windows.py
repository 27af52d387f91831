"""Sliding windows over the trailing (spatial) axes of NumPy arrays: the geometry of conv and pooling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def span(kernel: int, dilation: int) -> int:
    """The number of positions that a dilated kernel covers."""
    return dilation * (kernel - 1) + 1


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int = 1, ceil_mode: bool = False) -> int:
    """The number of windows along one axis.

    With ``ceil_mode`` a last window may run over the right edge, if it starts inside the input or the left
    padding (aten/src/ATen/native/Pool.h, ``pooling_output_shape``).
    """
    room = size + 2 * padding - span(kernel, dilation)
    count = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    return count


def windows(
    x: np.ndarray,
    counts: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    fill: float = 0.0,
) -> np.ndarray:
    """A read-only array ``[..., *counts, *kernel]`` of the windows over the last ``len(kernel)`` axes of x.

    Positions outside of x hold ``fill``.
    """
    axes = tuple(range(x.ndim - len(kernel), x.ndim))
    spans = [span(k, d) for k, d in zip(kernel, dilation, strict=True)]
    ends = [(n - 1) * s + width for n, s, width in zip(counts, stride, spans, strict=True)]  # what windows touch
    widths = [(p, max(0, end - x.shape[axis] - p)) for axis, p, end in zip(axes, padding, ends, strict=True)]
    padded = np.pad(x, [(0, 0)] * axes[0] + widths, constant_values=fill)
    views = np.lib.stride_tricks.sliding_window_view(padded, spans, axes)  # pyright: ignore[reportCallIssue]
    starts = tuple(slice(0, (n - 1) * s + 1, s) for n, s in zip(counts, stride, strict=True))
    return views[(..., *starts, *(slice(None, None, d) for d in dilation))]


def add_windows(
    contributions: np.ndarray,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> np.ndarray:
    """The transpose of :func:`windows`: sum ``[..., *counts, *kernel]`` into an array of ``shape``."""
    rank = len(kernel)
    counts = contributions.shape[-2 * rank : -rank]
    lead = contributions.shape[: -2 * rank]
    sizes = [
        max(size + 2 * p, (n - 1) * s + span(k, d))
        for size, n, k, s, p, d in zip(shape[-rank:], counts, kernel, stride, padding, dilation, strict=True)
    ]
    padded = np.zeros((*lead, *sizes), contributions.dtype)
    for offset in np.ndindex(*kernel):
        places = tuple(
            slice(o * d, o * d + (n - 1) * s + 1, s)
            for o, n, s, d in zip(offset, counts, stride, dilation, strict=True)
        )
        padded[(..., *places)] += contributions[(..., *offset)]
    inside = tuple(slice(p, p + size) for p, size in zip(padding, shape[-rank:], strict=True))
    return padded[(..., *inside)]
