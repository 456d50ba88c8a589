"""The backend processes of one disk: starting, signalling, watching, recording them.

No decision is made here: `disk` says what to do, and is told by `report` what became of it.
"""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sempervirt.core.errors import CommandFailed
from sempervirt.core.queue_map import Binding
from sempervirt.disk import running as processes
from sempervirt.disk.backend import ImageTitle, Launch
from sempervirt.disk.observer import observe
from sempervirt.disk.program import Programs, path_of
from sempervirt.disk.record import DiskRecord, RecordedProcess
from sempervirt.disk.running import Running
from sempervirt.disk.setup import DiskSetup
from sempervirt.disk.state import Exited, Ready, Serving, Start, State, SupervisionEvent
from sempervirt.host import background
from sempervirt.host.process import Exit

log = logging.getLogger(__name__)


class Backends:
    """The processes that were started for a disk and have not been seen to end."""

    def __init__(
        self,
        setup: DiskSetup,
        listener: socket.socket,
        programs: Programs,
        report: Callable[[SupervisionEvent], None],
        seen: Callable[[Running, dict[str, Any]], None],
    ) -> None:
        self.listener = listener
        self.programs = programs
        self.connected = False
        self.last_end: tuple[Exit, str] | None = None
        self._setup = setup
        self._report = report
        self._seen = seen
        self._members: dict[int, Running] = {}
        self._recorded: DiskRecord | None = None

    def set_title(self, title: ImageTitle) -> None:
        """From now on processes are started by this right."""
        self._setup = replace(self._setup, title=title)

    def get(self, generation: int | None) -> Running | None:
        """The process of that generation, while it runs."""
        return None if generation is None else self._members.get(generation)

    def start(self, order: Start, binding: Binding | None, *, active: bool) -> None:
        """Starts a process; if that fails, it is reported to have ended."""
        setup = self._setup
        launch = Launch(
            binary=path_of(order.binary),
            options=setup.options,
            listen_fd=self.listener.fileno(),
            control=setup.files.control(order.generation),
            wait_for_lock=order.wait_for_lock,
            thread_map=binding.map if binding else None,
            touched=setup.files.touched,
            title=setup.title,
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
            self._report(Exited(order.generation, str(error)))
            return
        self.admit(member, active=active)

    def admit(self, member: Running, *, active: bool) -> None:
        """Watches a process that was started or adopted."""
        self._members[member.generation] = member
        if active:
            member.promoted.set()
        if not self._setup.command.has_control:
            self._report(Ready(member.generation))
            self._report(Serving(member.generation))
            return
        member.watcher = background.start(
            observe(member, self._report, self._seen, lambda: self.connected),
            f"{self._setup.name}: backend {member.generation}",
            crash=True,
        )

    def promote(self, generation: int) -> None:
        """A spare has become the active one."""
        if (member := self.get(generation)) is not None:
            member.promoted.set()

    def send_signal(self, generation: int, number: signal.Signals) -> None:
        """Signals a process, if it still runs."""
        if (member := self.get(generation)) is not None:
            member.process.send_signal(number)

    def ended(self, generation: int, end: Exit) -> None:
        """To be called when a process ended."""
        member = self._members.pop(generation, None)
        if member is None:
            return
        if member.watcher is not None:
            member.watcher.cancel()
        words = member.last_words()
        self.last_end = end, words
        self._report(Exited(generation, processes.describe_end(end, words)))
        self._setup.files.prune(generation)

    def record(self, state: State, restarts: int) -> None:
        """Writes down who runs, if that has changed."""
        roles = (("active", state.active), ("spare", state.spare))
        record = DiskRecord(
            next_generation=state.next_generation,
            binary=state.binary,
            restarts=restarts,
            binding=state.binding,
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
        upgrade = (state.upgrade.binary,) if state.upgrade else ()
        running = (member.binary for member in self._members.values())
        self.programs.keep_only({state.binary, *upgrade, *running})
        try:
            record.write(self._setup.record)
        except OSError as error:  # a full disk must not end supervision; tried at each change
            log.error("record disk=%s not written: %s", self._setup.name, error)  # noqa: TRY400
        else:
            self._recorded = record

    def release(self) -> None:
        """Lets all processes run on unwatched."""
        for member in self._members.values():
            member.release()
        self._members.clear()
        self.programs.keep_only(())
        self.listener.close()
