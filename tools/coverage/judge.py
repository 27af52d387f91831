"""The measure of "the same numbers" for one op or module: daggc's result beside eager's, eager's f64 as reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ULPS = 16  # units in the last place, of the tensor's norm, that are always allowed
GAUGE = 0.1  # eager's own relative error from which f32 and f64 are taken to have chosen differently


class Wrong(AssertionError):
    """Numbers differ by more than is allowed."""


def compare(
    where: str,
    got: torch.Tensor | None,
    eager: torch.Tensor | None,
    reference: torch.Tensor | None,
    least: float = 0.0,
) -> None:
    """Hold one tensor against eager's.

    The norm of the error is at most 4 times that of eager's own error against f64, plus a few units in the last
    place; in f64 itself 1e-10 of the norm. Where eager is far from its f64 run (a tie broken the other way, the sign
    of an eigenvector), or there is no f64 run, daggc has to be as near to eager itself.

    Args:
        reference: eager's result in f64, or None.
        least: a norm that the tensor is measured against if its own is smaller: 1e-6 of the norm of all gradients.

    Raises:
        Wrong: saying where and by how much.
    """
    if got is None or eager is None:
        if got is not eager and float(_dense(got if eager is None else eager).abs().sum()) != 0:
            raise Wrong(f"{where}: {'a gradient where eager has none' if eager is None else 'no gradient'}")
        return
    if (got.dtype, got.shape) != (eager.dtype, eager.shape):
        raise Wrong(f"{where}: {got.dtype}{list(got.shape)} for {eager.dtype}{list(eager.shape)}")
    if not (eager.is_floating_point() or eager.is_complex()):
        if not torch.equal(got, eager):
            raise Wrong(f"{where}: {int((got != eager).sum())} of {eager.numel()} differ")
        return
    got, eager = _dense(got), _dense(eager)
    finite = torch.isfinite(eager)
    if not torch.equal(got[~finite].nan_to_num(), eager[~finite].nan_to_num()) or not got[finite].isfinite().all():
        raise Wrong(f"{where}: other elements are nan or infinite")
    eps = torch.finfo(eager.dtype).eps
    wide = torch.complex128 if eager.is_complex() else torch.float64
    got, eager = got.to(wide)[finite], eager.to(wide)[finite]
    exact = eager
    if reference is not None and reference.shape == finite.shape:
        exact = _dense(reference).to(wide)[finite]
    if not exact.isfinite().all():
        exact = eager  # f64 is where the model's own constants overflow
    scale = max(float(eager.norm()), least)
    own = float((eager - exact).norm())
    if not own <= GAUGE * scale and scale > least:  # below that, all of it may be rounding
        exact, own = eager, 0.0
    floor = 1e-10 if eps < 1e-10 else ULPS * eps
    error, allowed = float((got - exact).norm()), 4 * own + floor * scale
    if not error <= allowed:
        raise Wrong(f"{where}: error {error:.2e} of a norm of {scale:.2e}, {allowed:.2e} is allowed")


def norm_of(tensors: Sequence[torch.Tensor | None]) -> float:
    """The norm of all finite numbers in some tensors together."""
    squares = [float(_dense(x).abs().double().nan_to_num(0, 0, 0).norm()) ** 2 for x in tensors if x is not None]
    return sum(squares) ** 0.5


def _dense(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.detach().resolve_conj().resolve_neg()
