"""Names for the shell's completion, asked from the agent. Silent when no agent answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from sempervirt.cli.session import ask_agent
from sempervirt.core.errors import SempervirtError

if TYPE_CHECKING:
    from sempervirt.api.client import Client
    from sempervirt.api.schemas import DeviceView, DiskView, VmView

    Named = Sequence[VmView | DiskView | DeviceView]

DEADLINE_S = 1.0


def vm_names(incomplete: str) -> list[str]:
    """Names of VMs that begin with `incomplete`."""
    return _names(lambda client: client.vms(), incomplete)


def disk_names(incomplete: str) -> list[str]:
    """Names VM/DISK that begin with `incomplete`."""
    return _names(lambda client: client.disks(), incomplete)


def device_names(incomplete: str) -> list[str]:
    """Names VM/DEVICE that begin with `incomplete`."""
    return _names(lambda client: client.devices(), incomplete)


def _names(question: Callable[[Client], Awaitable[Named]], incomplete: str) -> list[str]:
    import asyncio

    async def _ask(client: Client) -> Named:
        async with asyncio.timeout(DEADLINE_S):
            return await question(client)

    try:
        views = ask_agent(_ask)
    except (SempervirtError, TimeoutError):
        return []
    return [view.name for view in views if view.name.startswith(incomplete)]
