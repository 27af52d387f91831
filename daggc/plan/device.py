"""Devices and the links between them: what a plan is made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from daggc.errors import PlanError
from daggc.plan.curves import Curve

KINDS = ("cpu", "cuda")
_MAPS = ("flops", "curves", "profile", "slowdown")  # fields of a device that are mappings


@dataclass(frozen=True)
class Device:
    """A worker's CPU or GPU.

    Attributes:
        name: such as ``cpu:0``; unique in a cluster.
        kind: ``cpu`` or ``cuda``.
        flops: FLOP/s by op class (see :class:`daggc.ops.opdef.Cost`); a class that is absent has the rate of
            ``elementwise``.
        bandwidth: of its memory, bytes/s.
        memory: bytes.
        overhead: seconds that a task takes before and after its ops run (scheduling, bookkeeping).
        launch: seconds that an op takes however small it is.
        host: the machine it is on; devices of one host share its cores, if :attr:`Cluster.cores` counts them.
        threads: cores that it keeps busy while it computes; 0 for a GPU.
        curves: measured times by op (or op and dtype, as in ``matmul:f64``), or op class; where there is one it
            stands in place of the roofline. See :mod:`daggc.plan.curves`.
        profile: measured seconds of exact nodes, by :func:`daggc.plan.cost.node_key`; they come before all else.
        hop: seconds from the end of a task to the start of one on the same device that waited for it, beyond
            ``overhead``.
        handling: seconds of a core of the host that go into scheduling a task and telling of it, while the device may
            already compute the next one.
        argument: seconds that each input of a task takes to be fetched and checked before its ops run.
        slowdown: by op class, how many times as long ops take while the other devices of the host compute too: what
            their memory and caches are shared for. Times are predicted with it, for that is the usual state.
    """

    name: str
    kind: str
    flops: Mapping[str, float]
    bandwidth: float
    memory: float
    overhead: float = 1e-3
    launch: float = 5e-6
    host: str = ""
    threads: int = 1
    curves: Mapping[str, Curve] = field(default_factory=dict, repr=False)
    profile: Mapping[str, float] = field(default_factory=dict, repr=False)
    hop: float = 0.0
    slowdown: Mapping[str, float] = field(default_factory=dict)
    argument: float = 0.0
    handling: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(f"device {self.name!r}: a kind is one of {', '.join(KINDS)}, got {self.kind!r}")
        if "elementwise" not in self.flops:
            raise PlanError(f"device {self.name!r}: flops must name at least the op class 'elementwise'")
        if min(*self.flops.values(), self.bandwidth, self.memory) <= 0:
            raise PlanError(f"device {self.name!r}: rates and memory are positive")
        if min(self.overhead, self.launch, self.threads, self.hop, self.argument, self.handling) < 0:
            raise PlanError(f"device {self.name!r}: overheads and threads are not negative")
        if min(self.profile.values(), default=1.0) < 0 or min(self.slowdown.values(), default=1.0) <= 0:
            raise PlanError(f"device {self.name!r}: measured times are not negative, and factors positive")
        if not isinstance(self.curves, MappingProxyType):
            curves = {name: curve if isinstance(curve, Curve) else Curve(curve) for name, curve in self.curves.items()}
            object.__setattr__(self, "curves", curves)
        for name in _MAPS:  # copies of a device share them
            value = getattr(self, name)
            if not isinstance(value, MappingProxyType):
                object.__setattr__(self, name, MappingProxyType(dict(value)))

    def rate(self, op_class: str) -> float:
        """FLOP/s of an op class."""
        return self.flops.get(op_class, self.flops["elementwise"])

    def curve(self, op: str, dtype: str, op_class: str) -> Curve | None:
        """The curve of an op's kernel, of its dtype if there is one; else that of the op, else of its op class."""
        names = (f"{op}:{dtype}", op, op.partition(" ")[0], op_class)
        return next((self.curves[name] for name in names if name in self.curves), None)

    def __reduce__(self) -> tuple[type[Device], tuple[object, ...]]:
        return Device, tuple(self.to_json().values())

    def to_json(self) -> dict[str, object]:
        """Plain data; ``Device(**data)`` makes it again."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        curves = {name: [list(row) for row in curve.rows] for name, curve in self.curves.items()}
        return {**plain, **{name: dict(getattr(self, name)) for name in _MAPS}, "curves": curves}


@dataclass(frozen=True)
class Link:
    """Between two devices.

    Attributes:
        latency: seconds before the first byte.
        bandwidth: bytes/s.
        handling: seconds of a core that a message takes at each end, on hosts whose cores are counted.
        copying: the same for each byte of it.
        direct: what messages take that workers send each other in lanes (:mod:`daggc.backend.lanes`); None if it is
            the same.
    """

    latency: float = 1e-3
    bandwidth: float = 1e9
    handling: float = 0.0
    copying: float = 0.0
    direct: Link | None = None

    @staticmethod
    def from_json(data: Sequence[Any]) -> Link:
        """The link that ``astuple`` gave as plain data; fields at its end may be left out."""
        numbers, direct = data[:4], data[4] if len(data) > 4 else None
        return Link(*numbers, direct=direct and Link.from_json(direct))

    def seconds(self, nbytes: float) -> float:
        """Time of one transfer; none for nothing."""
        return self.latency + nbytes / self.bandwidth if nbytes else 0.0


@dataclass(frozen=True)
class Cluster:
    """Devices in the order in which stages are laid on them, and the links between them.

    Attributes:
        link: between any two devices that ``links`` does not name.
        link_within_host: between two of one host that ``links`` does not name; by default ``link``.
        links: by pair of names, the same both ways.
        cores: by host: how many cores its devices, and the links that end there, share; a host that is not named
            has enough for all.
    """

    devices: tuple[Device, ...]
    link: Link = Link()
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    cores: Mapping[str, int] = field(default_factory=dict)
    link_within_host: Link | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", tuple(self.devices))
        if not self.devices:
            raise PlanError("a plan needs at least one device")
        names = [device.name for device in self.devices]
        if len(self._by_name) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise PlanError(f"two devices are named {twice!r}")
        for name in (name for pair in self.links for name in pair):
            self.device(name)

    @cached_property
    def _by_name(self) -> dict[str, Device]:
        return {device.name: device for device in self.devices}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(device.name for device in self.devices)

    def device(self, name: str) -> Device:
        """Raises PlanError naming the devices there are."""
        if name not in self._by_name:
            raise PlanError(f"there is no device {name!r}; there are {', '.join(self.names)}")
        return self._by_name[name]

    def between(self, source: str, target: str) -> Link:
        """The link between two devices; a free one from a device to itself."""
        if source == target:
            return Link(0.0, float("inf"))
        named = self.links.get((source, target)) or self.links.get((target, source))
        if named is None and self.link_within_host is not None:
            host = self.device(source).host
            named = self.link_within_host if host and host == self.device(target).host else None
        return named or self.link

    def part(self, names: Sequence[str]) -> Cluster:
        """Some of the devices, in this order, and the links between them."""
        links = {pair: link for pair, link in self.links.items() if set(pair) <= set(names)}
        return replace(self, devices=tuple(self.device(name) for name in names), links=links)

    def to_json(self) -> dict[str, object]:
        """Plain data; :meth:`from_json` makes it a cluster again."""
        within = self.link_within_host
        return {
            "devices": [device.to_json() for device in self.devices],
            "link": astuple(self.link),
            "links": [[*pair, *astuple(link)] for pair, link in sorted(self.links.items())],
            "cores": dict(self.cores),
            "link_within_host": within and astuple(within),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Cluster:
        """The cluster that :meth:`to_json` gave as plain data."""
        within = data.get("link_within_host")
        return Cluster(
            tuple(Device(**device) for device in data["devices"]),
            Link.from_json(data["link"]),
            {(source, target): Link.from_json(link) for source, target, *link in data["links"]},
            dict(data["cores"]),
            within and Link.from_json(within),
        )


_CPU = {"gemm": 6e10, "conv": 4e10, "attention": 2e10, "reduction": 2e9, "elementwise": 4e9, "opaque": 4e9}
_GPU = {"gemm": 2e13, "conv": 1.5e13, "attention": 1e13, "reduction": 5e11, "elementwise": 2e12, "opaque": 5e11}


def cpu_device(index: int = 0, memory: float = 8e9) -> Device:
    """``cpu:index``: one worker with a core of an ordinary server, numbers in f32."""
    return Device(f"cpu:{index}", "cpu", _CPU, 1e10, memory, overhead=1e-3, launch=5e-6)


def gpu_device(index: int = 0, memory: float = 16e9) -> Device:
    """``gpu:index``: an ordinary data-centre GPU, numbers in f32."""
    return Device(f"gpu:{index}", "cuda", _GPU, 8e11, memory, overhead=1e-3, launch=1e-5, threads=0)


def cluster_of(devices: Sequence[Device], link: Link | None = None) -> Cluster:
    """A cluster with one kind of link between all."""
    return Cluster(tuple(devices), link or Link())
