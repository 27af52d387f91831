"""What a cluster takes to run a step as lanes: one task for each device, which tell each other directly.

No task is scheduled between two calls of a device, and a value is on its way as soon as it is there; see
:mod:`daggc.backend.lanes`.
"""

from __future__ import annotations

from dataclasses import replace

from daggc.plan.device import Cluster, Link

# Seconds that a call takes beside its ops and arguments (fitted). To look it up, time it and note it takes 50 us; the
# rest is what its kernels, which were measured one after the other, wait for caches that another call has filled.
CALL = 1e-3


def in_lanes(cluster: Cluster) -> Cluster:
    """The same devices and links, with what calls and messages take in a lane."""

    def direct(link: Link) -> Link:
        return link.direct or link

    return replace(
        cluster,
        devices=tuple(
            replace(device, overhead=CALL if device.overhead else 0.0, hop=0.0, handling=0.0)
            for device in cluster.devices
        ),
        link=direct(cluster.link),
        links={pair: direct(link) for pair, link in cluster.links.items()},
        link_within_host=cluster.link_within_host and direct(cluster.link_within_host),
    )
