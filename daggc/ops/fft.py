"""Discrete Fourier transforms: complex to complex, real to complex and back, along any axes.

The three ops are torch's ``_fft_c2c``, ``_fft_r2c`` and ``_fft_c2r``, to which all of ``torch.fft`` comes down.
``norm`` says what a transform over n points in all multiplies by: ``none`` 1, ``root`` 1/sqrt(n), ``size`` 1/n.
The order of ``dims`` matters: where only half of a spectrum is held, it is half of the last of them.

Each is linear, so its derivative is its transpose: a transform of the other direction with the same ``norm``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import fft

from daggc.ir.attrs import Attrs
from daggc.ir.builder import Builder
from daggc.ir.graph import Node, Value
from daggc.ir.types import TensorType
from daggc.ops.build import add
from daggc.ops.complex_numbers import complex_type, part_type, real
from daggc.ops.elementwise import one_input
from daggc.ops.opdef import (
    AS_IT_IS,
    Arg,
    Axes,
    Cost,
    OpDef,
    Sample,
    node_bytes,
    register,
    require,
    sample,
    t,
)
from daggc.ops.shape import whole_along
from daggc.ops.signal_windows import WINDOW_IMPORTERS
from daggc.ops.slicing import pad_dim, slice_dim
from daggc.ops.stft import import_istft, import_stft
from daggc.ops.torch_fft import C2C_IMPORTERS, C2R_IMPORTERS, R2C_IMPORTERS, fft_c2c, fft_r2c

_NORMS = {"none": 0, "root": 1, "size": 2}  # torch's numbers
_NUMPY_NORMS = {  # SciPy's name of the factor, of a forward and of an inverse transform
    "none": ("backward", "forward"),
    "root": ("ortho", "ortho"),
    "size": ("forward", "backward"),
}


def _check(x: TensorType, attrs: Attrs, flags: Sequence[str]) -> None:
    dims = attrs["dims"]
    known = len(dims) > 0 and len(set(dims)) == len(dims) and all(0 <= dim < x.rank for dim in dims)
    require(known, f"dims must be distinct axes of {x}, at least one, got {dims}")
    require(x.numel > 0, f"at least one point is required, got {x}")
    require(attrs["norm"] in _NORMS, f"norm is one of {', '.join(_NORMS)}, got {attrs['norm']!r}")
    for flag in flags:
        require(isinstance(attrs[flag], bool), f"{flag} must be a bool, got {attrs[flag]!r}")


def _resized(x: TensorType, dim: int, size: int) -> TensorType:
    return x.with_(shape=(*x.shape[:dim], size, *x.shape[dim + 1 :]))


def _infer_c2c(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    part_type(x)
    _check(x, attrs, ("forward",))
    return (x,)


def _infer_r2c(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = inputs
    result = complex_type(x)
    _check(x, attrs, ("onesided",))
    last = attrs["dims"][-1]
    return (_resized(result, last, x.shape[last] // 2 + 1) if attrs["onesided"] else result,)


def _infer_c2r(inputs: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,), size = inputs, attrs["size"]
    result = part_type(x)
    _check(x, attrs, ())
    last = attrs["dims"][-1]
    require(
        isinstance(size, int) and size > 0 and size // 2 + 1 == x.shape[last],
        f"half of a spectrum of size={size} has {size}//2 + 1 points, got {x.shape[last]} along axis {last}",
    )
    return (_resized(result, last, size),)


def _evaluate_c2c(node: Node, x: np.ndarray) -> np.ndarray:
    forward, norm = node.attrs["forward"], _NUMPY_NORMS[node.attrs["norm"]]
    transform = fft.fftn if forward else fft.ifftn
    return np.asarray(transform(x, axes=node.attrs["dims"], norm=norm[not forward]))


def _evaluate_r2c(node: Node, x: np.ndarray) -> np.ndarray:
    transform = fft.rfftn if node.attrs["onesided"] else fft.fftn
    return np.asarray(transform(x, axes=node.attrs["dims"], norm=_NUMPY_NORMS[node.attrs["norm"]][0]))


def _evaluate_c2r(node: Node, x: np.ndarray) -> np.ndarray:
    dims = node.attrs["dims"]
    sizes = [node.output.type.shape[dim] for dim in dims]
    return np.asarray(fft.irfftn(x, s=sizes, axes=dims, norm=_NUMPY_NORMS[node.attrs["norm"]][1]))


def _c2c_vjp(b: Builder, node: Node, ct: Value) -> Value:
    return fft_c2c(b, ct, node.attrs["dims"], node.attrs["norm"], not node.attrs["forward"])


def _r2c_vjp(b: Builder, node: Node, ct: Value) -> Value:
    """The real part of the inverse transform, the half that was not computed counting as zero."""
    dims, x = node.attrs["dims"], node.inputs[0].type
    missing = x.shape[dims[-1]] - ct.type.shape[dims[-1]]
    if missing:
        ct = pad_dim(b, ct, dims[-1], 0, missing)
    return real(b, fft_c2c(b, ct, dims, node.attrs["norm"], forward=False))


def _c2r_vjp(b: Builder, node: Node, ct: Value) -> Value:
    """The forward transform; points whose mirror image was left out stand for both and count twice."""
    dims = node.attrs["dims"]
    spectrum = fft_r2c(b, ct, dims, node.attrs["norm"], onesided=True)
    mirrored = ct.type.shape[dims[-1]] - spectrum.type.shape[dims[-1]]
    if not mirrored:
        return spectrum
    size = spectrum.type.shape[dims[-1]]
    again = slice_dim(b, spectrum, dims[-1], 1, 1 + mirrored)
    return add(b, spectrum, pad_dim(b, again, dims[-1], 1, size - 1 - mirrored))


def _axes(node: Node) -> Axes:
    labels = whole_along(node.attrs["dims"], node.output.type.rank)
    return Axes((labels,), (labels,))


def _cost(node: Node) -> Cost:
    """``5 n log2(n)`` FLOPs a transform of n points, the usual count."""
    points = float(np.prod([node.inputs[0].type.shape[dim] for dim in node.attrs["dims"]]))
    return Cost(5 * node.inputs[0].type.numel * max(1.0, float(np.log2(points))), node_bytes(node), "reduction")


_SPECTRUM = Arg(t(3, 4, dtype="c128"))


def _lower(name: str, last: str) -> Callable[[Node, Sequence[str]], str]:
    """A call of torch's kernel, whose last argument is an attribute."""

    def lower(node: Node, args: Sequence[str]) -> str:
        dims, norm = list(node.attrs["dims"]), _NORMS[node.attrs["norm"]]
        return f"torch.ops.aten.{name}({args[0]}, {dims}, {norm}, {node.attrs[last]})"

    return lower


register(
    OpDef(
        name="fft_c2c",
        infer=_infer_c2c,
        evaluate=_evaluate_c2c,
        vjp=one_input(_c2c_vjp),
        cost=_cost,
        axes=_axes,
        lower=_lower("_fft_c2c", "forward"),
        aten=C2C_IMPORTERS,
        samples=(
            Sample((_SPECTRUM,), {"dims": (1,), "norm": "none", "forward": True}),
            Sample((_SPECTRUM,), {"dims": (1, 0), "norm": "root", "forward": False}),
            Sample((_SPECTRUM,), {"dims": (0,), "norm": "size", "forward": False}),
        ),
        complex=AS_IT_IS,
    )
)
register(
    OpDef(
        name="fft_r2c",
        infer=_infer_r2c,
        evaluate=_evaluate_r2c,
        vjp=one_input(_r2c_vjp),
        cost=_cost,
        axes=_axes,
        lower=_lower("_fft_r2c", "onesided"),
        aten={
            **R2C_IMPORTERS,
            # Signals are cut into windows to be transformed: their importers stand here too.
            "stft.default": import_stft,
            **WINDOW_IMPORTERS,
        },
        samples=(
            sample((3, 4), dims=(1,), norm="none", onesided=True),
            sample((3, 5), dims=(0, 1), norm="root", onesided=True),
            sample((3, 4), dims=(1, 0), norm="size", onesided=False),
        ),
        complex=AS_IT_IS,
    )
)
register(
    OpDef(
        name="fft_c2r",
        infer=_infer_c2r,
        evaluate=_evaluate_c2r,
        vjp=one_input(_c2r_vjp),
        cost=_cost,
        axes=_axes,
        lower=_lower("_fft_c2r", "size"),
        aten={**C2R_IMPORTERS, "istft.default": import_istft},
        samples=(
            Sample((_SPECTRUM,), {"dims": (1,), "norm": "size", "size": 6}),
            Sample((_SPECTRUM,), {"dims": (1, 0), "norm": "root", "size": 5}),
            Sample((Arg(t(2, 1, dtype="c128")),), {"dims": (1,), "norm": "none", "size": 1}),
        ),
        complex=AS_IT_IS,
    )
)
