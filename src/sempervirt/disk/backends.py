"""The backend processes of one disk: starting, signalling, watching, recording them.

No decision is made here: `disk.driver` says what to do, and is told what became of it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from sempervirt.core.errors import CommandFailed, Unavailable
from sempervirt.core.queue_map import Binding
from sempervirt.disk import running as processes
from sempervirt.disk.answers import Status
from sempervirt.disk.backend import ImageTitle, Launch
from sempervirt.disk.held_image import HeldImage
from sempervirt.disk.observer import observe
from sempervirt.disk.program import Programs, path_of
from sempervirt.disk.record import DiskRecord, RecordedProcess, Role
from sempervirt.disk.running import Running
from sempervirt.disk.setup import DiskSetup
from sempervirt.disk.state import Exited, Ready, Serving, Start, State, SupervisionEvent
from sempervirt.host.owner import Work
from sempervirt.host.process import Exit
from sempervirt.host.refusals import describe_end
from sempervirt.host.sockets import turn_away

log = logging.getLogger(__name__)


class Watcher(Protocol):
    """Whoever is told what becomes of the processes."""

    @property
    def connection_expected(self) -> bool:
        """Whether a process serves only once QEMU is connected to it."""

    def post(self, event: SupervisionEvent) -> None:
        """A process has reached something, or has ended."""

    def seen(self, generation: int, status: Status) -> None:
        """The active process told its status."""

    def keep(self, work: Work, name: str) -> asyncio.Task[None]:
        """Runs `work` for as long as somebody watches; a mistake in `work` ends the agent."""


class Backends:
    """The processes that were started for a disk and have not been seen to end.

    `last_end` is how the last one ended, and what it said: `start_disk` makes an error of it.
    """

    def __init__(
        self,
        setup: DiskSetup,
        image: HeldImage,
        listener: socket.socket,
        programs: Programs,
        watcher: Watcher,
    ) -> None:
        self.listener = listener
        self._image = image
        self.programs = programs
        self.last_end: tuple[Exit, str] | None = None
        self._setup = setup
        self._watcher = watcher
        self._members: dict[int, Running] = {}
        self._recorded: DiskRecord | None = None

    @property
    def complaint(self) -> str:
        """What one of the processes answered that could not be understood; "" if none did."""
        return next((m.complaint for m in self._members.values() if m.complaint), "")

    def set_title(self, title: ImageTitle | None) -> None:
        """From now on processes are started with this title, or with none."""
        self._setup = replace(self._setup, title=title)

    @property
    def pids(self) -> list[int]:
        """Of all processes, the ones that were started first in front."""
        return [self._members[generation].pid for generation in sorted(self._members)]

    @property
    def control_sockets(self) -> dict[Path, bool]:
        """Where the processes can be asked, if they can be, and whether they have answered yet."""
        if not self._setup.command.has_control:
            return {}
        return {member.control: member.pulse.heard for member in self._members.values()}

    def listen_at(self, listener: socket.socket) -> None:
        """From now on processes are started with this socket, and QEMU connects to it."""
        self.listener.close()
        self.listener = listener

    def get(self, generation: int | None) -> Running | None:
        """The process of that generation, while it runs."""
        return None if generation is None else self._members.get(generation)

    def start(self, order: Start, binding: Binding | None, *, active: bool) -> None:
        """Starts a process. A process that cannot be started is reported to have ended."""
        setup = self._setup
        try:
            image = self._image.require()
        except Unavailable as error:
            self._watcher.post(Exited(order.generation, str(error)))
            return
        launch = Launch(
            binary=path_of(order.binary),
            options=setup.options,
            listen_fd=self.listener.fileno(),
            control=setup.files.control(order.generation),
            wait_for_lock=order.wait_for_lock,
            thread_map=binding.map if binding else None,
            touched=setup.files.touched,
            session=setup.files.session,
            peers=setup.peers,
            title=setup.title,
            image_fd=image.descriptor,
        )
        try:
            member = processes.start(
                setup.command,
                launch,
                setup.files,
                order.generation,
                self.programs,
                order.binary,
                lambda end: self.ended(order.generation, end),
            )
        except CommandFailed as error:
            self._watcher.post(Exited(order.generation, str(error)))
            return
        self.admit(member, active=active)

    def admit(self, member: Running, *, active: bool) -> None:
        """Watches a process that was started or adopted."""
        self._members[member.generation] = member
        member.stall_s = self._setup.policy.stall_s
        if active:
            member.promoted.set()
        if not self._setup.command.has_control:
            self._watcher.post(Ready(member.generation))
            self._watcher.post(Serving(member.generation))
            return
        member.observing = self._watcher.keep(
            observe(member, self._watcher), f"backend {member.generation}"
        )

    def promote(self, generation: int) -> None:
        """A spare has become the active one."""
        if (member := self.get(generation)) is not None:
            member.promoted.set()

    def turn_away(self) -> None:
        """Nobody serves: QEMU is not to be connected before somebody does."""
        if not self._members:
            turn_away(self.listener)

    def send_signal(self, generation: int, number: signal.Signals) -> None:
        """Signals the process of that generation, if there is one."""
        if (member := self.get(generation)) is not None:
            member.process.send_signal(number)

    def ended(self, generation: int, end: Exit) -> None:
        """To be called when a process ended."""
        member = self._members.pop(generation, None)
        if member is None:
            return
        if member.observing is not None:
            member.observing.cancel()
        words = member.last_words()
        self.last_end = end, words
        self._watcher.post(Exited(generation, describe_end(end, words)))
        self._setup.files.prune(generation)

    def record(self, state: State) -> None:
        """Writes down what was decided and who runs, if that has changed."""
        roles = ((Role.ACTIVE, state.active), (Role.SPARE, state.spare))
        record = DiskRecord(
            next_generation=state.next_generation,
            binary=state.binary,
            restarts=state.restarts,
            binding=state.binding,
            image=self._image.identity,
            epoch_file=self._setup.title.epoch_file if self._setup.title else None,
            processes=tuple(
                RecordedProcess(
                    role,
                    member.generation,
                    member.binary,
                    member.listen_fd,
                    member.process.identity,
                )
                for role, backend in roles
                if backend and (member := self.get(backend.generation))
            ),
        )
        if record == self._recorded:
            return
        try:
            record.write(self._setup.record)
        except OSError as error:  # a full disk must not end supervision; tried at each change
            log.error("record disk=%s not written: %s", self._setup.name, error)  # noqa: TRY400
        else:
            self._recorded = record

    def keep_programs(self, state: State) -> None:
        """Lets go of the programs that nobody runs and nobody will be started from."""
        upgrade = (state.upgrade.binary,) if state.upgrade else ()
        running = (member.binary for member in self._members.values())
        self.programs.keep_only({state.binary, *upgrade, *running})

    def detach(self) -> None:
        """Lets all processes run on unwatched."""
        for member in self._members.values():
            member.detach()
        self._members.clear()
        self.programs.keep_only(())
        self.listener.close()
