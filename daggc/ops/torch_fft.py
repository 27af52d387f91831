"""``torch.fft`` by three transforms: sizes, axes and normalisations as torch reads them, then one op or two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from daggc.errors import TypeRuleError
from daggc.ir.builder import Builder
from daggc.ir.graph import Value
from daggc.ops.build import cast, conj, norm_dim, scale
from daggc.ops.complex_numbers import complex_type
from daggc.ops.concat import import_roll
from daggc.ops.iota import iota
from daggc.ops.opdef import Importer, require
from daggc.ops.slicing import pad_dim, slice_dim

Dims = Sequence[int] | int | None


def fft_c2c(b: Builder, x: Value, dims: Sequence[int], norm: str, forward: bool) -> Value:
    return b.emit("fft_c2c", x, dims=tuple(dims), norm=norm, forward=forward) if dims else x


def fft_r2c(b: Builder, x: Value, dims: Sequence[int], norm: str, onesided: bool) -> Value:
    return b.emit("fft_r2c", x, dims=tuple(dims), norm=norm, onesided=onesided)


def fft_c2r(b: Builder, x: Value, dims: Sequence[int], norm: str, size: int) -> Value:
    return b.emit("fft_c2r", x, dims=tuple(dims), norm=norm, size=size)


def _norm(name: str | None, forward: bool) -> str:
    """torch's name of a normalisation, as what this direction multiplies by."""
    if name == "ortho":
        return "root"
    if name not in (None, "forward", "backward"):
        raise TypeRuleError(f"norm is forward, backward or ortho, got {name!r}")
    return "size" if (name == "forward") == forward else "none"


def _numbers(b: Builder, x: Value, to_complex: bool = False) -> Value:
    """Integers as f32, and real numbers as complex ones if asked for. Raises TypeRuleError for 16-bit floats."""
    x = x if x.type.differentiable else cast(b, x, "f32")
    if x.type.is_complex or not to_complex:
        return x
    return cast(b, x, complex_type(x.type).dtype)


def _fit(b: Builder, x: Value, dim: int, size: int | None) -> Value:
    """Cut or padded with zeros at the end to ``size`` points along an axis; as it is for None or -1."""
    have = x.type.shape[dim]
    if size is None or size in (-1, have):
        return x
    require(size > 0, f"a transform has at least one point, got {size}")
    return slice_dim(b, x, dim, 0, size) if size < have else pad_dim(b, x, dim, 0, size - have)


def _shape_and_dims(x: Value, s: Sequence[int] | int | None, dim: Dims) -> tuple[Sequence[int | None], tuple[int, ...]]:
    """How many points along which axes: with sizes and no axes given, the last axes."""
    rank = x.type.rank
    s = [s] if isinstance(s, int) else s
    if dim is not None:
        dims = tuple(norm_dim(axis, rank) for axis in ([dim] if isinstance(dim, int) else dim))
    else:
        require(s is None or len(s) <= rank, f"as many sizes as {x.type} has axes at most are required, got {s}")
        dims = tuple(range(rank if s is not None else 0, rank)) or tuple(range(rank))
        dims = dims if s is None else tuple(range(rank - len(s), rank))
    require(s is None or len(s) == len(dims), f"as many sizes as axes are required, got {s} and {dim}")
    return [None] * len(dims) if s is None else list(s), dims


def _fit_all(b: Builder, x: Value, sizes: Sequence[int | None], dims: Sequence[int]) -> Value:
    for dim, size in zip(dims, sizes, strict=True):
        x = _fit(b, x, dim, size)
    return x


def _import_fft(forward: bool, one: bool, default: Dims) -> Importer:
    """fft, fft2, fftn and their inverses. ``one``: along one axis, where real numbers stay real as in torch."""

    def importer(
        b: Builder, x: Value, s: Any = None, dim: Dims = default, norm: str | None = None, *, n: Any = None, **_: Any
    ) -> Value:
        x = _numbers(b, x, to_complex=not one)
        sizes, dims = _shape_and_dims(x, s if n is None else n, dim)
        x, norm = _fit_all(b, x, sizes, dims), _norm(norm, forward)
        if x.type.is_complex:
            return fft_c2c(b, x, dims, norm, forward)
        spectrum = fft_r2c(b, x, dims, norm, onesided=False)
        return spectrum if forward else conj(b, spectrum)

    return importer


def _import_real_fft(forward: bool, default: Dims) -> Importer:
    """rfft, rfft2, rfftn; ihfft, ihfft2, ihfftn are transforms of the last axis, conjugated, then of the others."""

    def importer(
        b: Builder, x: Value, s: Any = None, dim: Dims = default, norm: str | None = None, *, n: Any = None, **_: Any
    ) -> Value:
        x = _numbers(b, x)
        sizes, dims = _shape_and_dims(x, s if n is None else n, dim)
        require(bool(dims), "a transform has at least one axis")
        x, norm = _fit_all(b, x, sizes, dims), _norm(norm, forward)
        if forward:
            return fft_r2c(b, x, dims, norm, onesided=True)
        return fft_c2c(b, conj(b, fft_r2c(b, x, dims[-1:], norm, onesided=True)), dims[:-1], norm, forward=False)

    return importer


def _import_to_real(forward: bool, default: Dims) -> Importer:
    """irfft, irfft2, irfftn; hfft, hfft2, hfftn are transforms of the first axes, then of the last, conjugated."""

    def importer(
        b: Builder, x: Value, s: Any = None, dim: Dims = default, norm: str | None = None, *, n: Any = None, **_: Any
    ) -> Value:
        x = _numbers(b, x, to_complex=True)
        sizes, dims = _shape_and_dims(x, s if n is None else n, dim)
        require(bool(dims), "a transform has at least one axis")
        given = sizes[-1]
        size = 2 * (x.type.shape[dims[-1]] - 1) if given in (None, -1) else given
        assert size is not None
        require(size > 0, f"a transform has at least one point, got {size}")
        x, norm = _fit_all(b, x, [*sizes[:-1], size // 2 + 1], dims), _norm(norm, forward)
        if not forward:
            return fft_c2r(b, x, dims, norm, size)
        return fft_c2r(b, conj(b, fft_c2c(b, x, dims[:-1], norm, forward=True)), dims[-1:], norm, size)

    return importer


def _import_shift(inverse: bool) -> Importer:
    """The zero frequency in the middle, or back at the front."""

    def importer(b: Builder, x: Value, dim: Dims = None) -> Value:
        axes = range(x.type.rank) if dim is None else [dim] if isinstance(dim, int) else dim
        dims = [norm_dim(axis, x.type.rank) for axis in axes]
        shifts = [(x.type.shape[axis] + inverse) // 2 for axis in dims]
        return import_roll(b, x, shifts, dims) if dims else x

    return importer


def _import_frequencies(half: bool) -> Importer:
    """fftfreq: 0, 1, ..., -2, -1 over ``n d``; rfftfreq: the ones that are not negative (and n/2)."""

    def importer(b: Builder, n: int, d: float = 1.0, *, dtype: str | None = None, **_: Any) -> Value:
        require(n > 0, f"at least one point is required, got {n}")
        if half:
            index = iota(b, n // 2 + 1)
        else:
            turned = b.emit("remainder_scalar", iota(b, n, start=n // 2), value=n)
            index = b.emit("sub_scalar", turned, value=n // 2)
        return scale(b, cast(b, index, dtype or "f32"), 1.0 / (n * d))

    return importer


def _family(name: str, rule: Callable[[Dims], Importer]) -> dict[str, Importer]:
    """The transform along one axis, along two, and along any."""
    return {
        f"fft_{name}.default": rule((-1,)),
        f"fft_{name}2.default": rule((-2, -1)),
        f"fft_{name}n.default": rule(None),
    }


def _names(norm: int) -> str:
    return ("none", "root", "size")[norm]


C2C_IMPORTERS: dict[str, Importer] = {
    "_fft_c2c.default": lambda b, x, dim, normalization, forward: fft_c2c(
        b, x, [norm_dim(axis, x.type.rank) for axis in dim], _names(normalization), forward
    ),
    "fft_fft.default": _import_fft(True, True, (-1,)),
    "fft_ifft.default": _import_fft(False, True, (-1,)),
    "fft_fft2.default": _import_fft(True, False, (-2, -1)),
    "fft_ifft2.default": _import_fft(False, False, (-2, -1)),
    "fft_fftn.default": _import_fft(True, False, None),
    "fft_ifftn.default": _import_fft(False, False, None),
    "fft_fftshift.default": _import_shift(False),
    "fft_ifftshift.default": _import_shift(True),
    "fft_fftfreq.default": _import_frequencies(half=False),
    "fft_rfftfreq.default": _import_frequencies(half=True),
}
R2C_IMPORTERS: dict[str, Importer] = {
    "_fft_r2c.default": lambda b, x, dim, normalization, onesided: fft_r2c(
        b, x, [norm_dim(axis, x.type.rank) for axis in dim], _names(normalization), onesided
    ),
    **_family("rfft", lambda dims: _import_real_fft(True, dims)),
    **_family("ihfft", lambda dims: _import_real_fft(False, dims)),
}
C2R_IMPORTERS: dict[str, Importer] = {
    "_fft_c2r.default": lambda b, x, dim, normalization, last_dim_size: fft_c2r(
        b, x, [norm_dim(axis, x.type.rank) for axis in dim], _names(normalization), last_dim_size
    ),
    **_family("irfft", lambda dims: _import_to_real(False, dims)),
    **_family("hfft", lambda dims: _import_to_real(True, dims)),
}
