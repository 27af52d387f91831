"""What is chosen where the user leaves it open: the fastest that fits, found with few simulations."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daggc.errors import PlanError
from daggc.plan.automatic import REMAT, SIMULATED, Choice, estimate, possible, take_best
from daggc.plan.device import Cluster, Link, cluster_of, cpu_device
from daggc.plan.schedule import SCHEDULES, schedule_named, stage_devices
from daggc.plan.schedule.replicas import replicated
from daggc.plan.simulate import simulate_schedule

FREE: dict[str, Any] = {"microbatches": "auto", "schedule": "auto", "replicas": "auto"}
MEMORY = 100.0


class Steps:
    """Steps that take and need what a seed says, less memory and more time the more frugal the choice is.

    Attributes:
        simulated: what was.
    """

    def __init__(self, seed: int, tightness: float) -> None:
        self.seed, self.tightness = seed, tightness
        self.simulated: list[Choice] = []

    def _draw(self, choice: Choice, what: str) -> float:
        return random.Random(f"{self.seed} {what} {choice}").random()

    def seconds(self, choice: Choice) -> float:
        plain = Choice(choice.microbatches, choice.schedule, choice.stages, choice.replicas, remat="none")
        slower = 1 + 0.3 * REMAT.index(choice.remat) + (2.0 / choice.in_flight if choice.in_flight else 0)
        return (1 + self._draw(plain, "time")) * slower

    def peak(self, choice: Choice) -> float:
        held = min(choice.in_flight or choice.microbatches, choice.microbatches)
        return (20 + 30 * held * self._draw(choice, "memory") / (1 + REMAT.index(choice.remat))) * self.tightness

    def estimate(self, choice: Choice) -> float:
        if choice.schedule == "gpipe" and choice.in_flight:
            raise PlanError("gpipe holds all")
        return self.seconds(choice) * (0.8 + 0.2 * self._draw(Choice(choice.microbatches), "estimate"))

    def simulate(self, choice: Choice) -> Any:
        self.simulated.append(choice)
        return SimpleNamespace(makespan=self.seconds(choice), peaks={"cpu:0": self.peak(choice)})

    def fits(self, choice: Choice) -> bool:
        return self.peak(choice) <= MEMORY


@given(st.integers(0, 10_000), st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.0, 5.1]), st.integers(1, 4))
def test_what_does_not_fit_is_never_chosen_and_what_fits_never_refused(seed: int, tightness: float, devices: int):
    steps = Steps(seed, tightness)
    cluster = cluster_of([cpu_device(index, MEMORY) for index in range(devices)])
    choices = possible(devices, 8, **FREE)
    listed = [one for one in choices if any(steps.fits(_with(one, remat=level)) for level in REMAT)]
    try:
        chosen, tried = take_best(choices, steps.estimate, steps.simulate, cluster)
    except PlanError as wrong:
        assert not listed and "bytes are short" in str(wrong)
        return
    assert steps.fits(chosen) and tried[0].choice == chosen and tried[0].reason == "chosen"
    assert len(tried) == len(choices)
    fitting = [one for one in steps.simulated if steps.fits(one)]
    assert len(fitting) <= SIMULATED and len(set(steps.simulated)) == len(steps.simulated)
    assert steps.seconds(chosen) == min(map(steps.seconds, fitting))
    if len(fitting) < SIMULATED:  # nothing that was left is faster: estimates are below the times
        rest = [_with(one, remat=level) for one in choices for level in REMAT]
        assert all(steps.seconds(one) >= steps.seconds(chosen) for one in rest if steps.fits(one))


def _with(choice: Choice, **changes: Any) -> Choice:
    return Choice(**{**vars(choice), **changes})


def test_fewer_in_flight_come_before_recomputation_where_they_cost_less():
    """1F1B of 4 devices holds 4 microbatches; 3 fit, and so does recomputing, which takes longer."""
    cluster = cluster_of([cpu_device(index, MEMORY) for index in range(4)])

    def simulate(choice: Choice) -> Any:
        held = 30.0 * (choice.in_flight or 4) / (1 + REMAT.index(choice.remat))
        return SimpleNamespace(makespan=estimated(choice), peaks={"cpu:0": held})

    def estimated(choice: Choice) -> float:
        return 1 + 0.3 * REMAT.index(choice.remat) + (0.1 if choice.in_flight else 0)

    chosen, _ = take_best([Choice(8)], estimated, simulate, cluster)
    assert (chosen.in_flight, chosen.remat) == (3, "none")
    assert str(chosen) == "8 microbatches, 1f1b, at most 3 in flight"


def test_the_choices_there_are():
    every = possible(2, 8, **FREE)
    assert {one.schedule for one in every} == {"1f1b", "gpipe", "zb-h1", "zb-h2", "zb-2p", "interleaved", "zb-v"}
    assert all((one.chunks == 2) == (one.schedule in ("interleaved", "zb-v")) for one in every)
    assert Choice(4, "zb-v", chunks=2).turns(2) == (0, 1, 1, 0)
    assert Choice(4, "interleaved", chunks=2).turns(2) == (0, 1, 0, 1)
    assert Choice(4, "zb-v", stages=4).turns(2) == (0, 1, 1, 0)
    assert Choice(4, "1f1b", stages=4).turns(2) is None
    assert {one.replicas for one in possible(3, 8, **FREE)} == {1, 2, 3}
    assert {one.microbatches for one in possible(3, 8, **FREE) if one.replicas == 3} == {3, 6}
    fixed = possible(2, 8, microbatches=4, schedule="zb-v", replicas=1)
    assert [one.chunks for one in fixed] == [2, 1]  # one stage a device where two cannot be had
    assert len(possible(1, 8, **FREE)) == 3  # on one device there is one order


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("replicas", [1, 2])
def test_an_estimate_is_what_the_schedule_takes_unless_the_cores_of_the_host_take_longer(name: str, replicas: int):
    devices = [(f"cpu:{2 * stage}", f"cpu:{2 * stage + 1}")[:replicas] for stage in range(2)]
    numbers = [[int(own.removeprefix("cpu:")) for own in stage] for stage in devices]
    numbers = [[own // (3 - replicas) for own in stage] for stage in numbers]
    seconds = {"forward": [1.0, 2.0], "backward": [2.0, 3.0], "weight_grad": [1.0, 1.0]}
    times = {"seconds": seconds, "transfer": {(0, 1): 0.1, (1, 0): 0.1}}
    schedule = replicated(schedule_named(name), numbers, 4, split_backward=True, **times)
    cluster = Cluster(tuple(cpu_device(index) for index in range(4)), Link())
    ideal = estimate(schedule, times, devices, cluster)
    assert ideal == simulate_schedule(schedule, seconds, times["transfer"]).makespan
    assert 4 * 6 / replicas <= ideal <= 40
    hosted = tuple(SimpleNamespace(**{**vars(one), "host": "h"}) for one in cluster.devices)
    crowded = SimpleNamespace(devices=hosted, device=lambda name: hosted[int(name[4:])], cores={"h": 1})
    assert estimate(schedule, times, devices, crowded) == pytest.approx(40)  # pyright: ignore[reportArgumentType]


def test_a_v_goes_down_the_devices_and_back():
    assert stage_devices("zb-v", 6, 3) == (0, 1, 2, 2, 1, 0)
    assert stage_devices("interleaved", 6, 3) == (0, 1, 2, 0, 1, 2)
