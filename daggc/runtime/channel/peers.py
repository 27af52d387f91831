"""Whether another worker is there."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from distributed.comm import get_address_host_port

_CONNECT = 2.0  # seconds within which a host that is there takes or refuses a connection


async def refuses(address: str) -> bool:
    """Whether nothing listens at an address, for certain: its host is there and refuses connections.

    Dask's own ``connect`` cannot tell: it tries again until its time is over.
    """
    try:
        host, port = get_address_host_port(address)
    except (TypeError, ValueError, NotImplementedError):
        return False  # not of a network
    try:
        async with asyncio.timeout(_CONNECT):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return False
