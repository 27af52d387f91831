"""The command line: every command, in this process and where torch, dask or the model's source are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

import daggc
from daggc.cli import main
from daggc.report.stages import STAGES

EXAMPLES = Path(__file__).parent.parent / "ir_examples"
MLP = f"{EXAMPLES}/mlp/model.py:factory"
TOLERANCE = 1e-10

GPT2 = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel

def factory():
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=23, n_positions=12, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    ids = torch.randint(23, (2, 8))
    return GPT2LMHeadModel(config).double().train(), (), {"input_ids": ids, "use_cache": False}
"""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments: str | Path) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def without(blocked: Sequence[str], folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own where some packages cannot be imported."""
    for name in blocked:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is blocked')\n")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=folder, timeout=120
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLP with its backward, its weights beside it, and inputs.safetensors."""
    folder = tmp_path_factory.mktemp("mlp")
    succeed("dump-ir", MLP, "--stage", "vjp", "-o", folder / "mlp.dag", "--weights", folder / "mlp.safetensors")
    inputs = {"0": np.ones((4, 8), np.float32), "1": np.arange(4), "cotangent:output:0": np.ones((), np.float32)}
    save_file(inputs, folder / "inputs.safetensors")
    return folder


# --- dump-ir ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_verifies_as_text_and_json(stage: str, tmp_path: Path) -> None:
    text = succeed("dump-ir", MLP, "--stage", stage)
    (tmp_path / "p.json").write_text(succeed("dump-ir", MLP, "--stage", stage, "--format", "json"))
    assert daggc.load(tmp_path / "p.json") == daggc.parse(text)
    assert succeed("verify", tmp_path / "p.json").startswith("OK: ")


@pytest.mark.parametrize("stage", [*STAGES, "dask"])
@pytest.mark.parametrize("form", ["dot", "mermaid"])
def test_pictures_of_every_stage(stage: str, form: str) -> None:
    picture = succeed("dump-ir", f"{EXAMPLES}/mlp/captured.dag", "--stage", stage, "--format", form)
    assert picture.startswith("digraph daggc {" if form == "dot" else "flowchart TB")


def test_dask_stage_lists_tasks_whose_dependencies_exist() -> None:
    rows = json.loads(succeed("dump-ir", MLP, "--stage", "dask", "--format", "json", "--devices", "cpu:0,cpu:1"))
    keys = {row["key"] for row in rows}
    assert {row["device"] for row in rows} == {"cpu:0", "cpu:1"}
    assert {row["callee"] for row in rows} >= {"stage0.forward", "stage0.backward"}
    for row in rows:
        assert all(key in keys or key.startswith("<") for key in row["dependencies"])
    assert "stage0.backward" in succeed("dump-ir", MLP, "--stage", "dask")


def test_a_program_file_is_taken_as_a_model(tmp_path: Path) -> None:
    captured = tmp_path / "mlp.dag"
    succeed("dump-ir", MLP, "-o", captured)
    assert succeed("dump-ir", captured, "--stage", "vjp") == succeed("dump-ir", MLP, "--stage", "vjp")


def test_a_model_is_named_by_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_model.py").write_text((EXAMPLES / "mlp" / "model.py").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    assert "linear" in succeed("dump-ir", "some_model:factory")


# --- verify, opt, diff, tables ------------------------------------------------------------------------


def test_verify_counts(saved: Path) -> None:
    text = succeed("verify", saved / "mlp.dag")
    assert text.startswith("OK: 2 graphs, ")
    assert text.rstrip().endswith("6 parameters of 484 elements, portable")


def test_verify_shows_the_offending_lines(saved: Path) -> None:
    broken = saved / "broken.dag"
    broken.write_text((saved / "mlp.dag").read_text().replace("%relu: f32[4,16] =", "%relu: f32[4,17] =", 1))
    result = call("verify", broken)
    assert result.exit_code == 1
    assert "> %relu: f32[4,17] = relu(%linear)" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "'daggc' was expected"), ("daggc 1\ngraph @f() -> () {\n  %x = \n}", "line 3"), ("daggc 9", "IR version 9")],
)
def test_verify_names_the_line_of_malformed_text(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.dag").write_text(text)
    result = call("verify", tmp_path / "bad.dag")
    assert result.exit_code == 1
    assert message in result.stderr


def test_opt_runs_a_pipeline(saved: Path, tmp_path: Path) -> None:
    text = succeed("opt", f"{EXAMPLES}/mlp/captured.dag", "--passes", "fold,cse,vjp{wrt=params},dce")
    gradients = [port.target for port in daggc.parse(text).backward.outputs_of("grad")]
    assert gradients
    assert all(target.startswith("param:") for target in gradients)
    succeed("opt", saved / "mlp.dag", "-o", tmp_path / "out.json")
    assert daggc.load(tmp_path / "out.json").provenance[-1] == "dce"


def test_diff_sees_structure_not_names(saved: Path, tmp_path: Path) -> None:
    text = (saved / "mlp.dag").read_text()
    (tmp_path / "renamed.dag").write_text(text.replace("%relu_1", "%renamed"))
    assert succeed("diff", saved / "mlp.dag", tmp_path / "renamed.dag") == "the same structure\n"
    (tmp_path / "rewired.dag").write_text(text.replace("= relu(%linear_1)", "= relu(%relu)"))
    result = call("diff", saved / "mlp.dag", tmp_path / "rewired.dag")
    assert result.exit_code == 1
    assert "~ %relu_1: f32[4,16] = relu(%linear_1)" in result.stdout
    (tmp_path / "other.dag").write_text(text.replace("= relu(%linear_1)", "= neg(%linear_1)"))
    changed = call("diff", saved / "mlp.dag", tmp_path / "other.dag").stdout
    assert "- %relu_1: f32[4,16] = relu" in changed
    assert "+ %relu_1: f32[4,16] = neg" in changed


def test_tables(saved: Path) -> None:
    assert "linear" in succeed("summary", saved / "mlp.dag")
    assert "stage0.backward" in succeed("plan", saved / "mlp.dag")
    assert "cpu:1" in succeed("explain", saved / "mlp.dag")


def test_plan_writes_a_program(saved: Path, tmp_path: Path) -> None:
    succeed("plan", saved / "mlp.dag", "-o", tmp_path / "plan.dag")
    assert succeed("verify", tmp_path / "plan.dag").startswith("OK: 6 graphs")


# --- run ----------------------------------------------------------------------------------------------


def results_of(file: Path, folder: Path, *options: str | Path) -> dict[str, np.ndarray]:
    succeed("run", file, "--out", folder / "out.safetensors", *options)
    return load_file(folder / "out.safetensors")


CLUSTER = """
[[devices]]
kind = "cpu"
count = 2
memory = 4e9
"""


def test_a_step_is_simulated_on_the_devices_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    (tmp_path / "loss.py").write_text("def loss(output, target):\n    return ((output - target) ** 2).mean()\n")
    (tmp_path / "model.py").write_text(
        "import torch\n\ndef factory():\n    torch.manual_seed(0)\n"
        "    layers = [torch.nn.Linear(8, 8) for _ in range(4)]\n"
        "    return torch.nn.Sequential(*layers), (torch.ones(4, 8), torch.ones(4, 8))\n"
    )
    model, out, picture = tmp_path / "model.py:factory", tmp_path / "step.json", tmp_path / "step.html"
    arguments = ["simulate", model, "--devices", tmp_path / "cluster.toml", "--loss", f"{tmp_path}/loss.py:loss"]
    text = succeed(*arguments, "-o", out, "--timeline", picture)
    assert "Considered" in text and "2 microbatches" in text and "chosen" in text and "makespan" in text
    assert json.loads(out.read_text())["makespan_us"] > 0
    assert "FB0.0" in picture.read_text()
    fixed = succeed(*arguments, "--microbatches", "4", "--schedule", "gpipe", "--replicas", "1")
    assert "step of 4 microbatches" in fixed
    refused = call(*arguments, "--microbatches", "none")
    assert refused.exit_code == 2 and "neither a number nor auto" in refused.output


def test_backends_agree_and_so_does_a_plan(saved: Path, tmp_path: Path) -> None:
    inputs = ("--inputs", saved / "inputs.safetensors")
    succeed("plan", saved / "mlp.dag", "-o", tmp_path / "plan.dag")
    weights = ("--weights", saved / "mlp.safetensors")
    runs = [results_of(saved / "mlp.dag", tmp_path, *inputs, "--backend", backend) for backend in ("numpy", "torch")]
    runs += [results_of(tmp_path / "plan.dag", tmp_path, *inputs, *weights, "--backend", "numpy")]
    assert "grad:param:layers.0.weight" in runs[0]
    for other in runs[1:]:
        assert other.keys() == runs[0].keys()
        for name, array in runs[0].items():
            np.testing.assert_allclose(other[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


def test_buffers_without_axes_keep_their_shape(tmp_path: Path) -> None:
    cnn, weights = tmp_path / "cnn.dag", tmp_path / "cnn.safetensors"
    succeed("dump-ir", f"{EXAMPLES}/cnn/model.py:factory", "-o", cnn, "--weights", weights)
    assert "buffer:stem.1.num_batches_tracked: int64[] 1\n" in succeed("run", cnn, "--random", "--backend", "numpy")


def test_random_inputs_repeat_by_seed(saved: Path) -> None:
    options = ("run", saved / "mlp.dag", "--random", "--backend", "numpy", "--seed")
    assert succeed(*options, "1") == succeed(*options, "1")
    assert succeed(*options, "1") != succeed(*options, "2")


def test_a_missing_and_a_misspelt_input_are_named(saved: Path, tmp_path: Path) -> None:
    result = call("run", saved / "mlp.dag", "--backend", "numpy")
    assert result.exit_code == 1
    assert "needs 'input:0', a f32[4,8]" in result.stderr
    save_file({"O": np.ones((4, 8), np.float32)}, tmp_path / "typo.safetensors")
    result = call("run", saved / "mlp.dag", "--inputs", tmp_path / "typo.safetensors")
    assert result.exit_code == 1
    assert "there is no input 'O'" in result.stderr


# --- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dump-ir", "nowhere.py:factory"), "there is no file nowhere.py"),
        (("dump-ir", "no_such_module:factory"), "No module named 'no_such_module'"),
        (("dump-ir", "model.py"), "a model is named path/to/file.py:factory"),
        (("dump-ir", f"{EXAMPLES}/mlp/model.py:nothing"), "has no callable 'nothing'; it has"),
        (("dump-ir", f"{EXAMPLES}/mlp/model.py:MLP"), "must give (model, args)"),
        (("verify", "nowhere.dag"), "cannot read a program from nowhere.dag"),
        (("opt", f"{EXAMPLES}/mlp/captured.dag", "--passes", "zap"), "there is no pass 'zap'"),
        (("plan", f"{EXAMPLES}/mlp/captured.dag", "--devices", "tpu:0"), "got 'tpu:0'"),
        (("plan", f"{EXAMPLES}/mlp/captured.dag", "--devices", "0"), "at least one device"),
        (("run", f"{EXAMPLES}/mlp/captured.dag", "--weights", "none.safetensors"), "none.safetensors"),
    ],
)
def test_errors_are_one_message(arguments: Sequence[str], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_an_error_in_the_models_own_code_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "bad_model.py").write_text("def factory():\n    return 1 / 0\n")
    result = call("dump-ir", f"{tmp_path}/bad_model.py:factory")
    assert result.exit_code == 1
    assert "ZeroDivisionError" in result.stderr
    assert "bad_model.py:2" in result.stderr


def test_debug_shows_the_traceback() -> None:
    result = call("--debug", "verify", "nowhere.dag")
    assert isinstance(result.exception, daggc.IRError)


def test_version() -> None:
    assert daggc.__version__ in succeed("--version")


# --- where packages are missing -----------------------------------------------------------------------


def test_programs_are_handled_without_torch_and_dask(saved: Path, tmp_path: Path) -> None:
    script = f"""
from daggc.cli import main
for arguments in (
    ["verify", "{saved}/mlp.dag"],
    ["opt", "{saved}/mlp.dag", "--passes", "fold,cse,dce", "-o", "opt.dag"],
    ["run", "opt.dag", "--weights", "{saved}/mlp.safetensors", "--inputs", "{saved}/inputs.safetensors",
     "--backend", "numpy"],
    ["summary", "opt.dag"],
    ["dump-ir", "opt.dag", "--stage", "plan", "--format", "dot"],
    ["diff", "opt.dag", "opt.dag"],
):
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code, arguments
"""
    done = without(("torch", "dask", "distributed", "transformers"), tmp_path, "-c", script)
    assert done.returncode == 0, done.stderr
    assert "grad:param:layers.0.weight" in done.stdout


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 in f64 (without labels: its loss casts to f32): program, weights, inputs, and what eager PyTorch gives."""
    import torch

    folder = tmp_path_factory.mktemp("gpt2")
    source = folder / "gpt2_model.py"
    source.write_text(GPT2)
    options = ("--stage", "vjp", "-o", folder / "gpt2.dag", "--weights", folder / "gpt2.safetensors")
    succeed("dump-ir", f"{source}:factory", *options)
    scope: dict[str, object] = {}
    exec(GPT2, scope)
    model, _, kwargs = scope["factory"]()  # pyright: ignore[reportCallIssue]
    logits = model(**kwargs).logits
    cotangent = torch.randn_like(logits)
    logits.backward(cotangent)
    expected = {f"grad:param:{name}": value.grad.numpy() for name, value in model.named_parameters()}
    expected |= {"output:logits": logits.detach().numpy()}
    save_file(expected, folder / "expected.safetensors")
    inputs = {name: value.numpy() for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    save_file({**inputs, "cotangent:output:logits": cotangent.numpy()}, folder / "inputs.safetensors")
    source.unlink()
    return folder


def assert_eager(got: dict[str, np.ndarray], folder: Path) -> None:
    """The measure of the design's first promise, for f64."""
    expected = load_file(folder / "expected.safetensors")
    gradients = np.sqrt(sum(float((a**2).sum()) for name, a in expected.items() if name.startswith("grad:")))
    for name, array in expected.items():
        error = np.linalg.norm(got[name] - array)
        assert error <= TOLERANCE * max(np.linalg.norm(array), 1e-6 * gradients), name


def test_gpt2_verifies_from_its_text(gpt2: Path) -> None:
    text = (gpt2 / "gpt2.dag").read_text()
    assert daggc.to_text(daggc.parse(text)) == text
    assert "portable" in succeed("verify", gpt2 / "gpt2.dag")


@pytest.mark.parametrize("stage", ["simplified", "plan", "dask"])
def test_gpt2_at_further_stages(gpt2: Path, stage: str) -> None:
    assert "h.1" in succeed("dump-ir", gpt2 / "gpt2.dag", "--stage", stage) or stage == "dask"


def test_gpt2_runs_where_its_source_cannot_be_imported(gpt2: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    command = (
        "-m",
        "daggc.cli",
        "run",
        f"{gpt2}/gpt2.dag",
        "--inputs",
        f"{gpt2}/inputs.safetensors",
        "--out",
        str(out),
    )
    done = without(("transformers", "gpt2_model"), tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert_eager(load_file(out), gpt2)


def test_gpt2_is_interpreted_without_torch_and_dask(gpt2: Path, tmp_path: Path) -> None:
    script = f"""
import daggc
from safetensors.numpy import save_file
program = daggc.load("{gpt2}/gpt2.dag")
daggc.verify(program)
weights = daggc.load_weights("{gpt2}/gpt2.safetensors")
save_file(daggc.interpret(program, {{**weights, **daggc.load_weights("{gpt2}/inputs.safetensors")}}), "out.safetensors")
"""
    done = without(("torch", "dask", "distributed", "transformers"), tmp_path, "-c", script)
    assert done.returncode == 0, done.stderr
    assert_eager(load_file(tmp_path / "out.safetensors"), gpt2)
