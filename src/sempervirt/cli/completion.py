"""Names for the shell's completion, asked from the agent. Silent when there is none."""

from __future__ import annotations

import asyncio

from sempervirt.api.client import Client
from sempervirt.api.schemas import DiskView, VmView
from sempervirt.cli.session import ask_agent
from sempervirt.core.errors import SempervirtError

DEADLINE_S = 1.0


def vm_names(incomplete: str) -> list[str]:
    """Names of VMs that begin with `incomplete`."""

    async def _vms(client: Client) -> list[VmView]:
        async with asyncio.timeout(DEADLINE_S):
            return await client.vms()

    try:
        names = [vm.name for vm in ask_agent(_vms)]
    except (SempervirtError, TimeoutError):
        return []
    return [name for name in names if name.startswith(incomplete)]


def disk_names(incomplete: str) -> list[str]:
    """Names VM/DISK that begin with `incomplete`."""

    async def _disks(client: Client) -> list[DiskView]:
        async with asyncio.timeout(DEADLINE_S):
            return await client.disks()

    try:
        names = [disk.name for disk in ask_agent(_disks)]
    except (SempervirtError, TimeoutError):
        return []
    return [name for name in names if name.startswith(incomplete)]
