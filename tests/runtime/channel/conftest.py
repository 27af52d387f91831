"""Workers for the tests of the channel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from channel_ends import Ends
from cluster import processes
from distributed import Client


@pytest.fixture
def ends(two_workers: Client) -> Ends:
    return Ends(two_workers)


@pytest.fixture
def mortal() -> Iterator[Ends]:
    """Two workers of which one may die."""
    with processes(2) as client:
        yield Ends(client)
