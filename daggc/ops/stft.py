"""Short-time Fourier transforms: a signal cut into overlapping frames, and put together from them."""

from __future__ import annotations

import math
from typing import Any

from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ops.advanced_indexing import import_unfold
from daggc.ops.build import add, broadcast, cast, full, mul, reshape, result_dtype, transpose
from daggc.ops.complex_numbers import part_type
from daggc.ops.iota import iota
from daggc.ops.opdef import require
from daggc.ops.slicing import pad_dim, slice_dim
from daggc.ops.torch_fft import fft_c2c, fft_c2r, fft_r2c

_TINY = 1e-11  # torch refuses windows whose squares add up to less than this somewhere


def import_stft(
    b: Builder,
    x: Value,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Value | None = None,
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    align_to_window: bool | None = None,
    **_: Any,
) -> Value:
    """A signal ``(time)`` or ``(batch, time)``, padded already, to ``(..., frequency, frame)``."""
    if align_to_window:
        raise NotImplementedError("stft of frames aligned to a window that is shorter than they are")
    hop = n_fft // 4 if hop_length is None else hop_length
    size = n_fft if win_length is None else win_length
    require(x.type.differentiable and x.type.rank in (1, 2), f"a signal of 1 or 2 axes is required, got {x.type}")
    require(0 < n_fft <= x.type.shape[-1] and 0 < size <= n_fft and hop > 0, "0 < win_length <= n_fft <= length")
    frames = import_unfold(b, x, -1, n_fft, hop)
    if window is not None or size < n_fft:
        window = _centred(b, full(b, 1.0, (size,), x.type.dtype) if window is None else window, n_fft)
        frames = _weighted(b, frames, window)
    norm = "root" if normalized else "none"
    last = (frames.type.rank - 1,)
    if frames.type.is_complex:
        require(not onesided, "the spectrum of complex numbers has two sides")
        spectrum = fft_c2c(b, frames, last, norm, forward=True)
    else:
        spectrum = fft_r2c(b, frames, last, norm, onesided is None or onesided)
    spectrum = transpose(b, spectrum)
    as_complex = x.type.is_complex if return_complex is None else return_complex
    return spectrum if as_complex else b.emit("view_as_real", spectrum)


def import_istft(
    b: Builder,
    x: Value,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Value | None = None,
    center: bool = True,
    normalized: bool = False,
    onesided: bool | None = None,
    length: int | None = None,
    return_complex: bool = False,
) -> Value:
    """The signal of a spectrogram: frames are weighted by the window, added up, and divided by its squares' sum.

    torch raises an error where the squares add up to nothing; here all of the signal is NaN then.
    """
    hop = n_fft // 4 if hop_length is None else hop_length
    size = n_fft if win_length is None else win_length
    require(x.type.is_complex and x.type.rank in (2, 3), f"a complex spectrogram is required, got {x.type}")
    points, count = x.type.shape[-2:]
    two_sided = points == n_fft if onesided is None else not onesided
    require(points == (n_fft if two_sided else n_fft // 2 + 1), f"a spectrum of n_fft={n_fft} points, got {x.type}")
    require(0 < hop <= size <= n_fft and count > 0, "0 < hop_length <= win_length <= n_fft and frames are required")
    if return_complex:
        require(two_sided, "the spectrum of complex numbers has two sides")
    elif window is not None and window.type.is_complex:
        raise NotImplementedError("istft to real numbers by a complex window")
    frames = transpose(b, reshape(b, x, (math.prod(x.type.shape[:-2]), points, count)))
    norm = "root" if normalized else "size"
    if return_complex:
        frames = fft_c2c(b, frames, (2,), norm, forward=False)
    else:
        frames = fft_c2r(b, slice_dim(b, frames, 2, 0, n_fft // 2 + 1), (2,), norm, n_fft)
    window = full(b, 1.0, (size,), part_type(x.type).dtype) if window is None else window
    window = _centred(b, window, n_fft)
    signal = _overlap(b, _weighted(b, frames, window), hop)
    squares = broadcast(b, mul(b, window, window), (1, count, n_fft))
    envelope = cast(b, _overlap(b, squares, hop), signal.type.dtype)
    whole = signal.type.shape[1]
    start = n_fft // 2 if center else 0
    end = start + length if length is not None else whole - start
    signal, envelope = (slice_dim(b, part, 1, start, min(end, whole)) for part in (signal, envelope))
    lowest = b.emit("amin", b.emit("abs", envelope), dims=(0, 1), keepdim=True)
    enough = b.emit("ge_scalar", lowest, value=_TINY)
    signal = b.emit("div", signal, broadcast(b, envelope, signal.type.shape))
    signal = b.emit("where_scalar", broadcast(b, enough, signal.type.shape), signal, value=math.nan)
    signal = pad_dim(b, signal, 1, 0, max(0, end - whole))
    return reshape(b, signal, (*x.type.shape[:-2], signal.type.shape[1]))


def _centred(b: Builder, window: Value, size: int) -> Value:
    """A window in the middle of zeros."""
    missing = size - window.type.numel
    return pad_dim(b, window, 0, missing // 2, missing - missing // 2)


def _weighted(b: Builder, frames: Value, window: Value) -> Value:
    dtype = result_dtype(frames, window)
    return mul(b, cast(b, frames, dtype), broadcast(b, cast(b, window, dtype), frames.type.shape))


def _overlap(b: Builder, frames: Value, hop: int) -> Value:
    """Frames ``(batch, count, size)`` added up, each ``hop`` after the one before."""
    batch, count, size = frames.type.shape
    starts = broadcast(b, reshape(b, iota(b, count, step=hop), (count, 1)), (count, size))
    places = add(b, starts, broadcast(b, iota(b, size), (count, size)))
    zeros = full(b, 0.0, (batch, size + hop * (count - 1)), frames.type.dtype)
    flat = reshape(b, frames, (batch, count * size))
    return b.emit("index_add", zeros, reshape(b, places, (count * size,)), flat, dim=1)
