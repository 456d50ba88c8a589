"""The client of a peer: the agent of another host, which has to prove that it is that host."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sempervirt.cluster.cluster import Cluster
from sempervirt.host.http import Connection


@asynccontextmanager
async def connect(cluster: Cluster, host: str, address: str) -> AsyncIterator[Connection]:
    """A connection with the agent of `host` at `address`, "HOST:PORT", over mutual TLS.

    Each call raises NotAllowed when another than `host` answers there; see `host.http` for the
    rest.
    """
    tls = cluster.client_context()
    async with Connection.to_host(address, host, tls) as connection:
        yield connection
