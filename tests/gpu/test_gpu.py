"""On a machine with a GPU: generated code, and training on GPU workers, beside the CPU and eager PyTorch.

Deselected by default; tools/gpu_check runs them. torch's TF32 is off, so that f32 means f32.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import dask
import pytest
import torch
import torch.nn.functional as F
from distributed import Client, Nanny, Scheduler, SpecCluster
from torch import nn

import daggc
from daggc.backend.codegen import compile_graph
from daggc.frontend.export import capture, weights_of
from daggc.passes import SIMPLIFY
from daggc.passes.manager import pipeline, run
from daggc.runtime.local_workers import dask_settings, local_workers
from daggc.runtime.pool import pool_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(240),
]


@pytest.fixture(autouse=True)
def full_f32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def zoo_names() -> list[str]:
    if importlib.util.find_spec("transformers") is None:
        return []
    import zoo

    return list(zoo.ZOO)


def tensors(value: Any) -> list[torch.Tensor]:
    """Tensors of nested containers, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors(item)]


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float, where: str = "") -> None:
    """The norm of the error is at most ``tolerance`` of the norm of what is wanted."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape, where
    error = (got - want).norm().item()
    assert error <= tolerance * max(want.norm().item(), 1e-6), f"{where}: {error:.2e} of {want.norm().item():.2e}"


@pytest.mark.parametrize("name", zoo_names())
def test_generated_code_gives_the_same_on_the_gpu(name: str) -> None:
    """A zoo model's forward and backward, f64: the CPU's numbers from the GPU's kernels."""
    import zoo

    torch.manual_seed(0)
    case = zoo.ZOO[name]()
    model = case.model.double().eval()
    args = tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in case.args)
    captured = capture(model, args, dict(case.kwargs))
    if not captured.program.portable:
        pytest.skip("opaque Python decides by itself where it runs")
    program = run(captured.program, pipeline(SIMPLIFY))
    given = weights_of(model, captured)
    user = iter(tensors((args, dict(case.kwargs))))
    inputs = []
    for port in program.forward.inputs:
        if port.kind == "key":
            inputs.append(torch.tensor([1, 2]))
        else:
            inputs.append(given[port.ref].detach() if port.ref in given else next(user))
    gpu = torch.device("cuda", 0)
    joint = daggc.vjp(program)
    cpu_all = compile_graph(joint.forward)(inputs, torch.device("cpu"))
    gpu_all = compile_graph(joint.forward)([x.to(gpu) for x in inputs], gpu)
    for port, want, got in zip(joint.forward.outputs, cpu_all, gpu_all, strict=True):
        assert got.device == gpu, port.ref
        if port.kind == "output" and want.is_floating_point():
            close(got, want, 1e-9, port.ref)
    on_cpu = gradients(joint, inputs, cpu_all, torch.device("cpu"))
    on_gpu = gradients(joint, [x.to(gpu) for x in inputs], gpu_all, gpu)
    norm = sum(g.double().norm().item() ** 2 for g in on_cpu.values()) ** 0.5
    for ref, want in on_cpu.items():
        error = (on_gpu[ref].cpu().double() - want.double()).norm().item()
        assert error <= 1e-8 * max(want.double().norm().item(), 1e-6 * norm), ref


def gradients(
    program: daggc.Program, inputs: list[torch.Tensor], results: Any, device: torch.device
) -> dict[str, torch.Tensor]:
    """@backward at cotangents of one."""
    known = {port.ref: x for port, x in zip(program.forward.inputs, inputs, strict=True)}
    known |= {port.ref: x for port, x in zip(program.forward.outputs, results, strict=True) if port.kind == "residual"}
    by_output = {f"cotangent:{port.ref}": x for port, x in zip(program.forward.outputs, results, strict=True)}
    values = [
        torch.ones_like(by_output[port.ref]) if port.kind == "cotangent" else known[port.ref]
        for port in program.backward.inputs
    ]
    outputs = compile_graph(program.backward)(values, device)
    return {port.ref: x for port, x in zip(program.backward.outputs, outputs, strict=True)}


class Net(nn.Module):
    """Attention between linear layers, f32."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(16, 64), nn.Linear(64, 5)
        self.hidden = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.norm = nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for layer in self.hidden:
            heads = x.view(x.shape[0], x.shape[1], 4, 16).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(x.shape)
            x = x + F.gelu(layer(self.norm(mixed)))
        return self.leave(x.mean(1))


def batches(count: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 12, 16, generator=generator), torch.randint(5, (8,), generator=generator)) for _ in range(count)
    ]


def trained_eagerly(model: nn.Module, device: str) -> tuple[nn.Module, list[float]]:
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for x, y in batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.to(device)), y.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def trained_by_daggc(model: nn.Module, client: Client, **options: Any) -> tuple[nn.Module, list[float], Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = daggc.compile(model, client=client, **options).train_step(
        F.cross_entropy, optimizer, microbatches=2, max_grad_norm=1.0
    )
    losses = [step(x, y) for x, y in batches()]
    step.sync()
    return model, [float(loss) for loss in losses], step


def same_training(client: Client, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Net()
    eager, wanted = trained_eagerly(copy.deepcopy(model), "cuda:0")
    model, losses, step = trained_by_daggc(model, client, **options)
    assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) < 1e-4
    for (name, got), want in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert got.device.type == "cpu", "the model stays where its user has it"
        close(got, want, 1e-3, name)
    return step


@pytest.fixture
def gpu_worker() -> Iterator[Client]:
    with local_workers(1) as client:
        yield client


@pytest.fixture
def mixed_workers() -> Iterator[Client]:
    """A worker that sees the GPU, and one that does not."""
    options = {"nthreads": 1, "memory_limit": 0, "dashboard_address": None}
    workers = {
        "0": {"cls": Nanny, "options": options},
        "1": {"cls": Nanny, "options": {**options, "env": {"CUDA_VISIBLE_DEVICES": ""}}},
    }
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": ":0"}}
    with (
        dask.config.set(dask_settings()),
        SpecCluster(workers=workers, scheduler=scheduler) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.wait_for_workers(2, timeout=60)
        yield client


def test_a_worker_finds_its_gpu(gpu_worker: Client) -> None:
    (device,) = pool_of(gpu_worker).cluster.devices
    assert device.kind == "cuda"
    assert device.memory > 1e9


def test_training_on_a_gpu_worker_equals_eager(gpu_worker: Client) -> None:
    same_training(gpu_worker)


def test_training_on_two_workers_of_one_gpu_equals_eager() -> None:
    with local_workers(2) as client:
        step = same_training(client, stages=2)
    assert len(step.plan.stages) == 2


def test_training_on_a_gpu_and_a_cpu_worker_equals_eager(mixed_workers: Client) -> None:
    names = pool_of(mixed_workers).cluster.names
    kinds = [device.kind for device in pool_of(mixed_workers).cluster.devices]
    assert sorted(kinds) == ["cpu", "cuda"]
    gpu, cpu = names[kinds.index("cuda")], names[kinds.index("cpu")]
    step = same_training(mixed_workers, pins={"enter": cpu, "hidden.0": cpu, "leave": gpu})
    assert {stage.device for stage in step.plan.stages} == {gpu, cpu}


def test_compiled_model_on_gpu_workers(gpu_worker: Client) -> None:
    """Outputs and gradients reach the client, on the device of the user's own tensors."""
    torch.manual_seed(0)
    model, (x, _) = Net(), batches(1)[0]
    compiled = daggc.compile(copy.deepcopy(model), client=gpu_worker)
    result = compiled(x)
    result.sum().backward()
    wanted = model(x)
    wanted.sum().backward()
    close(result, wanted, 1e-4)
    for (name, got), want in zip(compiled.named_parameters(), model.parameters(), strict=True):
        assert got.grad is not None, name
        assert want.grad is not None, name
        close(got.grad, want.grad, 1e-3, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tensors_travel_between_gpu_workers(dtype: torch.dtype) -> None:
    with local_workers(2) as client:
        first, second = client.scheduler_info()["workers"]
        made = client.submit(_on_gpu, dtype, workers=[first], pure=False)
        received: Callable[..., Any] = client.submit(_total, made, workers=[second], pure=False).result
        assert received(timeout=60) == 6.0


def _on_gpu(dtype: torch.dtype) -> torch.Tensor:
    import daggc.backend.serializers  # noqa: F401  # how tensors travel

    return torch.tensor([1.0, 2.0, 3.0], dtype=dtype, device="cuda")


def _total(tensor: torch.Tensor) -> float:
    return tensor.double().sum().item()
