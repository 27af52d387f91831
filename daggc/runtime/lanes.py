"""A lane on its worker: one device's part of a step, run in one go; see :mod:`daggc.backend.lanes`.

The task of a lane leaves its slot among Dask's tasks at once, and waits, on the event loop, until the state has the
version that it reads. It runs in a thread of its own, and holds the process's lock while it computes but not while it
waits for a peer: lanes of two trainings on the same workers cannot block each other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import torch
from distributed import get_worker
from distributed.worker_state_machine import SecedeEvent

from daggc.backend.dask_graph import COMMITTED
from daggc.backend.lanes import Action, Lane, LaneCall, Receive, Send, lane_of
from daggc.backend.local import in_turn, run_graph
from daggc.backend.serializers import laid_out
from daggc.errors import RunError
from daggc.ir.graph import Node, Program
from daggc.plan.messages import Message
from daggc.runtime import store
from daggc.runtime.channel import Channel, channel
from daggc.runtime.devices import own_device
from daggc.runtime.worker import Context, argument, computing, program_of, ran, set_threads

_LOOK = 1.0  # seconds between looks whether a lane that waits is still wanted
# Kept from step to step: a thread has torch's own threads and glibc's heap. At most so many trainings share a worker.
_THREADS = ThreadPoolExecutor(64, thread_name_prefix="daggc-lane")

Tensors = Mapping[str, torch.Tensor]
Values = Sequence[torch.Tensor]


async def run_lane(call: LaneCall, context: Context, *dependencies: Any) -> dict[str, torch.Tensor]:
    """The entry point of lanes: run one, once; returns the outputs of the step that it makes, by ref."""
    worker = get_worker()
    worker.handle_stimulus(SecedeEvent(key=call.key, compute_duration=0.0, stimulus_id=f"lane-{time.time()}"))
    wanted = partial(_require_wanted, worker, call.key)
    state = store.get(context.store)
    await _turn(state, context.version, wanted)
    peers = channel() if len(call.addresses) > 1 else None
    run = LaneRun(call, context, dependencies, peers, wanted)
    return dict(await asyncio.get_running_loop().run_in_executor(_THREADS, run, state))


async def _turn(state: store.Store, version: int, wanted: Callable[[], None]) -> None:
    """Wait until the state has a version."""
    loop = asyncio.get_running_loop()
    while state.version < version and not state.poisoned:
        changed = asyncio.Event()
        state.tell(partial(loop.call_soon_threadsafe, changed.set))
        if state.version < version and not state.poisoned:
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), _LOOK)
            wanted()


def _require_wanted(worker: Any, key: str) -> None:
    """Raise RunError where nobody waits for a task any more: its step failed elsewhere, or its client is gone."""
    task = worker.state.tasks.get(key)
    if task is None or task.state not in ("executing", "long-running"):
        raise RunError("the step was given up")


@lru_cache(maxsize=64)
def _lane(key: str, graph: str, device: str) -> Lane:
    return lane_of(program_of(key)[graph], device)


class LaneRun:
    """One run of a lane.

    Args:
        channel: to its peers; None if it has none.
        wanted: raises where nobody waits for the lane any more.
    """

    def __init__(
        self,
        call: LaneCall,
        context: Context,
        dependencies: Sequence[Any],
        channel: Channel | None,
        wanted: Callable[[], None],
    ) -> None:
        self.call, self.context, self.dependencies, self.wanted = call, context, dependencies, wanted
        self.program: Program = program_of(call.program)
        self.lane = _lane(call.program, call.graph, call.device)
        self.device = own_device()
        self.channel = channel
        self.given: Tensors = {}

    def __call__(self, state: store.Store) -> Tensors:
        """Make the state's next version, and give the outputs by ref; on failure, the peers are told, and fail too."""
        set_threads(self.context.threads)
        try:
            results = state.step(self.context.version, self.before, self.updates)
        except BaseException as wrong:
            if self.channel is not None:
                peers = [self.call.addresses[peer] for peer in self.lane.peers]
                self.channel.abort(self.call.run, f"{self.call.device} failed: {type(wrong).__name__}: {wrong}", peers)
            raise
        if self.channel is not None:
            self.channel.end(self.call.run)
        return results

    def before(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Do all that changes nothing, until all peers have come as far; gives what updates and outputs need."""
        self.given = tensors
        values = {
            name: tensors[ref] if ref in tensors else self.argument(ref) for name, ref in self.lane.inputs.items()
        }
        last = {value.name for node in self.lane.updates for value in node.inputs}
        steps = [(action, *_reads_and_makes(action)) for action in self.lane.before]
        in_turn(steps, values, last | {port.value.name for port in self.lane.outputs}, self.act)
        self.meet()
        return values

    def argument(self, ref: str) -> torch.Tensor:
        return argument(self.call.arguments[ref], self.context, self.dependencies, self.device)

    def updates(self, values: dict[str, torch.Tensor]) -> tuple[Tensors, Tensors]:
        """The new state, and what the step gives; parameters are written in place where no other value is there."""
        resident = {name for name, ref in self.lane.inputs.items() if ref.startswith("param:")}
        memory = {tensor.untyped_storage().data_ptr() for tensor in self.given.values()}
        for name, tensor in values.items():  # such as a gradient that is the parameter itself
            if name not in self.lane.inputs and tensor.untyped_storage().data_ptr() in memory:
                values[name] = tensor.clone()
        steps = [(node, *_reads_and_makes(node)) for node in self.lane.updates]
        in_turn(steps, values, {port.value.name for port in self.lane.outputs}, partial(self.act, owned=resident))
        found = {port.ref: values[port.value.name] for port in self.lane.outputs}
        return {port.ref: found.pop(port.ref) for port in self.lane.outputs if port.kind in COMMITTED}, found

    def act(self, action: Action, arguments: Values, last: Collection[str], owned: Collection[str] = ()) -> Values:
        if isinstance(action, Send):
            self.send(action.message, arguments)
            return ()
        if isinstance(action, Receive):
            return self.receive(action.message)
        return self.compute(
            action, arguments, [at for at, v in enumerate(action.inputs) if v.name in last and v.name in owned]
        )

    def compute(self, node: Node, arguments: Values, donated: Sequence[int]) -> Values:
        with computing:
            start = time.time()
            results = run_graph(self.program, self.program[str(node.attrs["callee"])], arguments, self.device, donated)
            ran(node, start)
        return results

    def send(self, message: Message, tensors: Values) -> None:
        assert self.channel is not None, "a lane without peers sends nothing"
        # Laid out as in a graph of tasks: of other strides, kernels give other last bits.
        sent = [laid_out(tensor) for tensor in tensors]
        self.channel.send(self.call.run, self.call.addresses[message.target], message.tag, sent)

    def receive(self, message: Message) -> Values:
        assert self.channel is not None, "a lane without peers receives nothing"
        source = self.call.addresses[message.source]
        return [
            tensor.to(self.device) for tensor in self.channel.receive(self.call.run, message.tag, source, self.wanted)
        ]

    def meet(self) -> None:
        """Wait until all peers are here; after each round, a device knows of twice as many (dissemination barrier)."""
        devices = sorted((*self.lane.peers, self.lane.device))
        place, distance = devices.index(self.lane.device), 1
        while distance < len(devices):
            to, source = devices[(place + distance) % len(devices)], devices[place - distance]
            self.send(Message(f"meet {distance}", self.lane.device, to), ())
            self.receive(Message(f"meet {distance}", source, self.lane.device))
            distance *= 2


def _reads_and_makes(action: Action) -> tuple[list[str], list[str]]:
    """Names of the values that an action reads, and of those that it makes."""
    if isinstance(action, Send):
        return [made for made, _ in action.message.values], []
    if isinstance(action, Receive):
        return [], [read for _, read in action.message.values]
    return [value.name for value in action.inputs], [value.name for value in action.outputs]
