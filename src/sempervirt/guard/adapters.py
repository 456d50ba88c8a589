"""The guard's real ports, but for the evacuation, which is the agent's."""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

from sempervirt.core.errors import CommandFailed, Unavailable
from sempervirt.guard.installation import MODULE, may_load
from sempervirt.guard.ports import Shutdown
from sempervirt.guard.presets import ModulePolicy
from sempervirt.guard.signs import Sign
from sempervirt.guard.sources.counters import Taint, kernel_counters
from sempervirt.guard.sources.kernel_log import KernelLog
from sempervirt.guard.sources.module import DEVICE, ModuleCommand, ModuleDevice, tell
from sempervirt.guard.sources.pressure import LIMITS, Pressure, Thermal
from sempervirt.guard.sources.records import Rasdaemon, Smart
from sempervirt.guard.sources.source import AbsentError, Source
from sempervirt.host import process
from sempervirt.host.procfs import boot_id
from sempervirt.host.records import RecordDamaged, read_record, write_record

log = logging.getLogger(__name__)

LOAD_S = 60.0
SMARTCTL_S = 30.0
# All bits of smartctl's status are about the disk, not about smartctl.
SMARTCTL_STATUS = range(256)
# Started by the agent's service, which may not load modules itself.
UNIT = "semper-guard.service"


class HeardRecord:
    """Up to when the module's events were dealt with, for the next agent of this boot.

        STATE_DIR/guard.json   {"version": 1, "boot_id": "…", "heard_ns": 19775584000}

    By time and not by number: a module that is loaded anew counts from zero again.
    """

    def __init__(self, path: Path) -> None:
        self.ns = 0
        self._path = path
        self._writing = threading.Lock()
        try:
            content = read_record(path, 1) or {}
        except RecordDamaged as error:
            log.error("guard: %s; the module's events are dealt with again", error)  # noqa: TRY400
            return
        found = content.get("heard_ns")
        if content.get("boot_id") == boot_id() and isinstance(found, int) and found > 0:
            self.ns = found

    def keep(self, ns: int) -> None:
        """See `ports.Heard`. In any thread; an older time never replaces a newer one."""
        with self._writing:
            if ns <= self.ns:
                return
            try:
                write_record(self._path, 1, {"boot_id": boot_id(), "heard_ns": ns})
            except OSError as error:
                log.error("guard record=%s not written: %s", self._path, error.strerror)  # noqa: TRY400
                return
            self.ns = ns


class KernelModule:
    """The module: its device, and how it is loaded."""

    def __init__(self, device: Path = DEVICE) -> None:
        self._device = device
        self._orders: SimpleQueue[tuple[ModuleCommand, Future[None]]] = SimpleQueue()
        # One thread, which is there beforehand: a dying host may refuse to make one. A write that
        # is answered by a panic, or hangs, keeps neither the agent's loop nor its end waiting.
        threading.Thread(target=self._obey, name="guard command", daemon=True).start()

    async def tell(self, command: ModuleCommand) -> None:
        """Writes a command to the device. Raises OSError."""
        done: Future[None] = Future()
        self._orders.put((command, done))
        await asyncio.wrap_future(done)

    def _obey(self) -> None:
        while True:
            command, done = self._orders.get()
            # One that nobody waits for any more is carried out all the same.
            wanted = done.set_running_or_notify_cancel()
            try:
                tell(command, self._device)
            except OSError as error:
                if wanted:
                    done.set_exception(error)
            else:
                if wanted:
                    done.set_result(None)

    async def load(self, policy: ModulePolicy) -> None:
        """Loads the installed module, or has systemd load it where this process may not. A unit or
        a file of modprobe.d says more than `policy`, where it exists. Raises Unavailable,
        CommandFailed.
        """
        if may_load():
            program = shutil.which("modprobe", path="/sbin:/usr/sbin:/bin:/usr/bin")
            if program is None:
                raise Unavailable("modprobe is not installed", remedy="install the package kmod")
            command = [program, MODULE, f"policy={policy.value}"]
        else:
            command = ["systemctl", "start", UNIT]
        try:
            await process.run(command, timeout_s=LOAD_S)
        except CommandFailed as error:
            raise CommandFailed(
                error.command,
                error.exit_code,
                error.tail,
                remedy="install it: semper guard install",
            ) from error


class ShutdownSource(Source, Shutdown, Protocol):
    """What tells of an orderly shutdown and holds it."""


class NoShutdowns:
    """In its place where the library for D-Bus is not installed: the host is guarded for the
    rest.
    """

    name = "logind"
    interval_s = 60.0
    limit_s: float | None = None

    def look(self, patience_s: float) -> Sequence[Sign]:
        """Raises AbsentError."""
        del patience_s
        raise AbsentError("the Python package jeepney is not installed: make setup")

    def release(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is open."""


def shutdowns() -> ShutdownSource:
    """logind, if the library for D-Bus is there: an agent that was updated without its packages has
    to start, because VMs depend on it.
    """
    try:
        from sempervirt.guard.sources.logind import Shutdowns  # noqa: PLC0415 - see above
    except ImportError:
        return NoShutdowns()
    return Shutdowns()


def sources(device: ModuleDevice, held: ShutdownSource) -> list[Source]:
    """All sources of this host, the module's device first. Call in the event loop."""
    found: list[Source] = [device, KernelLog(), Taint(), *kernel_counters()]
    found += [Pressure(resource) for resource in LIMITS]
    found += [Thermal(), Rasdaemon()]
    found.append(Smart(_runner(asyncio.get_running_loop()), _find_smartctl))
    return [*found, held]


def _find_smartctl() -> str | None:
    return shutil.which("smartctl", path="/usr/sbin:/sbin:/usr/bin:/usr/local/sbin")


def _runner(loop: asyncio.AbstractEventLoop) -> Callable[[Sequence[str]], str]:
    """Runs a program by way of the agent's loop, for a thread that waits for its output."""

    async def run(command: Sequence[str]) -> str:
        done = await process.run(command, timeout_s=SMARTCTL_S, accept=SMARTCTL_STATUS)
        return done.stdout

    def ask(command: Sequence[str]) -> str:
        return asyncio.run_coroutine_threadsafe(run(command), loop).result(SMARTCTL_S * 2)

    return ask
