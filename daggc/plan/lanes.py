"""What a cluster takes to run a step as lanes: one task for each device, which tell each other directly.

No task is scheduled between two calls of a device, and a value is on its way as soon as it is there; see
:mod:`daggc.backend.lanes`.
"""

from __future__ import annotations

from dataclasses import replace

from daggc.plan.device import Cluster, Link

CALL = 5e-5  # seconds that a call takes beside its ops and arguments: it is looked up, timed and noted


def in_lanes(cluster: Cluster) -> Cluster:
    """The same devices and links, with what calls and messages take in a lane."""

    def direct(link: Link) -> Link:
        return link.direct or link

    return replace(
        cluster,
        devices=tuple(
            replace(device, overhead=min(device.overhead, CALL), hop=0.0, handling=0.0) for device in cluster.devices
        ),
        link=direct(cluster.link),
        links={pair: direct(link) for pair, link in cluster.links.items()},
        link_within_host=cluster.link_within_host and direct(cluster.link_within_host),
    )
