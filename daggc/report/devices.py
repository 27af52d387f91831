"""A cluster as text: rates, overheads and links, measured or not."""

from __future__ import annotations

from collections.abc import Sequence

from daggc.plan.device import Cluster, Device

_CLASSES = ("gemm", "conv", "attention", "reduction", "elementwise")


def cluster_text(cluster: Cluster) -> str:
    """A table of devices, then one of links, then what hosts share."""
    head = (
        "device",
        "host",
        "threads",
        "memory",
        *(f"{name} GF/s" for name in _CLASSES),
        "GB/s",
        "overhead",
        "hop",
        "rates",
    )
    lines = _table([head, *(_device_row(device) for device in cluster.devices)])
    links = [
        (f"{a} - {b}", _milliseconds(link.latency), f"{link.bandwidth / 1e9:.2f}")
        for (a, b), link in sorted(cluster.links.items())
    ]
    if cluster.link_within_host is not None:
        within = cluster.link_within_host
        links.append(("others within a host", _milliseconds(within.latency), f"{within.bandwidth / 1e9:.2f}"))
    links.append(("others", _milliseconds(cluster.link.latency), f"{cluster.link.bandwidth / 1e9:.2f}"))
    lines += ["", *_table([("link", "latency", "GB/s"), *links])]
    for host, cores in sorted(cluster.cores.items()):
        own = [device for device in cluster.devices if device.host == host]
        slow = ", ".join(
            f"{name} x{factor:.2f}" for name, factor in (own[0].slowdown.items() if own else ()) if factor > 1
        )
        shared = f"; while all compute, ops take longer: {slow}" if slow else ""
        lines += ["", f"host {host}: {cores} cores for {len(own)} devices{shared}"]
    return "\n".join(lines)


def _device_row(device: Device) -> tuple[str, ...]:
    rates = tuple(f"{device.rate(name) / 1e9:.3g}" for name in _CLASSES)
    source = f"{len(device.curves)} curves" if device.curves else "ordinary"
    if device.profile:
        source += f", {len(device.profile)} nodes"
    times = (_milliseconds(device.overhead), _milliseconds(device.hop))
    memory = f"{device.memory / 1e9:.1f} GB"
    return (
        device.name,
        device.host,
        str(device.threads),
        memory,
        *rates,
        f"{device.bandwidth / 1e9:.3g}",
        *times,
        source,
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
