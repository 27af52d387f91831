"""What of a run's inputs goes inside the graph, what straight to its worker, and what is sent again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import Client
from torch import nn
from training import adamw, assert_equal_numbers, eagerly, stepwise

import daggc
from daggc.backend.dask_graph import Emission
from daggc.runtime.pool import Pool, pool_of
from daggc.runtime.shipping import Shipments, add_inputs

pytestmark = pytest.mark.timeout(120)

LARGE = 1 << 18  # elements


def small_and_large() -> list[tuple[str, torch.Tensor, str]]:
    return [
        ("daggc.in-a", torch.arange(4.0), "cpu:0"),
        ("daggc.in-b", torch.arange(float(LARGE)), "cpu:0"),
        ("daggc.in-c", torch.arange(1000.0), "cpu:1"),
        ("daggc.in-d", torch.arange(float(LARGE)).to(torch.bfloat16).view(-1, 4).t(), "cpu:1"),
    ]


def test_what_is_much_goes_straight_to_its_worker(two_workers: Client) -> None:
    pool = pool_of(two_workers)
    assert pool.direct
    for way in (True, False):  # workers that this process cannot reach get it through the scheduler
        data = Emission()
        inputs = [(f"{key}-{way}", tensor, device) for key, tensor, device in small_and_large()]
        futures = add_inputs(data, Pool(pool.client, pool.facts, pool.cluster, way), inputs)
        assert sorted(data.tasks) == [f"daggc.in-a-{way}", f"daggc.in-c-{way}"]
        found = {str(future.key): future for future in futures}
        places: Any = two_workers.who_has(futures)
        for key, tensor, device in inputs:
            if key in found:
                assert list(places[key]) == [pool.addresses[device]]
                assert torch.equal(pool.gather([found[key]])[0], tensor)


def test_in_this_process_all_is_in_the_graph_as_it_is_now() -> None:
    data = Emission()
    inputs = small_and_large()
    assert add_inputs(data, None, inputs) == []
    wanted = [tensor.clone() for _, tensor, _ in inputs]
    for _, tensor, _ in inputs:
        tensor.zero_()
    values: list[Any] = [data.tasks[key] for key, _, _ in inputs]
    assert all(torch.equal(node.value, tensor) for node, tensor in zip(values, wanted, strict=True))


def test_tensors_are_known_by_themselves_and_only_while_they_live(two_workers: Client) -> None:
    pool, shipments = pool_of(two_workers), Shipments()
    one, other = torch.zeros(3), torch.ones(3)
    first, _ = shipments.place(pool, "cpu:0", {"param:x": one, "param:y": other})
    again, _ = shipments.place(pool, "cpu:0", {"param:other_name": one})
    assert again["param:other_name"] == first["param:x"]
    replaced, _ = shipments.place(pool, "cpu:0", {"param:x": other.clone(), "param:y": other})
    assert replaced["param:y"] == first["param:y"]
    assert replaced["param:x"] not in first.values()
    other.data.add_(1)  # not seen by its version
    changed, futures = shipments.place(pool, "cpu:0", {"param:x": one, "param:y": other})
    assert changed["param:x"] == first["param:x"]
    assert changed["param:y"] != first["param:y"]
    (value,) = [value for value in pool.gather(futures) if "param:x" not in value]
    assert torch.equal(value["param:y"], torch.full((3,), 2.0))


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(20_000, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def test_steps_and_calls_on_large_batches(two_workers: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler is sent next to nothing of them, and the numbers are the same."""
    sent: list[int] = []
    submit = Pool.submit

    def watched(self: Pool, emission: Emission, keys: Any) -> Any:
        values = [getattr(task, "value", None) for task in emission.tasks.values()]
        sent.append(sum(value.nbytes for value in values if isinstance(value, torch.Tensor)))
        return submit(self, emission, keys)

    monkeypatch.setattr(Pool, "submit", watched)
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(9, 2, 10_000, generator=generator).double(), torch.randint(3, (9,), generator=generator))
        for _ in range(4)
    ]

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    got, step = stepwise(wide(), F.cross_entropy, adamw, batches, client=two_workers, microbatches=2, stages=2)
    step.close()
    assert_equal_numbers(got, eagerly(wide(), loss, adamw, batches))

    model, eager = wide(), wide()
    x = batches[0][0].clone().requires_grad_()
    expected = torch.autograd.grad(eager(x).sum(), [x, *eager.parameters()])
    result = daggc.compile(model, client=two_workers)(x).sum()
    gradients = torch.autograd.grad(result, [x, *model.parameters()])
    assert all(torch.allclose(mine, theirs, rtol=1e-10) for mine, theirs in zip(gradients, expected, strict=True))
    assert max(sent) < 1 << 14
