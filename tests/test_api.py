"""What ``import daggc`` gives, and what it does not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import daggc
from daggc.api import NAMES
from daggc.interp import interpret
from daggc.plan.device import Cluster, cpu_device

EXAMPLE = Path(__file__).parent.parent / "ir_examples" / "mlp"
DEVICES = [cpu_device(0), cpu_device(1)]

TEXT = """daggc 1

graph @forward(
  %w: f64[2,3] param "fc.weight",
  %x: f64[4,3] input "0"
) -> (
  %y output "0"
) {
  %y: f64[4,2] = linear(%x, %w) !path "fc"
}
"""


def python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_alone_loads_neither_torch_nor_dask() -> None:
    loaded = python("import sys, daggc, daggc.cli; print(sorted({name.split('.')[0] for name in sys.modules}))")
    assert not {"torch", "dask", "distributed"} & set(ast.literal_eval(loaded))


def test_ir_names_load_neither_torch_nor_dask() -> None:
    light = ("parse", "to_text", "verify", "interpret", "vjp", "plan", "Plan", "load", "Device", "DaggcError")
    loaded = python(
        f"import sys, daggc\nfor name in {light}: getattr(daggc, name)\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    assert not {"torch", "dask", "distributed"} & set(ast.literal_eval(loaded))


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(daggc, name) is not None
    assert name in dir(daggc)


def test_type_checkers_see_every_public_name() -> None:
    tree = ast.parse(Path(str(daggc.__file__)).read_text())
    names = {alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(NAMES) <= names


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = daggc.nothing  # pyright: ignore[reportAttributeAccessIssue]


def test_text_to_gradients() -> None:
    program = daggc.vjp(daggc.parse(TEXT))
    daggc.verify(program)
    rng = np.random.default_rng(0)
    w, x, ct = rng.normal(size=(2, 3)), rng.normal(size=(4, 3)), rng.normal(size=(4, 2))
    results = daggc.interpret(program, {"fc.weight": w, "0": x, "cotangent:output:0": ct})
    np.testing.assert_allclose(results["output:0"], x @ w.T)
    np.testing.assert_allclose(results["grad:param:fc.weight"], ct.T @ x)
    np.testing.assert_allclose(results["grad:input:0"], ct @ w)


def test_run_pipeline_is_read_from_text() -> None:
    program = daggc.run_pipeline(daggc.parse(TEXT), "fold,vjp{wrt=params},dce")
    assert [port.ref for port in program.backward.outputs] == ["grad:param:fc.weight"]
    with pytest.raises(daggc.IRError, match="there is no pass 'zap'"):
        daggc.run_pipeline(program, "zap")


def test_save_takes_tensors_of_every_dtype(tmp_path: Path) -> None:
    import torch

    weights = {"a": torch.randn(3), "b": torch.randn(2, 2).bfloat16().requires_grad_(), "c": torch.arange(3)}
    daggc.save(daggc.parse(TEXT), tmp_path / "p.dag", weights={**weights, "d": np.ones(2)})
    loaded = daggc.load_weights(tmp_path / "p.safetensors")
    assert daggc.load(tmp_path / "p.dag") == daggc.parse(TEXT)
    for name, tensor in weights.items():
        np.testing.assert_array_equal(loaded[name].astype(np.float64), tensor.detach().double().numpy())


def test_trace_a_model() -> None:
    import torch

    program = daggc.trace(torch.nn.Linear(3, 2), (torch.ones(4, 3),))
    assert [node.op for node in program.forward.nodes] == ["linear"]


# --- plan ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [DEVICES, Cluster(tuple(DEVICES))])
def test_plan_takes_devices_or_a_cluster(devices: Sequence[daggc.Device] | Cluster) -> None:
    program = daggc.load(EXAMPLE / "vjp.dag")
    plan = daggc.plan(program, devices)
    daggc.verify(plan.program)
    assert "cpu:1" in plan.explain()
    assert {port.ref for port in plan.program.backward.outputs} == {port.ref for port in program.backward.outputs}


def test_a_plan_has_the_gradients_that_the_program_has() -> None:
    program = daggc.vjp(daggc.load(EXAMPLE / "simplified.dag"), ["param:layers.0.weight"])
    plan = daggc.plan(program, DEVICES)
    assert [port.ref for port in plan.program.backward.outputs] == ["grad:param:layers.0.weight"]


def test_a_program_without_backward_is_planned_for_inference() -> None:
    plan = daggc.plan(daggc.load(EXAMPLE / "simplified.dag"), DEVICES)
    assert "backward" not in plan.program.graphs


def test_a_changed_backward_is_not_dropped_silently() -> None:
    text = (EXAMPLE / "vjp.dag").read_text()
    changed = daggc.parse(text.replace("= matmul(%permute, %relu_1)", "= matmul(%permute, %relu)"))
    assert changed != daggc.parse(text)
    with pytest.raises(daggc.PlanError, match="not what vjp makes"):
        daggc.plan(changed, DEVICES)
    with pytest.raises(daggc.PlanError, match="not what vjp makes"):
        daggc.plan(daggc.vjp(daggc.parse(text)), DEVICES)


def test_planning_keeps_the_meaning() -> None:
    program = daggc.load(EXAMPLE / "vjp.dag")
    rng = np.random.default_rng(0)
    inputs = {
        port.ref: rng.normal(size=port.value.type.shape).astype(np.float32)
        if port.value.type.is_float
        else rng.integers(0, 4, port.value.type.shape)
        for port in (*program.forward.inputs, *program.backward.inputs_of("cotangent"))
    }
    before, after = interpret(program, inputs), interpret(daggc.plan(program, DEVICES).program, inputs)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)
