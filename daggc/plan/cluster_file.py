"""``cluster.toml``: devices, hosts and links in a file that people write.

    [[devices]]                   # one or more tables, in the order in which stages are laid on them
    kind = "cuda"                 # cpu or cuda
    count = 1024                  # gpu:0, gpu:1, ...; 1 if it is left out
    per_host = 8                  # gpu:0 to gpu:7 are on host-0, and so on; all on one host if it is left out
    memory = 80e9                 # bytes
    bandwidth = 2.0e12            # of its memory, bytes/s
    flops = { gemm = 3.12e14, attention = 1.5e14, elementwise = 1e13 }   # FLOP/s by op class

    [hosts]
    cores = 64                    # of each host: what its devices' threads share; enough for all if left out

    [links]
    within_host = { latency = 5e-6, bandwidth = 3e11 }     # seconds, bytes/s
    between_hosts = { latency = 1e-5, bandwidth = 2.5e10 }

    [[links.pairs]]               # exceptions
    between = ["gpu:0", "gpu:1"]
    bandwidth = 6e11

Further keys of a device are those of :class:`daggc.plan.device.Device` (``overhead``, ``launch``, ``threads``, ...),
``name`` (``gpu:`` and ``cpu:`` are followed by numbers that go on from table to table; ``name = "a100"`` makes them
``a100:0``, ...) and ``host`` (``host = "node"``: ``node-0``, ``node-1``, ...). What is left out is what
:func:`~daggc.plan.device.cpu_device` and ``gpu_device`` say.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from daggc.errors import PlanError
from daggc.plan.device import KINDS, Cluster, Device, Link, cpu_device, gpu_device

_OWN = ("kind", "count", "per_host", "name", "host")
_PASSED = tuple(field.name for field in fields(Device) if field.name not in _OWN)
_COUNTS = ("count", "per_host", "threads")
_LINK = ("latency", "bandwidth")


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster from a ``.toml`` file, or from a ``.json`` file of what :meth:`Cluster.to_json` gives.

    Raises:
        PlanError: the file is not there or not well formed, or says what no cluster can be; with the line and key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as wrong:
        raise PlanError(f"{path}: a cluster file cannot be read: {wrong}") from wrong
    if path.suffix != ".json":
        return read_cluster(text, str(path))
    try:
        return Cluster.from_json(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as wrong:
        raise PlanError(f"{path}: not a cluster as JSON: {type(wrong).__name__}: {wrong}") from wrong


def read_cluster(text: str, path: str = "cluster.toml") -> Cluster:
    """The cluster that a TOML text describes; see the module's docstring.

    Args:
        path: named in errors.

    Raises:
        PlanError: see :func:`load_cluster`.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as wrong:
        raise PlanError(f"{path}: not TOML: {wrong}") from wrong
    return _Reader(text, path).cluster(data)


@dataclass(frozen=True)
class _Reader:
    """Reads tables of one file; errors name the line of a key."""

    text: str
    path: str

    def fail(self, table: str, key: str, message: str, number: int = 0) -> NoReturn:
        """Raise, naming the ``number``-th table of that name and the key in it."""
        line = _line_of(self.text, table, number, key)
        place = f"{self.path}:{line}" if line else self.path
        name = f"{table}[{number}]" if f"[[{table}]]" in self.text else table
        raise PlanError(f"{place}: {'.'.join(filter(None, (name, key)))}: {message}")

    def keys(self, given: Any, known: Sequence[str], table: str, number: int = 0) -> Mapping[str, Any]:
        if not isinstance(given, dict):
            self.fail(table, "", f"expected a table, got {given!r}", number)
        for key in given:
            if key not in known:
                self.fail(table, key, f"not a key that is known; there are {', '.join(known)}", number)
        return given

    def positive(
        self, value: Any, table: str, key: str, number: int = 0, *, whole: bool = False, zero: bool = False
    ) -> Any:
        """A number above 0 (or 0, with ``zero``)."""
        kinds = (int,) if whole else (int, float)
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        if not fits or not (value > 0 or (zero and value == 0)):
            what = f"{'an integer' if whole else 'a number'} {'of at least' if zero else 'above'} 0"
            self.fail(table, key, f"expected {what}, got {value!r}", number)
        return value

    def cluster(self, data: Mapping[str, Any]) -> Cluster:
        self.keys(data, ("devices", "hosts", "links"), "")
        tables = data.get("devices")
        if not isinstance(tables, list) or not tables:
            self.fail("", "devices", "expected at least one [[devices]] table")
        devices: list[Device] = []
        used: dict[str, int] = {}
        hosts = 0
        for number, table in enumerate(tables):
            own = self.devices(table, number, used, hosts)
            hosts += len({device.host for device in own})
            devices += own
        names = {device.name for device in devices}
        links = self.keys(data.get("links", {}), ("within_host", "between_hosts", "pairs"), "links")
        between = self.link(links.get("between_hosts", {}), "links", "between_hosts")
        within = self.link(links["within_host"], "links", "within_host") if "within_host" in links else None
        pairs: dict[tuple[str, str], Link] = {}
        for number, table in enumerate(links.get("pairs", ())):
            self.keys(table, ("between", *_LINK), "links.pairs", number)
            ends = table.get("between")
            if not isinstance(ends, list) or len(ends) != 2 or not all(isinstance(end, str) for end in ends):
                self.fail("links.pairs", "between", f"expected two names of devices, got {ends!r}", number)
            for end in ends:
                if end not in names:
                    self.fail("links.pairs", "between", f"there is no device {end!r}", number)
            numbers = {
                key: self.positive(table[key], "links.pairs", key, number, zero=key == "latency")
                for key in _LINK
                if key in table
            }
            pairs[ends[0], ends[1]] = replace(between, **numbers)
        cores = self.cores(self.keys(data.get("hosts", {}), ("cores",), "hosts"), devices)
        try:
            return Cluster(tuple(devices), between, pairs, cores, within)
        except PlanError as wrong:
            raise PlanError(f"{self.path}: {wrong}") from wrong

    def devices(self, table: Any, number: int, used: dict[str, int], hosts: int) -> list[Device]:
        """The devices of one table. ``used``: for each name, how many have it already; ``hosts``: hosts so far."""
        self.keys(table, (*_OWN, *_PASSED), "devices", number)
        kind = table.get("kind")
        if kind not in KINDS:
            self.fail("devices", "kind", f"expected one of {', '.join(KINDS)}, got {kind!r}", number)
        for key in ("name", "host"):
            if not isinstance(table.get(key, ""), str):
                self.fail("devices", key, f"expected a text, got {table[key]!r}", number)
        for key, value in table.items():
            if key in (*_COUNTS, "memory", "bandwidth", "overhead", "launch"):
                whole, zero = key in _COUNTS, key in ("threads", "overhead", "launch")
                self.positive(value, "devices", key, number, whole=whole, zero=zero)
        self.flops(table.get("flops", {"elementwise": 1.0}), number)
        count = table.get("count", 1)
        per_host = table.get("per_host", count)
        prefix = table.get("name", "gpu" if kind == "cuda" else "cpu")
        first = used.get(prefix, 0)
        used[prefix] = first + count
        passed = {key: table[key] for key in _PASSED if key in table}
        try:
            model = replace((gpu_device if kind == "cuda" else cpu_device)(), **passed)
        except (PlanError, TypeError, ValueError) as wrong:
            self.fail("devices", "", str(wrong), number)
        first_host = 0 if "host" in table else hosts
        host = table.get("host", "host")
        return [
            replace(model, name=f"{prefix}:{first + index}", host=f"{host}-{first_host + index // per_host}")
            for index in range(count)
        ]

    def flops(self, rates: Any, number: int) -> None:
        if not isinstance(rates, dict) or "elementwise" not in rates:
            self.fail("devices", "flops", "expected a table of FLOP/s with at least 'elementwise'", number)
        for name, rate in rates.items():
            if isinstance(rate, bool) or not isinstance(rate, int | float) or rate <= 0:
                self.fail("devices", "flops", f"{name}: expected a number above 0, got {rate!r}", number)

    def link(self, table: Any, where: str, key: str) -> Link:
        if not isinstance(table, dict) or set(table) - set(_LINK):
            self.fail(where, key, f"expected a table of {' and '.join(_LINK)}, got {table!r}")
        numbers = {name: self.positive(value, where, key, zero=name == "latency") for name, value in table.items()}
        return replace(Link(), **numbers)

    def cores(self, hosts: Mapping[str, Any], devices: Sequence[Device]) -> dict[str, int]:
        """Cores by host: one number for all, or a table of them."""
        given = hosts.get("cores")
        known = list(dict.fromkeys(device.host for device in devices))
        if given is None:
            return {}
        if not isinstance(given, dict):
            count = int(self.positive(given, "hosts", "cores", whole=True))
            return dict.fromkeys(known, count)
        for host, count in given.items():
            if host not in known:
                self.fail("hosts.cores", host, f"there is no host of that name; there are {', '.join(known[:8])}")
            self.positive(count, "hosts.cores", host, whole=True)
        return {host: int(count) for host, count in given.items()}


def _line_of(text: str, table: str, number: int, key: str) -> int:
    """The line of a key of the ``number``-th table of a name, or of that table; 0 if neither is found."""
    found, count, inside = 0, -1, table == ""
    for line, content in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[\[?\s*([^\]]+?)\s*\]\]?\s*(#.*)?$", content)
        if header:
            name = header.group(1)
            count += name == table
            inside = name == table and count == number
            if inside and not found:
                found = line
            if table == "" and name == key:
                return line
        elif inside and key and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", content):
            return line
    return found
