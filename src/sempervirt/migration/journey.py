"""What both ends of a migration are: one task that steps a pure machine, the work beside it, an
end of the wire. `departure` and `reception` say what is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any, Generic, TypeVar

from sempervirt.cluster.cluster import Cluster
from sempervirt.host import background
from sempervirt.migration.wire import Wire, WireDisk, WireFiles
from sempervirt.qemu.driver import Listener
from sempervirt.store.registry import Registry
from sempervirt.vm.vm import Vm

Event = TypeVar("Event")


class Journey(Generic[Event]):
    """One VM between two hosts. `what` names it in the log."""

    def __init__(self, vm: Vm, cluster: Cluster, migration: str, what: str) -> None:
        self.vm = vm
        self.id = migration
        self._what = what
        self._cluster = cluster
        self._registry = Registry(cluster.store)
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._stack = AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()
        self._owner: asyncio.Task[None] | None = None
        self._wire_files = WireFiles(vm.machine.files.directory)
        self._wire: Wire | None = None
        self._over = asyncio.Event()

    @property
    def over(self) -> bool:
        """Whether nothing follows any more."""
        return self._over.is_set()

    async def detach(self) -> None:
        """Leaves everything as it is, for another agent to go on with."""
        if self.over:
            return
        for task in (self._owner, *self._tasks):
            if task is not None:
                task.cancel()
        self.vm.machine.listen(None)
        if self._wire is not None:
            self._wire.forget()
        await self._stack.aclose()

    def _post(self, event: Event) -> None:
        self._queue.put_nowait(event)

    def _begin_work(self, owner: Coroutine[Any, Any, None], listener: Listener) -> None:
        """Starts the task that steps the machine; QEMU's events go to `listener`."""
        self.vm.machine.listen(listener)
        self._owner = background.start(owner, f"{self._what} of {self.vm.name}")

    def _keep(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Works in the background, until the end of the journey."""
        task = background.start(work, f"{self._what} of {self.vm.name}: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _wire_disks(self) -> list[WireDisk]:
        return [
            WireDisk(
                name,
                disk.setup.options.image,
                disk.setup.options.direct,
                disk.setup.files.control(disk.generation),
            )
            for name, disk in self.vm.disks.items()
        ]

    async def _end_wire(self) -> None:
        if self._wire is not None:
            await self._wire.end()

    async def _end_tasks(self) -> None:
        """Ends what was kept, but not whoever calls this."""
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        await self._stack.aclose()
