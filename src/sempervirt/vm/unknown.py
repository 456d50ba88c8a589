"""A VM of which something may run, and that this agent cannot take over as a whole.

Its record is damaged or gone, or says something else than what runs. So nothing is known for
certain but what is seen: its name is taken, nothing of it is started or removed, and what is sound
of it goes on being looked after.

    found ──► unknown ──────────────────────────── kill ──► stopped: nothing of it runs, the name
                 │   its disks are supervised                ▲       is free, what stood in the
                 │   while a QEMU of it lives                │       records' place was moved aside
                 └── its QEMU ends by itself: the disks are ─┘ (kill settles this as well)
                     ended in order, and it stays unknown
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from sempervirt.core.errors import OutcomeUnknown, SempervirtError
from sempervirt.core.events import Journal
from sempervirt.disk.driver import Disk
from sempervirt.disk.evidence import launch_of
from sempervirt.disk.lifecycle import adopt_disk
from sempervirt.disk.running import DiskFiles
from sempervirt.disk.setup import DiskSetup, supervised
from sempervirt.host import background, process
from sempervirt.host.peers import write_peers
from sempervirt.host.process import Exit, Process
from sempervirt.host.procfs import ProcessId, arguments_of
from sempervirt.host.records import move_aside
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.state import ON_REQUEST, End, Runstate
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.processes import Living, living_of
from sempervirt.vm.record import VmRecord

log = logging.getLogger(__name__)

# A process that is killed while another one of the same VM takes over from it: seen the next time.
KILL_ROUNDS = 5


class UnknownVm:
    """Made by `take`; ends with `kill` or `detach`. `cause` says what is wrong, and what to do.

    `record` is what could be read of the VM's record, `end` how the VM was settled.
    """

    def __init__(
        self, config: AgentConfig, name: str, cause: SempervirtError, record: VmRecord | None
    ) -> None:
        self.name = name
        self.cause = cause
        self.record = record
        self.since = time.time()
        self.files = VmFiles(config.vm_run_dir(name))
        self.journal = Journal(name)
        self.disks: dict[str, Disk] = {}
        self.end: End | None = None
        self._config = config
        self._qemus: list[Process] = []
        self._freeing: asyncio.Task[None] | None = None
        self._stopping = asyncio.Lock()

    @classmethod
    async def take(
        cls,
        config: AgentConfig,
        name: str,
        cause: SempervirtError,
        seen: Living,
        record: VmRecord | None = None,
    ) -> UnknownVm:
        """Looks after what was seen of a VM; nothing is ended by it."""
        vm = cls(config, name, cause, record)
        vm._note(f"unknown: {cause.message}; of it there is {seen}")
        log.error("unknown vm=%s lives=%s: %s", name, seen, cause)
        for identity in seen.qemus:
            watched = process.adopt(identity, vm._qemu_ended)
            if watched is not None:
                vm._qemus.append(watched)
        if len(vm._qemus) == 1:  # of several nobody can tell which one the disks belong to
            with contextlib.suppress(OSError):
                write_peers(vm.files.peers, seen.qemus)
        if vm._qemus:
            await vm._adopt_disks(seen.backends)
        return vm

    @property
    def run(self) -> Runstate:
        """UNKNOWN, until it was settled."""
        return Runstate.UNKNOWN if self.end is None else Runstate.STOPPED

    @property
    def why(self) -> str:
        """What is wrong, and what runs of it all the same."""
        if self.end is not None:
            return self.end.reason
        runs = f"QEMU runs (pid {self.pid})" if self.pid else "no QEMU of it was found"
        return f"{self.cause.message}; {runs}"

    @property
    def remedy(self) -> str:
        """What an operator can do."""
        end = f"to end what runs of it and free its name: semper vm kill {self.name}"
        return f"{self.cause.remedy}; {end}" if self.cause.remedy else end

    @property
    def directories(self) -> tuple[Path, Path]:
        """Its records, and its sockets and logs."""
        return self._state_dir, self.files.directory

    @property
    def pid(self) -> int | None:
        """The process id of a QEMU of it that lives."""
        return next((one.pid for one in self._qemus if one.exit is None), None)

    async def kill(self, because: str = ON_REQUEST) -> None:
        """Ends everything of the VM that lives, and frees its name.

        Raises OutcomeUnknown when a process does not end, or others appear again and again.
        """
        if self.end is not None:
            return
        for one in (await self._living()).qemus:
            await _end(self.name, one, 0)
        await self._stop_disks()
        for _ in range(KILL_ROUNDS):
            if not (living := await self._living()).all:
                break
            # A spare would take over from an active backend that is ended before it.
            for one in sorted(living.all, key=_serves):
                grace_s = self._config.policy.drain_s if _serves(one) else 0
                await _end(self.name, one, grace_s)
        else:
            raise OutcomeUnknown(
                f"VM {self.name}: processes of it appear again and again",
                remedy="does another agent work with the same directories?",
            )
        await asyncio.to_thread(self._move_records_aside)
        self.end = End(f"{because}; it was unknown: {self.cause.message}")
        self._note(f"settled: {self.end.reason}")
        log.info("settled vm=%s: %s", self.name, self.end.reason)

    async def detach(self) -> None:
        """Leaves everything running, for another agent."""
        if self._freeing is not None:
            self._freeing.cancel()
        for one in self._qemus:
            one.forget()
        for disk in self.disks.values():
            await disk.detach()

    async def _adopt_disks(self, backends: Mapping[str, object]) -> None:
        for name in backends:
            files = DiskFiles(self.files.directory, name)
            try:
                setup = await self._setup(name, files)
                # Nothing waits for an image whose claim has yet to come from another host.
                awaits = setup.title is not None and setup.title.epoch is None
                self.disks[name] = await adopt_disk(setup, frozen=awaits)
            except SempervirtError as error:
                self._note(f"disk {name} is not supervised: {error.message}")
                log.error("unknown vm=%s disk=%s %s", self.name, name, error)  # noqa: TRY400

    async def _setup(self, name: str, files: DiskFiles) -> DiskSetup:
        """How the living backends of a disk were started."""
        command, policy = self._config.backend, self._config.policy
        launch = await launch_of(files, command)
        return DiskSetup(
            name=f"{self.name}/{name}",
            volume=None,
            options=launch.options,
            command=command,
            policy=supervised(policy, command, read_only=launch.options.read_only),
            files=files,
            record=self._state_dir / f"disk-{name}.json",
            title=launch.title,
            peers=self.files.peers,
        )

    @property
    def _state_dir(self) -> Path:
        return self._config.vm_state_dir(self.name)

    async def _living(self) -> Living:
        return await asyncio.to_thread(living_of, self._config, self.name)

    def _qemu_ended(self, end: Exit) -> None:
        self._note(f"a QEMU of it: {end}")
        if self.pid is None and self._freeing is None:
            self._freeing = background.start(self._free(), f"{self.name}: free")

    async def _free(self) -> None:
        try:
            await self._stop_disks()
        except SempervirtError as error:
            log.error("unknown vm=%s its disks are not free: %s", self.name, error)  # noqa: TRY400

    async def _stop_disks(self) -> None:
        async with self._stopping:
            await asyncio.gather(*(disk.stop() for disk in self.disks.values()))
            self.disks.clear()

    def _move_records_aside(self) -> None:
        for path in (self._state_dir / "vm.json", *self._state_dir.glob("disk-*.json")):
            move_aside(path)

    def _note(self, text: str) -> None:
        self.journal.note(time.time(), "state", text)


def _serves(identity: ProcessId) -> bool:
    """Whether a backend was started to serve, and not to wait."""
    return "--spare" not in arguments_of(identity.pid)


async def _end(name: str, identity: ProcessId, grace_s: float) -> None:
    watched = process.adopt(identity, lambda _end: None)
    if watched is not None and await watched.end(grace_s) is None:
        raise OutcomeUnknown(
            f"VM {name}: the process {identity.pid} was killed and does not end",
            remedy=f"nothing of it may be started elsewhere; look at /proc/{identity.pid}/stack",
        )
