"""Names for the shell's completion, asked from the agent. Silent when no agent answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from sempervirt.api.client import Client
from sempervirt.api.schemas import DiskView, VmView
from sempervirt.cli.session import ask_agent
from sempervirt.core.errors import SempervirtError

DEADLINE_S = 1.0


def vm_names(incomplete: str) -> list[str]:
    """Names of VMs that begin with `incomplete`."""
    return _names(lambda client: client.vms(), incomplete)


def disk_names(incomplete: str) -> list[str]:
    """Names VM/DISK that begin with `incomplete`."""
    return _names(lambda client: client.disks(), incomplete)


def _names(
    question: Callable[[Client], Awaitable[Sequence[VmView | DiskView]]], incomplete: str
) -> list[str]:
    async def _ask(client: Client) -> Sequence[VmView | DiskView]:
        async with asyncio.timeout(DEADLINE_S):
            return await question(client)

    try:
        views = ask_agent(_ask)
    except (SempervirtError, TimeoutError):
        return []
    return [view.name for view in views if view.name.startswith(incomplete)]
