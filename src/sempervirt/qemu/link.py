"""Keeps a VM's monitor connected, passes on what it tells, and notices when it falls silent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sempervirt.core.errors import OutcomeUnknown, SempervirtError, Unavailable
from sempervirt.host.changes import Changes
from sempervirt.qemu.qmp import Monitor, OnEvent
from sempervirt.qemu.state import DeviceGone, Heard, QemuEvent, Silent, StatusTold

RETRY_S = 0.02
RETRY_MAX_S = 1.0


@dataclass(frozen=True)
class Patience:
    """How long a monitor may take, in seconds, before it counts as silent."""

    start_s: float = 30.0
    connect_s: float = 10.0
    command_s: float = 10.0
    heartbeat_s: float = 5.0
    hang_up_s: float = 0.5


class Link:
    """The way to one QEMU. `run` is the task; `report` gets what is learned of QEMU's runstate,
    `heard` every event of the monitor. `devices` are the ids of devices that QEMU was started with,
    `pid` tells the process that has to be at the other end.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        devices: Collection[str],
        patience: Patience,
        report: Callable[[Heard], None],
        heard: OnEvent,
        pid: Callable[[], int | None],
    ) -> None:
        self._path = path
        self._name = name
        self._devices = frozenset(devices)
        self._patience = patience
        self._report = report
        self._heard = heard
        self._pid = pid
        self._monitor: Monitor | None = None
        self._changes = Changes()

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Runs a monitor command. Raises as `Monitor.execute` does."""
        if self._monitor is None:
            raise Unavailable(f"the monitor of {self._name} is not connected")
        timeout_s = self._patience.command_s
        return await self._monitor.execute(command, arguments, timeout_s=timeout_s)

    async def wait_connected(self, timeout_s: float) -> None:
        """Waits until commands can be sent. Raises Unavailable."""
        await self._changes.wait_until(
            lambda: self._monitor is not None,
            timeout_s=timeout_s,
            what=f"the monitor of {self._name}",
        )

    async def wait_disconnected(self, timeout_s: float) -> None:
        """Waits until all that an ending QEMU told was passed on. Raises Unavailable."""
        await self._changes.wait_until(
            lambda: self._monitor is None, timeout_s=timeout_s, what="the monitor's last words"
        )

    async def run(self) -> None:
        """Connects again and again until the task is cancelled."""
        patience_s = self._patience.start_s
        while True:
            self._monitor = await self._connect(patience_s)
            patience_s = 0.0
            if self._monitor is not None:
                self._changes.notify()
                await self._follow(self._monitor)
            await asyncio.sleep(RETRY_MAX_S)

    async def _connect(self, patience_s: float) -> Monitor | None:
        """Tries until `patience_s` is over, then reports silence."""
        now = asyncio.get_running_loop().time
        deadline = now() + patience_s
        interval_s = RETRY_S
        while True:
            try:
                connect_s = self._patience.connect_s
                return await Monitor.connect(self._path, self._name, connect_s, self._pid())
            except Unavailable as error:  # not listening (yet)
                if now() >= deadline:
                    self._report(Silent(error.message))
                    return None
            except OutcomeUnknown as error:
                self._report(Silent(error.message))
                return None
            await asyncio.sleep(interval_s)
            interval_s = min(interval_s * 1.5, RETRY_MAX_S)

    async def _follow(self, monitor: Monitor) -> None:
        """Follows one connection until its end or until the monitor is silent, and reports that."""
        following = asyncio.create_task(monitor.follow(self._passed_on))
        try:
            self._miss(await monitor.peripherals(self._patience.command_s))
            while not following.done():
                self._report(StatusTold(await monitor.query_status(self._patience.command_s)))
                await asyncio.wait((following,), timeout=self._patience.heartbeat_s)
            reason = "the monitor hung up"
        except SempervirtError as error:
            reason = error.message
        finally:
            following.cancel()
            await asyncio.wait((following,))
            await monitor.close()
            self._monitor = None
            self._changes.notify()
        if not following.cancelled() and (mistake := following.exception()) is not None:
            raise mistake  # of whoever was told of an event
        # Mostly it hung up because QEMU ended, and then this task is cancelled right now.
        await asyncio.sleep(self._patience.hang_up_s)
        self._report(Silent(reason))

    def _miss(self, present: Collection[str]) -> None:
        """Reports the devices that were unplugged while nobody followed the monitor."""
        for device in sorted(self._devices.difference(present)):
            self._report(DeviceGone(device))

    def _passed_on(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "DEVICE_DELETED" and (device := data.get("device")) in self._devices:
            self._report(DeviceGone(str(device)))
        self._report(QemuEvent(name, str(data.get("reason", ""))))
        self._heard(name, data)
