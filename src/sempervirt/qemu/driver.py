"""The owner of one QEMU: carries out what `qemu.decide` decides.

Requests, the monitor's events and QEMU's end arrive in one queue. Commands to the monitor run
beside the queue, so that `kill` never waits for a monitor that hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, assert_never

from sempervirt.core.errors import OutcomeUnknown, SempervirtError, StateConflict, Unavailable
from sempervirt.core.events import Journal
from sempervirt.host import process
from sempervirt.host.owner import HOST_CLOCK, Clock, Owner, Replies
from sempervirt.host.privileges import Identity
from sempervirt.host.process import Exit, Process
from sempervirt.host.procfs import ProcessId, boot_id
from sempervirt.qemu.command_line import disk_id
from sempervirt.qemu.decide import QUIT_DEADLINE_S, decide
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.link import Link, Patience
from sempervirt.qemu.privileges import capabilities
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import (
    ON_REQUEST,
    Accept,
    Asked,
    Decision,
    Done,
    Ended,
    Execute,
    Heard,
    KillProcess,
    NotDone,
    Refusal,
    Refuse,
    Released,
    Request,
    Runstate,
    Silent,
    SwitchProcess,
    Tick,
    VmEffect,
    VmEvent,
    VmState,
)
from sempervirt.qemu.successor import Successor

log = logging.getLogger(__name__)

STOP_GRACE_S = 60.0
KILL_DEADLINE_S = 10.0
# The last events of a QEMU that ended are still in the socket.
DRAIN_S = 2.0
LOG_LIMIT_BYTES = 4 << 20
HOUSEKEEPING_S = 10.0

STARTED = VmState()

Listener = Callable[[str, Mapping[str, Any]], None]


class Machine(Owner[VmState, VmEvent, VmEffect]):
    """One QEMU process, from its start to its end; made by one of the class methods.

    Beside the state there are only handles: the process, the link to its monitor, the successors
    that `switch` was given (by ticket), and the listener of a migration. No decision looks at
    them; which QEMU an event came from stands in the event.
    """

    def __init__(
        self,
        spec: VmSpec,
        files: VmFiles,
        patience: Patience,
        state: VmState = STARTED,
        clock: Clock = HOST_CLOCK,
        absent: Collection[str] = (),
    ) -> None:
        super().__init__(f"VM {spec.name}", state, clock)
        self.spec = spec
        self._absent = absent
        self.name = spec.name
        self.files = files
        self.started = time.time()
        self.journal = Journal(spec.name)
        self._process: Process | None = None
        self._patience = patience
        self._replies = Replies()
        self._link = self._new_link()
        self._linking: asyncio.Task[None] | None = None
        self._successors: dict[int, Successor] = {}
        self._listener: Listener | None = None

    @classmethod
    def launch(
        cls,
        spec: VmSpec,
        files: VmFiles,
        argv: Sequence[str],
        patience: Patience,
        inherited: Sequence[int],
        absent: Collection[str] = (),
        identity: Identity | None = None,
        nice: int = 0,
    ) -> Machine:
        """Starts QEMU, with `inherited` descriptors and all disks but those `absent`, as `identity`
        if it has one of its own; one that is `nice` gives way to others by so much. Raises
        CommandFailed when the program cannot be started.
        """
        machine = cls(spec, files, patience, absent=absent)
        started = process.spawn(
            argv,
            log=files.log,
            on_exit=machine._exits(),
            pass_fds=inherited,
            capabilities=capabilities(),
            identity=identity,
            nice=nice,
        )
        process.expose_to_oom(started.pid)
        machine._watch(started)
        return machine

    @classmethod
    def inherit(
        cls, spec: VmSpec, files: VmFiles, successor: Successor, patience: Patience
    ) -> Machine:
        """Becomes the owner of a QEMU that has loaded a state and waits; `link` is called later."""
        state = VmState(run=Runstate.UNKNOWN, why="it takes over, and was not asked yet")
        machine = cls(spec, files, patience, state)
        machine._process = successor.process
        machine.start()
        machine.keep(machine._bound_logs(), "logs")
        successor.on_exit(machine._exits())
        return machine

    @classmethod
    def adopt(
        cls,
        spec: VmSpec,
        files: VmFiles,
        identity: ProcessId | None,
        patience: Patience,
        held: Request | None = None,
        leaving: str = "",
    ) -> Machine:
        """Takes over a QEMU that an earlier agent started, also one that has ended since.

        With `held` nobody may change the VM before that work has gone on and released the VM.
        `leaving` is why the former agent was about to kill QEMU, "" if that agent was not.
        """
        why = "adopted, and not asked yet"
        state = VmState(Runstate.UNKNOWN, why, held=held, killed_because=leaving)
        machine = cls(spec, files, patience, state)
        adopted = identity and process.adopt(identity, machine._exits())
        if adopted:
            machine._watch(adopted)
        else:
            machine.start()
            earlier_boot = identity is not None and identity.boot_id != boot_id()
            machine.post(Ended(None, None, with_host=earlier_boot))
        return machine

    @classmethod
    def remember(cls, spec: VmSpec, files: VmFiles, state: VmState) -> Machine:
        """A QEMU that has ended and whose end is on record."""
        machine = cls(spec, files, Patience(), state)
        machine.start()
        return machine

    # What it is like

    @property
    def run(self) -> Runstate:
        """The runstate."""
        return self._state.run

    @property
    def pid(self) -> int | None:
        """QEMU's process id, while it runs."""
        running = self._process is not None and self._process.exit is None
        return self._process.pid if running and self._process else None

    @property
    def identity(self) -> ProcessId | None:
        """What a later agent recognises the process by."""
        return self._process.identity if self._process else None

    # What can be asked of it

    async def pause(self) -> None:
        """Stops the processors. Raises StateConflict, Unavailable or OutcomeUnknown."""
        await self._ask(Request.PAUSE)

    async def resume(self) -> None:
        """Lets a paused guest run on. Raises StateConflict, Unavailable or OutcomeUnknown."""
        await self._ask(Request.RESUME)

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Asks the guest to power off and waits for the end; see `qemu.decide` for the rest.

        Raises StateConflict when the guest cannot react, OutcomeUnknown when QEMU does not end.
        """
        await self._ask(Request.STOP, grace_s=grace_s)
        await self._wait_end(grace_s + QUIT_DEADLINE_S + KILL_DEADLINE_S)

    async def kill(self, because: str = ON_REQUEST) -> None:
        """Ends QEMU at once, in whatever state. Raises OutcomeUnknown when QEMU does not end."""
        await self._ask(Request.KILL, because=because)
        await self._wait_end(KILL_DEADLINE_S)

    async def wait_ended(self, timeout_s: float | None = None) -> None:
        """Waits for QEMU's end. Raises Unavailable at the deadline."""
        await self.changes.wait_until(
            lambda: self.run.is_end, timeout_s=timeout_s, what=f"the end of VM {self.name}"
        )

    async def wait_state(self, *states: Runstate, timeout_s: float) -> None:
        """Waits for one of `states`. Raises Unavailable at the deadline, or when the VM ends."""
        await self.changes.wait_until(
            lambda: self.run in states or self.run.is_end,
            timeout_s=timeout_s,
            what=f"VM {self.name} to be {' or '.join(state.value for state in states)}",
        )
        if self.run not in states:
            raise Unavailable(f"VM {self.name} has ended: {self._state.why}")

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """A monitor command that does not change the runstate. Raises as `qmp.Monitor` does."""
        return await self._link.execute(command, arguments)

    def suspend(self, *, on: bool) -> None:
        """Stops the whole process (SIGSTOP), so that QEMU does nothing by itself either; with
        `on=False` the process goes on.
        """
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP if on else signal.SIGCONT)

    def listen(self, listener: Listener | None) -> None:
        """Has every event of QEMU passed to one listener, with its data; None ends that."""
        self._listener = listener

    # Work that takes several steps

    async def hold(self, request: Request) -> None:
        """Keeps others from changing the VM until `release`. Raises StateConflict."""
        await self._ask(request)

    def release(self, status: str) -> None:
        """Ends `hold`; `status` is the runstate that QEMU tells, by QEMU's own word for it."""
        self.post(Released(status))

    @property
    def held(self) -> bool:
        """Whether the VM is held, and is not about to end."""
        state = self._state
        return state.held is not None and not state.killed_because and not state.run.is_end

    async def switch(self, successor: Successor) -> Process:
        """Kills QEMU; from now on `successor` is the VM. Gives the killed process.

        Raises StateConflict when the VM has ended, or is to end: nothing was done then.
        """
        before = self._process
        assert before is not None
        ticket, reply = self._replies.open()
        self._successors[ticket] = successor
        self.post(Asked(Request.SWITCH, ticket=ticket))
        await reply
        return before

    async def link(self) -> None:
        """Connects to the monitor of the QEMU that took over. Raises Unavailable."""
        if self.run.is_end:
            return
        self._link = self._new_link()
        self._linking = self.keep(self._link.run(), "monitor")
        await self._link.wait_connected(self._patience.connect_s)

    def _new_link(self) -> Link:
        told = partial(self._told, self._state.qemu)
        devices = [disk_id(disk) for disk in self.spec.disks if disk.name not in self._absent]
        return Link(
            self.files.monitor,
            self.name,
            devices,
            self._patience,
            told,
            self._heard,
            lambda: self.pid,
        )

    def _told(self, qemu: int, event: Heard) -> None:
        self.post(replace(event, qemu=qemu))

    def _heard(self, name: str, data: Mapping[str, Any]) -> None:
        if self._listener is not None:
            self._listener(name, data)

    async def detach(self) -> None:
        """Leaves QEMU running, for another agent to adopt; or ends the tasks after its end."""
        await super().detach()
        if self._process is not None:
            self._process.forget()
        text = f"nobody looks after VM {self.name} any more"
        self._replies.close(OutcomeUnknown(text, remedy=f"ask again: semper vm show {self.name}"))

    async def _ask(
        self, request: Request, *, grace_s: float = 0.0, because: str = ON_REQUEST
    ) -> None:
        ticket, reply = self._replies.open()
        self.post(Asked(request, grace_s, because, ticket))
        await reply

    async def _wait_end(self, timeout_s: float) -> None:
        try:
            await self.wait_ended(timeout_s)
        except Unavailable as error:
            raise OutcomeUnknown(
                f"VM {self.name}: QEMU (pid {self.pid}) does not end",
                remedy="nothing of it may be started elsewhere; look at /proc/PID/stack",
            ) from error

    # What an owner is made of (`host.owner`)

    def decide(self, state: VmState, event: VmEvent, now: float) -> Decision:
        """See `qemu.decide`."""
        return decide(state, event, now)

    def wake_at(self, state: VmState) -> float | None:
        """When `stop` turns to the next, harder means: quit, then SIGKILL."""
        return state.deadline

    def tick(self) -> VmEvent:
        """Time passed."""
        return Tick()

    def carry_out(self, effect: VmEffect) -> None:
        """Does an effect, or begins it."""
        match effect:
            case Execute(command):
                self.keep(self._execute(command, self._link, self._state.qemu), command)
            case KillProcess():
                if self._process is not None:
                    self._process.send_signal(signal.SIGKILL)
            case SwitchProcess(ticket):
                self._switch(self._successors.pop(ticket))
            case Accept(ticket):
                self._replies.answer(ticket)
            case Refuse(ticket):
                self._successors.pop(ticket, None)
                self._replies.answer(ticket, self._refusal(effect))
            case _:
                assert_never(effect)

    def after_step(self, before: VmState) -> None:
        """Notes each change of the runstate, and each device that is gone."""
        state = self._state
        for device in sorted(state.gone - before.gone):
            self.journal.note(time.time(), "device", f"{device} was unplugged by the guest")
            log.warning("vm name=%s %s was unplugged by the guest", self.name, device)
        if state.run is before.run:
            return
        text = f"{before.run.value} -> {state.run.value}" + (f": {state.why}" if state.why else "")
        self.journal.note(time.time(), "state", text)
        bad = state.run in (Runstate.CRASHED, Runstate.UNKNOWN, Runstate.HALTED)
        log.log(logging.WARNING if bad else logging.INFO, "vm name=%s %s", self.name, text)

    def _watch(self, started: Process) -> None:
        self._process = started
        self.start()
        self.keep(self._bound_logs(), "logs")
        self._linking = self.keep(self._link.run(), "monitor")

    def _switch(self, successor: Successor) -> None:
        before = self._process
        assert before is not None
        self._process = successor.process
        successor.on_exit(self._exits())
        before.send_signal(signal.SIGKILL)
        self._end_link()

    def _end_link(self) -> None:
        if self._linking is not None:
            self._linking.cancel()
            self._linking = None

    def _refusal(self, effect: Refuse) -> SempervirtError:
        message = f"cannot {effect.request.value} VM {self.name}: {effect.reason}"
        match effect.kind:
            case Refusal.UNKNOWN:
                return OutcomeUnknown(
                    message, remedy=f"look again with: semper vm show {self.name}"
                )
            case Refusal.NOT_DONE:
                return Unavailable(message)
            case Refusal.CONFLICT if self.run is Runstate.UNKNOWN:
                return StateConflict(
                    message,
                    remedy=f"see why: semper vm show {self.name}; the VM is asked again all the "
                    f"time; only if it is to be given up: semper vm kill {self.name}",
                )
            case Refusal.CONFLICT if effect.request is Request.STOP and not self.run.is_end:
                return StateConflict(message, remedy="resume it first, or kill it")
            case Refusal.CONFLICT:
                return StateConflict(message)
            case _:
                assert_never(effect.kind)

    async def _execute(self, command: str, link: Link, qemu: int) -> None:
        try:
            await link.execute(command)
        except OutcomeUnknown as error:
            self.post(Silent(error.message, qemu=qemu))
        except SempervirtError as error:
            self.post(NotDone(error.message, qemu=qemu))
        else:
            self.post(Done(qemu=qemu))

    def _exits(self) -> Callable[[Exit], None]:
        """What is to be called at the end of the present QEMU."""
        return partial(self._exited, self._state.qemu)

    def _exited(self, qemu: int, end: Exit) -> None:
        if qemu == self._state.qemu:  # an earlier one was killed, and nobody listens to it
            self.keep(self._finish(qemu, end), "end")

    async def _finish(self, qemu: int, end: Exit) -> None:
        with contextlib.suppress(Unavailable):
            await self._link.wait_disconnected(DRAIN_S)
        self._end_link()
        self.post(Ended(end.code, end.signal, qemu=qemu))

    async def _bound_logs(self) -> None:
        while True:
            for path in self.files.all_logs():
                try:
                    process.bound_log(path, LOG_LIMIT_BYTES)
                except OSError as error:  # no room, say: the VM runs on, and its log grows
                    log.warning("log vm=%s file=%s not shortened: %s", self.name, path, error)
            await asyncio.sleep(HOUSEKEEPING_S)
