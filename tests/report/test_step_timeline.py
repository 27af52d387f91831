"""Timelines of a training step: every task of the step, predicted and measured."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

import daggc
from daggc.plan.device import cluster_of, cpu_device
from daggc.report.step_timeline import measured_spans, predict, predicted_spans, step_timeline


def test_tasks_of_a_step() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    made = daggc.compile(model).train_step(nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
    made(torch.randn(4, 4), torch.randn(4, 2))
    assert made.step_program is not None
    step, cluster = made.step_program.step, cluster_of([cpu_device(0)])
    names = [node.attrs["task"] for node in step.graph.nodes if node.op == "call"]
    spans = predicted_spans(predict(step, cluster))
    assert [span.name for span in spans] == names
    assert {span.phase for span in spans} >= {"forward_backward", "update"}
    assert {span.device for span in spans} == {"cpu:0"}
    records = {"cpu:0": [SimpleNamespace(name="FB0.0", microbatch=0, start=5.0, end=6.0)]}
    (measured,) = measured_spans(step, records)  # pyright: ignore[reportArgumentType]  # looks like a Record
    assert (measured.phase, measured.microbatch, measured.end) == ("forward_backward", 0, 6.0)
    assert "predicted makespan" in step_timeline(step, cluster, records)  # pyright: ignore[reportArgumentType]
