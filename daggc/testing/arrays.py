"""Arrays for tests: random numbers of the domain an op or a port asks for."""

from __future__ import annotations

import re

import numpy as np

from daggc.ir.graph import Graph, Value
from daggc.ir.types import TensorType
from daggc.ops.opdef import Arg

_NAMED = re.compile(
    r"(real|positive|unit|large|nonzero|distinct|bool|small|count|key|regular|hermitian|triangular|index(\d+))(?:_\d+)?"
)
_KEY_RANGE = 2**31


def port_name(domain: str) -> str:
    """The name hint of an input of this domain: ``index:5`` gives ``index5``; :func:`domain_of` reads it back."""
    return domain.replace(":", "")


def domain_of(value: Value) -> str:
    """The domain of an input: what its name says (``%positive_3``, ``%index5``), else what its dtype allows."""
    match = _NAMED.fullmatch(value.name)
    if match is not None:
        return f"index:{match.group(2)}" if match.group(2) else match.group(1)
    if value.type.dtype == "bool":
        return "bool"
    return "real" if value.type.differentiable else "index:2"


def draw_array(arg: Arg, rng: np.random.Generator) -> np.ndarray:
    """Random numbers of an argument's dtype, shape and domain (see :class:`~daggc.ops.opdef.Arg`).

    Real numbers stay within a few units of zero, so that finite differences of what is made of them work.
    """
    type_, domain = arg.type, arg.domain
    if domain == "key":
        numbers = rng.integers(0, _KEY_RANGE, type_.shape)
    elif domain.startswith("index:"):
        numbers = rng.integers(0, int(domain.removeprefix("index:")), type_.shape)
    elif domain == "bool" or type_.dtype == "bool":
        numbers = rng.integers(0, 2, type_.shape)
    elif domain == "count":
        numbers = rng.integers(1, 10, type_.shape)
    elif type_.is_integer and domain in ("positive", "nonzero", "unit", "distinct"):
        numbers = _whole_numbers(type_, domain, rng)
    elif domain in ("regular", "hermitian", "triangular") and type_.rank >= 2 and not type_.is_integer:
        numbers = _matrices(type_, domain, rng)
    elif domain == "small" or type_.is_integer:
        numbers = rng.integers(0 if type_.dtype == "u8" else -4, 5, type_.shape)
    elif type_.is_complex:
        numbers = rng.normal(size=type_.shape) + 1j * rng.normal(size=type_.shape)
    else:
        numbers = _real_numbers(type_, domain, rng)
    return np.asarray(numbers).astype(type_.numpy_dtype)


def _whole_numbers(type_: TensorType, domain: str, rng: np.random.Generator) -> np.ndarray:
    """Integers in place of the real numbers of a domain."""
    shape = type_.shape
    if domain == "distinct":
        return rng.permutation(np.arange(type_.numel)).reshape(shape)
    if domain == "unit":
        return rng.integers(0, 2, shape)
    signs = rng.choice((-1, 1), shape) if domain == "nonzero" and type_.dtype != "u8" else 1
    return rng.integers(1, 5, shape) * signs


def _matrices(type_: TensorType, domain: str, rng: np.random.Generator) -> np.ndarray:
    """Matrices far from singular, with singular values (and eigenvalues) apart: small numbers around a diagonal.

    Those of domain ``regular`` have their rows rolled, so that pivots are not on the diagonal.
    """
    rows, columns = type_.shape[-2:]
    numbers = rng.normal(size=type_.shape)
    if type_.is_complex:
        numbers = numbers + 1j * rng.normal(size=type_.shape)
    numbers = 0.15 * numbers + np.eye(rows, columns) * (1 + 0.5 * np.arange(columns))
    return np.roll(numbers, 1, -2) if domain == "regular" else within(domain, numbers)


def within(domain: str, matrices: np.ndarray) -> np.ndarray:
    """Matrices of the structure that a domain has: hermitian, or lower triangular."""
    if matrices.ndim >= 2 and domain == "hermitian":
        return (matrices + matrices.swapaxes(-1, -2).conj()) / 2
    return np.tril(matrices) if matrices.ndim >= 2 and domain == "triangular" else matrices


def _real_numbers(type_: TensorType, domain: str, rng: np.random.Generator) -> np.ndarray:
    shape = type_.shape
    if domain == "positive":
        return rng.uniform(0.2, 2.0, shape)
    if domain == "unit":
        return rng.uniform(0.05, 0.95, shape)
    if domain == "large":
        return rng.uniform(1.2, 4.0, shape)
    if domain == "nonzero":
        return rng.uniform(0.2, 2.0, shape) * rng.choice((-1.0, 1.0), shape)
    if domain == "distinct":
        steps = np.arange(type_.numel) - 0.5 * (type_.numel - 1) + 0.125
        return distinct_gap(type_.numel) * rng.permutation(steps).reshape(shape)
    return rng.normal(size=shape)


def distinct_gap(numel: int) -> float:
    """The difference of neighbours among ``numel`` distinct numbers; a power of two, so that 16 bits keep it."""
    return 2.0 ** -max(0, (numel // 4).bit_length() - 1)


def random_inputs(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays for every input of a graph, by ``ref`` of its port, each of its port's domain.

    A port's domain is in its value's name: see :func:`domain_of`. The same graph and seed give the same arrays.
    """
    arrays: dict[str, np.ndarray] = {}
    for index, port in enumerate(graph.inputs):
        rng = np.random.default_rng([seed, index])
        arrays[port.ref] = draw_array(Arg(port.value.type, domain_of(port.value)), rng)
    return arrays
