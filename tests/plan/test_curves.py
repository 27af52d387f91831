"""Measured times as a function of size."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daggc.errors import PlanError
from daggc.plan.curves import Curve, curve_of
from daggc.plan.device import Device, cpu_device

ROWS = ((1e6, 1e5, 1e-4), (1e8, 1e6, 2e-3), (1e9, 1e7, 1.5e-2), (1e9, 1e9, 0.2))


def seconds(curve: Curve, flops: float, nbytes: float) -> float:
    return float(curve.seconds(np.array([flops]), np.array([nbytes]))[0])


def test_a_curve_gives_what_was_measured_where_it_was() -> None:
    curve = Curve(ROWS)
    for flops, nbytes, measured in ROWS:
        assert seconds(curve, flops, nbytes) == pytest.approx(measured, rel=1e-3)


def test_far_away_time_scales_with_work() -> None:
    curve = Curve(ROWS)
    assert seconds(curve, 1e15, 1e12) == pytest.approx(10 * seconds(curve, 1e14, 1e11), rel=0.02)
    assert seconds(curve, 1.0, 1.0) == pytest.approx(1e-4, rel=0.2)  # no op takes less than the shortest


def test_thin_and_thick_products_have_rates_of_their_own() -> None:
    curve = Curve(((1e8, 1e6, 1e-3), (1e8, 5e7, 1e-2)))
    assert seconds(curve, 2e8, 2e6) < 3e-3
    assert seconds(curve, 2e8, 1e8) > 1.5e-2


@given(
    st.lists(st.tuples(*[st.floats(1e-6, 1e12)] * 3), min_size=1, max_size=8), st.floats(0, 1e15), st.floats(0, 1e15)
)
def test_any_rows_give_a_time(rows: list[tuple[float, float, float]], flops: float, nbytes: float) -> None:
    assert 0 < seconds(Curve(tuple(rows)), flops, nbytes) < float("inf")


def test_rows_of_one_size_are_averaged() -> None:
    curve = curve_of([(100.0, 50.0, 1.0), (100.0, 50.0, 4.0), (1e6, 50.0, 9.0)])
    np.testing.assert_allclose(curve.rows, ((100.0, 50.0, 2.0), (1e6, 50.0, 9.0)))


def test_costs_of_views_are_all_zero() -> None:
    assert seconds(Curve(((0, 0, 1e-6),)), 0, 0) == pytest.approx(1e-6)


@pytest.mark.parametrize("rows", [(), ((1, 1, 0),), ((-1, 1, 1),), ((1, float("nan"), 1),), ((1, 1, float("inf")),)])
def test_bad_rows_are_refused(rows: tuple[tuple[float, float, float], ...]) -> None:
    with pytest.raises(PlanError, match="a curve has rows of FLOPs, bytes and seconds"):
        Curve(rows)


def test_a_calibrated_device_travels() -> None:
    device = replace(
        cpu_device(), curves={"add": Curve(ROWS)}, profile={"x": 1.0}, slowdown={"gemm": 1.5}, hop=1e-3, host="a"
    )
    assert pickle.loads(pickle.dumps(device)) == device
    assert Device(**json.loads(json.dumps(device.to_json()))) == device


def test_which_curve_an_op_has() -> None:
    first, second, third = (Curve(((1, 1, number),)) for number in (1, 2, 3))
    device = replace(cpu_device(), curves={"matmul": first, "matmul:f64": second, "elementwise": third})
    assert device.curve("matmul", "f32", "gemm") is first
    assert device.curve("matmul", "f64", "gemm") is second
    assert device.curve("add", "f32", "elementwise") is third
    assert device.curve("softmax", "f32", "reduction") is None
    with pytest.raises(PlanError, match="not negative"):
        replace(device, profile={"x": -1.0})
