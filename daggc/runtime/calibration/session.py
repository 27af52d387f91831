"""One calibration of a pool, from what is known of its workers to its cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import combinations, zip_longest
from statistics import median
from typing import Any

from daggc.errors import PlanError
from daggc.plan.cost import Costs
from daggc.plan.device import Cluster, Device, Link
from daggc.runtime.calibration.cache import read_entry, write_entry
from daggc.runtime.calibration.direct import direct_link
from daggc.runtime.calibration.links import Meter, Overheads
from daggc.runtime.calibration.measure import (
    ROUNDS,
    Environment,
    argument_seconds,
    class_totals,
    environment,
    on_workers,
    own_cores,
    pace,
    suite_times,
)
from daggc.runtime.calibration.rows import bandwidth_of, curves_of, rates_of
from daggc.runtime.calibration.suite import PART, suite
from daggc.runtime.pool import Pool

_PART_ROUNDS = 3
_SLOWER = 1.3  # times as long as its like takes a worker that is then measured by itself
_STARVED = 1.3  # times as long as another takes a worker that has no core of its own
_AGAIN = 3  # times that it is looked at again, alone, before it counts as such
_MOST_PAIRS = 6  # of devices, whose links are measured one by one
_MEASURED = ("flops", "bandwidth", "launch", "overhead", "hop", "argument", "handling", "curves")  # fields of a device
_RANGE = (1e-13, 1e18)  # of numbers that are believed

Totals = Mapping[str, float]  # op class -> seconds


@dataclass(frozen=True)
class Shared:
    """What is measured between devices.

    Attributes:
        slowdown: by host and op class; see :class:`~daggc.plan.device.Device`.
        links: by pair of devices.
    """

    slowdown: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)

    def connect(self, cluster: Cluster) -> Cluster:
        """The cluster with these links, and with the typical one within hosts, and between them, for other pairs."""
        devices = tuple(
            replace(device, slowdown=self.slowdown.get(device.host, {}) if device.kind == "cpu" else {})
            for device in cluster.devices
        )
        within, across = [], []
        for (source, target), link in self.links.items():
            near = cluster.device(source).host == cluster.device(target).host
            (within if near else across).append(link)
        return replace(
            cluster,
            devices=devices,
            links=dict(self.links),
            link=_typical(across or within) or cluster.link,
            link_within_host=_typical(within) or cluster.link_within_host,
        )

    def to_json(self) -> dict[str, Any]:
        links = [[*pair, *astuple(link)] for pair, link in sorted(self.links.items())]
        return {"slowdown": {host: dict(own) for host, own in self.slowdown.items()}, "links": links}

    @staticmethod
    def from_json(data: Any, names: tuple[str, ...]) -> Shared | None:
        """What :meth:`to_json` gave; None if it is anything else."""
        try:
            links = {(source, target): _sound_link(link) for source, target, *link in data["links"]}
            slowdown = {
                str(host): {str(name): _sound(value) for name, value in own.items()}
                for host, own in data["slowdown"].items()
            }
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        return Shared(slowdown, links) if {name for pair in links for name in pair} <= set(names) else None


class Session:
    """Measures a pool; see :func:`daggc.runtime.calibrate.calibrated`."""

    def __init__(self, pool: Pool, seconds: float, threads: int, fresh: bool) -> None:
        self.pool, self.seconds, self.threads, self.fresh = pool, seconds, threads, fresh
        self.names = pool.cluster.names
        kinds = on_workers(pool, self.names, environment, threads)
        self.kinds: dict[str, Environment] = dict(zip(self.names, kinds, strict=True))
        self.plain = {
            device.name: replace(device, host=own["host"], threads=0 if device.kind == "cuda" else own["threads"])
            for device, own in zip(pool.cluster.devices, kinds, strict=True)
        }

    def cluster(self, measure: bool) -> Cluster:
        """The pool's cluster; without ``measure``, of what is known."""
        devices = self.known_devices()
        shared = self.known_shared()
        if measure:
            with Meter(self.pool) as meter:
                self.complete(devices, meter)
                together = self.together()
                self.correct(devices, together, meter)
                self.slow_down(devices)
                if shared is None:
                    shared = Shared(self.slowdowns(together), self.links(devices, meter))
                    write_entry("links", self.setting, shared.to_json())
        final = tuple(devices.get(name, device) for name, device in self.plain.items())
        cores = self.cores()
        return (shared or Shared()).connect(replace(self.pool.cluster, devices=final, cores=cores))

    @property
    def setting(self) -> list[Any]:
        """What is between the devices depends on all of them."""
        return [[name, kind] for name, kind in self.kinds.items()]

    # --- devices ------------------------------------------------------------------------------------------

    def known_devices(self) -> dict[str, Device]:
        """Devices whose kind was measured before."""
        entries = {name: None if self.fresh else read_entry("device", self.kinds[name]) for name in self.names}
        made = {name: restored(self.plain[name], entry) for name, entry in entries.items()}
        return {name: device for name, device in made.items() if device is not None}

    def complete(self, devices: dict[str, Device], meter: Meter) -> None:
        """Measure the first device of each kind that is not known; the others of its kind are like it."""
        for name, plain in self.plain.items():
            if name not in devices:
                like = next((other for other in devices if self.kinds[other] == self.kinds[name]), None)
                if like is None:
                    devices[name] = self.measured(plain, meter)
                    write_entry("device", self.kinds[name], kept(devices[name]))
                else:
                    devices[name] = restored(plain, kept(devices[like])) or plain

    def measured(self, device: Device, meter: Meter) -> Device:
        """A device, alone."""
        (times,) = on_workers(self.pool, [device.name], suite_times, self.seconds, ROUNDS, self.threads)
        curves = curves_of((g, own.seconds) for g, own in zip(suite(device.kind), times, strict=True) if own.seconds)
        (argument,) = on_workers(self.pool, [device.name], argument_seconds)
        own = meter.overheads(device.name)
        return replace(
            device,
            curves=curves,
            flops={**device.flops, **rates_of(curves, device.flops)},
            bandwidth=bandwidth_of(curves),
            launch=min(seconds for _, _, seconds in curves["elementwise"].rows),
            overhead=own.overhead,
            hop=own.hop,
            argument=argument,
            handling=meter.handling(device.name),
        )

    def together(self) -> dict[str, Totals]:
        """For each device, seconds by op class of a part of the suite while all others run it too."""
        return self.parts(self.names)

    def parts(self, names: Sequence[str]) -> dict[str, Totals]:
        """Seconds by op class of a part of the suite, run by these devices at once."""
        graphs = [suite("cpu")[place] for place in PART]
        times = on_workers(self.pool, names, suite_times, self.seconds, _PART_ROUNDS, self.threads, PART)
        return {name: class_totals(graphs, own) for name, own in zip(names, times, strict=True)}

    def correct(self, devices: dict[str, Device], together: Mapping[str, Totals], meter: Meter) -> None:
        """Measure by themselves the devices that take much longer than others of their kind, and than was known."""
        for name, own in together.items():
            usual = sum(expected(devices[name]).values())
            alike = min(sum(together[other].values()) for other in self.names if self.kinds[other] == self.kinds[name])
            if sum(own.values()) > _SLOWER * max(usual, alike):
                devices[name] = self.measured(self.plain[name], meter)

    def slow_down(self, devices: dict[str, Device]) -> None:
        """Devices that get less of a core than another while all compute take longer by as much.

        Rates are measured by the time that a thread has a core: what else runs on a host for a while is not to be kept
        as its rates. So a worker that always shares its core would not be seen. This is of these workers, and not kept.
        """
        paces: dict[str, float] = {}
        for names in self.waves():
            paces.update(zip(names, on_workers(self.pool, names, pace, self.threads), strict=True))
        usual = min(paces.values())
        for name in paces:
            for _ in range(_AGAIN):  # what was there for a moment only does not count
                if paces[name] > _STARVED * usual:
                    (alone,) = on_workers(self.pool, [name], pace, self.threads)
                    paces[name] = min(paces[name], alone)
        for name, own in paces.items():
            if own > _STARVED * usual:
                devices[name] = slower(devices[name], own / usual)

    def waves(self) -> list[list[str]]:
        """The devices in groups that have a core for every thread: plans are simulated with the cores of each host."""
        cores, by_host = self.cores(), dict[str, list[str]]()
        for name, kind in self.kinds.items():
            by_host.setdefault(kind["host"], []).append(name)
        groups: list[list[list[str]]] = []
        for host, names in by_host.items():
            size = max(1, cores[host] // max(self.kinds[name]["threads"] for name in names))
            groups.append([names[start : start + size] for start in range(0, len(names), size)])
        return [[name for group in wave for name in group] for wave in zip_longest(*groups, fillvalue=[])]

    def cores(self) -> dict[str, int]:
        """Cores of each host that its workers may run on."""
        every = on_workers(self.pool, self.names, own_cores)
        found: dict[str, set[int]] = {}
        for kind, own in zip(self.kinds.values(), every, strict=True):
            found.setdefault(kind["host"], set()).update(own)
        return {kind["host"]: len(found[kind["host"]]) or kind["cores"] for kind in self.kinds.values()}

    # --- between devices ----------------------------------------------------------------------------------

    def known_shared(self) -> Shared | None:
        """What was measured between devices like these before."""
        return None if self.fresh else Shared.from_json(read_entry("links", self.setting), self.names)

    def slowdowns(self, together: Mapping[str, Totals]) -> dict[str, dict[str, float]]:
        """By host and op class, how many times as long ops took when all its devices computed; at least 1."""
        hosts = [kind["host"] for kind in self.kinds.values()]
        found: dict[str, dict[str, float]] = {}
        for host in {host: None for host in hosts if hosts.count(host) > 1}:
            name = self.names[hosts.index(host)]
            # In turns: what else the machine does meanwhile strikes both.
            alone, busy = [self.parts([name])[name]], [together[name], self.together()[name]]
            alone.append(self.parts([name])[name])
            ratios = {
                op_class: sum(own[op_class] for own in busy) / sum(own[op_class] for own in alone)
                for op_class in alone[0]
                if op_class != "view"
            }
            found[host] = {op_class: max(round(ratio, 3), 1.0) for op_class, ratio in sorted(ratios.items())}
        return found

    def links(self, devices: Mapping[str, Device], meter: Meter) -> dict[tuple[str, str], Link]:
        """Of every pair of devices, or of a few pairs of each kind where there are many."""
        pairs = list(combinations(self.names, 2))
        if len(pairs) > _MOST_PAIRS:
            by_hosts: dict[tuple[str, ...], tuple[str, str]] = {}
            for pair in pairs:
                by_hosts.setdefault(tuple(sorted(self.kinds[name]["host"] for name in pair)), pair)
            ordered = sorted(by_hosts.items(), key=lambda item: (item[0][0] != item[0][1], item[0]))
            pairs = [pair for _, pair in ordered[:_MOST_PAIRS]]
        found: dict[tuple[str, str], Link] = {}
        handled: dict[bool, tuple[float, float]] = {}  # by whether the devices are of one host
        for pair in pairs:
            near = self.kinds[pair[0]]["host"] == self.kinds[pair[1]]["host"]
            if near not in handled:
                handled[near] = meter.handling_between(*pair, devices[pair[0]].handling)
            own = Overheads(devices[pair[0]].overhead, devices[pair[0]].hop)
            found[pair] = Link(*meter.link(*pair, own), *handled[near], direct_link(self.pool, *pair))
        return found


def slower(device: Device, factor: float) -> Device:
    """A device on which everything takes ``factor`` times as long."""
    curves = {
        name: tuple((flops, nbytes, factor * seconds) for flops, nbytes, seconds in curve.rows)
        for name, curve in device.curves.items()
    }
    times = {name: factor * getattr(device, name) for name in ("launch", "overhead", "argument", "handling")}
    flops = {name: rate / factor for name, rate in device.flops.items()}
    return replace(device, curves=curves, flops=flops, bandwidth=device.bandwidth / factor, **times)


def expected(device: Device) -> dict[str, float]:
    """Seconds by op class that the part of the suite takes on a device alone, by its curves."""
    totals: dict[str, float] = {}
    for place in PART:
        costs = Costs.of(suite("cpu")[place].nodes)
        for kind, seconds in zip(costs.kinds, costs.seconds(replace(device, slowdown={})), strict=True):
            name = costs.names[kind].op_class
            totals[name] = totals.get(name, 0.0) + float(seconds)
    return totals


def kept(device: Device) -> dict[str, Any]:
    """What of a device was measured, as plain data."""
    data = device.to_json()
    return {name: data[name] for name in _MEASURED}


def restored(device: Device, entry: Any) -> Device | None:
    """A device with what :func:`kept` gave of one like it; None if that is not what the entry is."""
    if not isinstance(entry, Mapping) or set(entry) != set(_MEASURED):
        return None
    try:
        numbers = {
            name: _sound(entry[name], zero=True) for name in ("launch", "overhead", "hop", "argument", "handling")
        }
        flops = {str(name): _sound(rate) for name, rate in entry["flops"].items()}
        curves = {str(name): tuple(map(tuple, rows)) for name, rows in entry["curves"].items()}
        return replace(device, flops=flops, bandwidth=_sound(entry["bandwidth"]), curves=curves, **numbers)
    except (AttributeError, TypeError, ValueError, PlanError):
        return None


def _sound(value: Any, zero: bool = False) -> float:
    """A number that may be a rate or a time. Raises ValueError if it is none."""
    low, high = _RANGE
    if type(value) not in (int, float) or not (low <= value <= high or (zero and value == 0)):
        raise ValueError(f"not a rate or a time: {value!r}")
    return float(value)


def _sound_link(data: Sequence[Any]) -> Link:
    """A link of numbers that may be ones. Raises ValueError if they are not."""
    link = Link.from_json(data)
    for own in (link, link.direct or link):
        for value, zero in ((own.latency, False), (own.bandwidth, False), (own.handling, True), (own.copying, True)):
            _sound(value, zero)
    return link


def _typical(links: list[Link]) -> Link | None:
    """The median of each number."""
    if not links:
        return None
    direct = [link.direct for link in links if link.direct is not None]
    numbers = {
        name: median(getattr(link, name) for link in links) for name in ("latency", "bandwidth", "handling", "copying")
    }
    return Link(**numbers, direct=_typical(direct))
