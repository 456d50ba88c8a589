"""A QEMU that is to take over a VM from another one on the same host.

    start ──► waits, with the guest's memory mapped ──► `load` ──► holds the state, paused ──► go
      └───────────────────────── `discard` ──────────────┘

Both processes map the same memory; only one of the two may ever run the guest. The successor is
started with its processors stopped, and `go` is called only after the other QEMU was seen to have
ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sempervirt.core.errors import OutcomeUnknown, Unavailable
from sempervirt.host import process
from sempervirt.host.privileges import Identity
from sempervirt.host.process import Exit, Process
from sempervirt.host.procfs import ProcessId
from sempervirt.qemu import device_state
from sempervirt.qemu.privileges import capabilities
from sempervirt.qemu.qmp import Monitor

CONNECT_POLL_S = 0.005
START_DEADLINE_S = 30.0
COMMAND_S = 10.0


class Successor:
    """Made by `start` or `adopt`; ends with `discard`, or lives on as the VM's QEMU."""

    def __init__(self, name: str, monitor: Path) -> None:
        self.name = name
        self._path = monitor
        self._monitor: Monitor | None = None
        self._process: Process | None = None
        self._on_exit: Callable[[Exit], None] | None = None

    @classmethod
    async def start(
        cls,
        name: str,
        monitor: Path,
        argv: Sequence[str],
        log: Path,
        inherited: Sequence[int],
        identity: Identity | None = None,
    ) -> Successor:
        """Starts QEMU with `inherited` descriptors, as `identity` if it has one of its own, and
        returns when the monitor answers.

        Raises Unavailable with QEMU's own words if the monitor does not; nothing is left then.
        """
        successor = cls(name, monitor)
        try:
            successor._process = process.spawn(
                argv,
                log=log,
                on_exit=successor._ended,
                pass_fds=inherited,
                capabilities=capabilities(),
                identity=identity,
            )
            process.expose_to_oom(successor._process.pid)
            try:
                await successor._connect()
            except Unavailable as error:
                said = next((line for line in reversed(process.said(log)) if line.strip()), "")
                raise Unavailable(f"the new QEMU did not start: {said or error.message}") from error
        except BaseException:
            await successor.discard()
            raise
        return successor

    @classmethod
    async def adopt(cls, name: str, monitor: Path, identity: ProcessId) -> Successor:
        """A successor that an earlier agent started. Raises Unavailable when it does not answer."""
        successor = cls(name, monitor)
        successor._process = process.adopt(identity, successor._ended)
        await successor._connect()
        return successor

    @property
    def process(self) -> Process:
        """The process, once it was started."""
        assert self._process is not None
        return self._process

    def on_exit(self, call: Callable[[Exit], None]) -> None:
        """Has `call` made when the process ends; at once, if that has happened."""
        self._on_exit = call
        if self.process.exit is not None:
            call(self.process.exit)

    async def load(self, state: Path) -> None:
        """Loads the state of the devices. Raises as `device_state.load`."""
        await device_state.load(self.monitor.execute_within(COMMAND_S), state)

    async def go(self) -> None:
        """Lets the guest run on. Raises as `Monitor.execute`."""
        await self.monitor.execute("cont", timeout_s=COMMAND_S)

    async def finish(self) -> None:
        """Undoes the settings of `load`, and closes the monitor's connection."""
        try:
            await device_state.reset(self.monitor.execute_within(COMMAND_S))
        finally:
            await self.disconnect()

    async def disconnect(self) -> None:
        """Closes the monitor's connection."""
        if self._monitor is not None:
            await self._monitor.close()
            self._monitor = None

    async def discard(self) -> None:
        """Kills the process. Raises OutcomeUnknown when it does not end."""
        if self._monitor is not None:
            await self.disconnect()
        if self._process is not None and await self._process.end(0) is None:
            raise OutcomeUnknown(f"the new QEMU of {self.name} does not end")

    @property
    def monitor(self) -> Monitor:
        """The connection to the monitor. Raises Unavailable while there is none."""
        if self._monitor is None:
            raise Unavailable(f"the monitor of the new QEMU of {self.name} is not connected")
        return self._monitor

    def _ended(self, end: Exit) -> None:
        if self._on_exit is not None:
            self._on_exit(end)

    async def _connect(self) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        while True:
            try:
                pid = self._process.pid if self._process else None
                self._monitor = await Monitor.connect(self._path, self.name, COMMAND_S, pid)
            except OutcomeUnknown as error:
                raise Unavailable(error.message) from error
            except Unavailable:
                if self._process is None or self._process.exit is not None:
                    raise
                if time.monotonic() > deadline:
                    raise
            else:
                return
            await asyncio.sleep(CONNECT_POLL_S)
