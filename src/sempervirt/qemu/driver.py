"""A running VM: one owner task that carries out what `runstate` decides.

Requests, the monitor's events and QEMU's end arrive in one queue; only the task that drains
it changes the VM's state. Commands to the monitor run beside it, so that `kill` never waits
for a monitor that hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any

from sempervirt.core.errors import OutcomeUnknown, SempervirtError, StateConflict, Unavailable
from sempervirt.core.events import Journal
from sempervirt.host import background, process
from sempervirt.host.changes import Changes
from sempervirt.host.process import Exit, Process
from sempervirt.host.procfs import ProcessId
from sempervirt.qemu.decide import QUIT_DEADLINE_S, step
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.link import Link, Patience
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import (
    ON_REQUEST,
    Accept,
    Asked,
    Done,
    Ended,
    Execute,
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

Reply = asyncio.Future[None]
Listener = Callable[[str, Mapping[str, Any]], None]


class Machine:
    """One QEMU process, from its start to its end; made by `launch` or `adopt`."""

    def __init__(self, spec: VmSpec, files: VmFiles, patience: Patience) -> None:
        self.spec = spec
        self.name = spec.name
        self.files = files
        self.started = time.time()
        self.journal = Journal()
        self.changes = Changes()
        self._state = VmState()
        self._process: Process | None = None
        self._queue: asyncio.Queue[tuple[VmEvent, Reply | None]] = asyncio.Queue()
        self._pending: Reply | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._patience = patience
        self._link = self._new_link(files)
        self._tasks: set[asyncio.Task[None]] = set()
        self._linking: asyncio.Task[None] | None = None
        self._successor: Successor | None = None
        self._era = 0
        self._listener: Listener | None = None

    @classmethod
    def launch(
        cls, spec: VmSpec, files: VmFiles, argv: Sequence[str], patience: Patience, memory_fd: int
    ) -> Machine:
        """Starts QEMU. Raises CommandFailed when the program cannot be started."""
        machine = cls(spec, files, patience)
        started = process.spawn(
            argv, log=files.log, on_exit=machine._exits(), pass_fds=(memory_fd,)
        )
        machine._watch(started)
        return machine

    @classmethod
    def inherit(
        cls, spec: VmSpec, files: VmFiles, successor: Successor, patience: Patience
    ) -> Machine:
        """Becomes the owner of a QEMU that holds a state and waits. It is `linked` later."""
        machine = cls(spec, files, patience)
        machine._state = VmState(run=Runstate.UNKNOWN, why="it takes over, and was not asked yet")
        machine._process = successor.process
        machine._keep(machine._own(), "owner")
        machine._keep(machine._bound_logs(), "logs")
        successor.bequeath(machine._exits())
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

        With `held` nobody may touch it before that work has gone on and released it. `leaving` is
        why the former agent was about to kill it, if it was.
        """
        machine = cls(spec, files, patience)
        why = "adopted, and not asked yet"
        machine._state = VmState(Runstate.UNKNOWN, why, held=held, killed_because=leaving)
        adopted = identity and process.adopt(identity, machine._exits())
        if adopted:
            machine._watch(adopted)
        else:
            machine._keep(machine._own(), "owner")
            machine._post(Ended(None, None))
        return machine

    @classmethod
    def remember(cls, spec: VmSpec, files: VmFiles, state: VmState) -> Machine:
        """A QEMU that has ended and whose end is on record."""
        machine = cls(spec, files, Patience())
        machine._state = state
        machine._keep(machine._own(), "owner")
        return machine

    # What it is like

    @property
    def state(self) -> VmState:
        """What the state machine knows."""
        return self._state

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
        await self._ask(Asked(Request.PAUSE))

    async def resume(self) -> None:
        """Lets a paused guest run on. Raises StateConflict, Unavailable or OutcomeUnknown."""
        await self._ask(Asked(Request.RESUME))

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Asks the guest to power off and waits for the end; see `runstate` for the rest.

        Raises StateConflict when it cannot react, OutcomeUnknown when QEMU does not end.
        """
        await self._ask(Asked(Request.STOP, grace_s))
        await self._wait_end(grace_s + QUIT_DEADLINE_S + KILL_DEADLINE_S)

    async def kill(self, because: str = ON_REQUEST) -> None:
        """Ends QEMU at once, whatever its state. Raises OutcomeUnknown if that has no effect."""
        await self._ask(Asked(Request.KILL, because=because))
        await self._wait_end(KILL_DEADLINE_S)

    async def wait_ended(self, timeout_s: float | None = None) -> None:
        """Waits for QEMU's end. Raises Unavailable at the deadline."""
        await self.changes.wait_until(
            lambda: self.run.is_end, timeout_s=timeout_s, what=f"the end of VM {self.name}"
        )

    async def wait_state(self, *states: Runstate, timeout_s: float) -> None:
        """Waits for one of `states`. Raises Unavailable at the deadline, or if it ended first."""
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
        """Keeps QEMU, with all that it might do by itself, from running (SIGSTOP); or no more."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP if on else signal.SIGCONT)

    def listen(self, listener: Listener | None) -> None:
        """Has every event of QEMU passed to one listener, with its data; None ends that."""
        self._listener = listener

    # Work that takes several steps

    async def hold(self, request: Request) -> None:
        """Keeps others from changing the VM until `release`. Raises StateConflict."""
        await self._ask(Asked(request))

    def release(self, status: str) -> None:
        """Ends `hold`; `status` is what QEMU says that it does."""
        self._post(Released(status))

    @property
    def held(self) -> bool:
        """Whether the VM is still there for the work that it is held for."""
        state = self._state
        return state.held is not None and not state.killed_because and not state.run.is_end

    async def switch(self, successor: Successor) -> Process:
        """Kills QEMU; from now on `successor` is the VM. Gives the killed process.

        Raises StateConflict when the VM has ended, or is to end: nothing was done then.
        """
        before = self._process
        assert before is not None
        self._successor = successor
        try:
            await self._ask(Asked(Request.SWITCH))
        finally:
            self._successor = None
        return before

    async def link(self) -> None:
        """Connects to the monitor of the QEMU that took over. Raises Unavailable."""
        if self.run.is_end:
            return
        self._link = self._new_link(self.files)
        self._linking = self._keep(self._link.run(), "monitor")
        await self._link.wait_connected(self._patience.connect_s)

    def _new_link(self, files: VmFiles) -> Link:
        return Link(files.monitor, self.name, self._patience, self._post, self._heard)

    def _heard(self, name: str, data: Mapping[str, Any]) -> None:
        if self._listener is not None:
            self._listener(name, data)

    def _switch(self) -> None:
        before, successor = self._process, self._successor
        assert before is not None
        assert successor is not None
        self._process = successor.process
        successor.bequeath(self._exits())
        before.send_signal(signal.SIGKILL)
        if self._linking is not None:
            self._linking.cancel()
            self._linking = None

    async def detach(self) -> None:
        """Leaves QEMU running, for another agent to adopt; or ends the tasks after its end."""
        if self._timer is not None:
            self._timer.cancel()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._process is not None:
            self._process.forget()

    async def _ask(self, event: Asked) -> None:
        reply: Reply = asyncio.get_running_loop().create_future()
        self._post(event, reply)
        await reply

    async def _wait_end(self, timeout_s: float) -> None:
        try:
            await self.wait_ended(timeout_s)
        except Unavailable as error:
            raise OutcomeUnknown(
                f"VM {self.name}: QEMU (pid {self.pid}) does not end",
                remedy="nothing of it may be started elsewhere; look at /proc/PID/stack",
            ) from error

    # The owner task

    def _watch(self, started: Process) -> None:
        self._process = started
        self._keep(self._own(), "owner")
        self._keep(self._bound_logs(), "logs")
        self._linking = self._keep(self._link.run(), "monitor")

    def _post(self, event: VmEvent, reply: Reply | None = None) -> None:
        self._queue.put_nowait((event, reply))

    async def _own(self) -> None:
        while True:
            event, reply = await self._queue.get()
            before = self._state
            now = time.monotonic()
            self._state, effects = step(before, event, now)
            if reply is not None and self._state.pending is not None and not before.pending:
                self._pending, reply = reply, None
            for effect in effects:
                self._carry_out(effect, reply)
            if self._state.run is not before.run:
                self._changed(before.run)
            self._rearm()
            self.changes.notify()

    def _carry_out(self, effect: VmEffect, reply: Reply | None) -> None:
        match effect:
            case Execute(command):
                self._keep(self._execute(command), command)
            case KillProcess():
                if self._process is not None:
                    self._process.send_signal(signal.SIGKILL)
            case SwitchProcess():
                self._switch()
            case Accept():
                self._answer(reply, None)
            case Refuse():
                self._answer(reply, self._refusal(effect))

    def _answer(self, reply: Reply | None, error: SempervirtError | None) -> None:
        if reply is None:
            reply, self._pending = self._pending, None
        if reply is None or reply.done():
            return
        if error is None:
            reply.set_result(None)
        else:
            reply.set_exception(error)

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
                return StateConflict(message, remedy=f"settle it: semper vm kill {self.name}")
            case Refusal.CONFLICT if effect.request is Request.STOP and not self.run.is_end:
                return StateConflict(message, remedy="resume it first, or kill it")
            case Refusal.CONFLICT:
                return StateConflict(message)

    async def _execute(self, command: str) -> None:
        try:
            await self._link.execute(command)
        except OutcomeUnknown as error:
            self._post(Silent(error.message))
        except SempervirtError as error:
            self._post(NotDone(error.message))
        else:
            self._post(Done())

    def _changed(self, before: Runstate) -> None:
        state = self._state
        text = f"{before.value} -> {state.run.value}" + (f": {state.why}" if state.why else "")
        self.journal.note(time.time(), "state", text)
        bad = state.run in (Runstate.CRASHED, Runstate.UNKNOWN, Runstate.HALTED)
        log.log(logging.WARNING if bad else logging.INFO, "vm name=%s %s", self.name, text)

    def _rearm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._state.deadline is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._state.deadline, self._post, Tick())

    def _exits(self) -> Callable[[Exit], None]:
        """What is told of the end of this machine's QEMU, until another one has followed it."""
        self._era += 1
        return partial(self._exited, self._era)

    def _exited(self, era: int, end: Exit) -> None:
        if era == self._era:
            self._keep(self._finish(end), "end")

    async def _finish(self, end: Exit) -> None:
        with contextlib.suppress(Unavailable):
            await self._link.wait_disconnected(DRAIN_S)
        if self._linking is not None:
            self._linking.cancel()
        self._post(Ended(end.code, end.signal))

    async def _bound_logs(self) -> None:
        while True:
            for path in (self.files.console_log, self.files.log):
                process.bound_log(path, LOG_LIMIT_BYTES)
            await asyncio.sleep(HOUSEKEEPING_S)

    def _keep(self, work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        task = background.start(work, f"{self.name}: {what}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
