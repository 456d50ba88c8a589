"""A disk of a running VM: the owner that carries out what `decide` decides.

The agent holds the listening socket; every backend inherits it, and QEMU connects to it again by
path after each take-over. What became of the processes arrives as events (`host.owner`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, assert_never

from sempervirt.core.errors import (
    InvalidRequest,
    OutcomeUnknown,
    SempervirtError,
    StateConflict,
    Unavailable,
)
from sempervirt.core.events import Journal
from sempervirt.core.queue_map import Binding, DevicePlan, check_map, format_map
from sempervirt.disk import takeover
from sempervirt.disk.backend import ImageTitle
from sempervirt.disk.backends import Backends
from sempervirt.disk.decide import condition, decide, next_wake
from sempervirt.disk.program import Programs, is_installed, path_of
from sempervirt.disk.running import Running
from sempervirt.disk.setup import DiskSetup
from sempervirt.disk.state import (
    Condition,
    Decision,
    Effect,
    Freeze,
    Kill,
    Rebind,
    Rebound,
    Refused,
    Start,
    State,
    StopAsked,
    Stopped,
    SupervisionEvent,
    Terminate,
    Thaw,
    Tick,
    TookOver,
    UpgradeAsked,
    UpgradeEnded,
    UpgradeRefused,
)
from sempervirt.disk.takeover import Restart
from sempervirt.disk.upgrade import check_binary
from sempervirt.host import control
from sempervirt.host.owner import Owner, Replies
from sempervirt.host.records import remove_record

log = logging.getLogger(__name__)

RESTARTS_KEPT = 64
# Beyond the deadlines of supervision itself; only a process stuck in the kernel takes longer.
STOP_DEADLINE_S = 40.0
# Until some backend moves its queues; longer than a take-over and its replay.
REBIND_DEADLINE_S = 15.0
REBIND_RETRY_S = 0.05
FREEZE_DEADLINE_S = 10.0
# Every page of the guest is compared before an export begins: seconds for each GiB.
MAP_DEADLINE_S = 600.0


class Disk(Owner[State, SupervisionEvent, Effect]):
    """Made by `lifecycle.start_disk` or `lifecycle.adopt_disk`; ends with `stop` or `detach`."""

    def __init__(
        self,
        setup: DiskSetup,
        listener: socket.socket,
        programs: Programs,
        state: State,
        restarts: int = 0,
    ) -> None:
        super().__init__(f"disk {setup.name}", state)
        self.setup = setup
        self.name = setup.name
        self.journal = Journal()
        self.restarts: deque[Restart] = deque(maxlen=RESTARTS_KEPT)
        self.restart_count = restarts
        self.upgrade_count = 0
        self.last_error: dict[str, Any] | None = None
        self.reason = ""
        self.refused: str | None = None
        self.stopped = False
        self.backends = Backends(setup, listener, programs, self.post, self._seen)
        self._replies = Replies()
        self._rebinding = asyncio.Lock()
        self.start()

    # What it is like

    @property
    def condition(self) -> Condition:
        """How the disk is served, and whether a spare stands by."""
        return condition(self._state, self.setup.policy)

    @property
    def plan(self) -> DevicePlan | None:
        """How the queues are to be served; None: as the program does by itself."""
        plan, binding = self.setup.plan, self._state.binding
        return replace(plan, binding=binding) if plan and binding else plan

    @property
    def generation(self) -> int:
        """The generation of the active process, 0 when there is none."""
        return self._state.active.generation if self._state.active else 0

    @property
    def active_pid(self) -> int | None:
        """The process that serves."""
        return self._pid(self._state.active.generation if self._state.active else None)

    @property
    def spare_pid(self) -> int | None:
        """The process that waits to take over."""
        return self._pid(self._state.spare.generation if self._state.spare else None)

    @property
    def spare_ready(self) -> bool:
        """Whether a spare has prepared everything."""
        return self._state.spare is not None and self._state.spare.ready

    @property
    def binary(self) -> str:
        """The path of the program that serves, or that will."""
        return path_of(self._token)

    @property
    def upgrade_available(self) -> bool:
        """Whether the installed program is another one than the one that serves."""
        return not is_installed(self._token, self.setup.command.binary())

    @property
    def _token(self) -> str:
        return self._state.active.binary if self._state.active else self._state.binary

    def _pid(self, generation: int | None) -> int | None:
        member = self.backends.get(generation)
        return None if member is None else member.pid

    async def status(self) -> dict[str, Any]:
        """The active backend's own status, asked now. Raises Unavailable, OutcomeUnknown."""
        return await self._ask("status")

    async def inject_fault(self, rule: dict[str, Any] | None) -> None:
        """For tests: sets or removes the active backend's fault rule (see semper-blkd)."""
        await self._ask("fault", rule=rule)

    async def block_map(self) -> dict[str, Any]:
        """What the active backend knows of blocks in the guest's pages, in numbers."""
        return await self._ask("map")

    async def verify_block_map(self) -> None:
        """Begins to compare every page with the disk, unless that is going on; `block_map` tells
        how far it is.
        """
        await self._ask("map-verify")

    def export_block_map(self, *, verify: bool) -> AsyncIterator[bytes]:
        """The map in its binary form (docs/reference/map-format.md), in pieces."""
        return control.download(
            self._active().control, "map-export", timeout_s=MAP_DEADLINE_S, verify=verify
        )

    def _active(self) -> Running:
        member = self.backends.get(self.generation)
        if member is None:
            raise Unavailable(f"disk {self.name} has no active backend now: {self.reason}")
        return member

    async def _ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        return await control.ask(self._active().control, command, **arguments)

    # What can be asked of it

    async def wait_serving(self, timeout_s: float) -> None:
        """Waits until a backend serves. Raises Unavailable at the deadline."""
        await self._wait(
            lambda: self._state.active is not None and self._state.active.serving_since is not None,
            timeout_s,
            "a serving backend",
        )

    async def wait_spare_ready(self, timeout_s: float) -> None:
        """Waits until a backend serves and a spare is ready. Raises Unavailable."""
        await self._wait(lambda: self.condition is Condition.GUARDED, timeout_s, "a spare")

    async def _wait(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        what = f"{what} of disk {self.name}"
        try:
            await self.changes.wait_until(condition, timeout_s=timeout_s, what=what)
        except Unavailable as error:
            last = f", last end: {self.reason}" if self.reason else ""
            text = f"{error.message}; it is {self.condition.value}{last} ({self._state})"
            raise Unavailable(text) from error

    async def upgrade(self, binary: str | None = None) -> None:
        """Serves from another binary (by default the installed one); the guest goes on.

        Returns when the new one serves. Raises StateConflict when the disk is not served or
        is being upgraded, Unavailable when the new one failed: then the old binary serves.
        """
        chosen = binary or self.setup.command.binary()
        await check_binary(chosen, self.setup.options)
        ticket, ended = self._replies.open()
        self.post(UpgradeAsked(self.backends.programs.hold(chosen), ticket))
        await ended
        self.upgrade_count += 1

    async def rebind(self, binding: Binding) -> None:
        """Moves queues to other threads; the guest goes on, and no request is lost.

        Returns when the active backend has done so; the spare and all later ones follow, also
        after a restart of the agent. Raises InvalidRequest for a map that does not fit,
        Unavailable or OutcomeUnknown when no backend did it by the deadline: the former map
        stays the one that counts.
        """
        try:
            check_map(binding.map, self.setup.options.queues)
        except ValueError as error:
            raise InvalidRequest(f"disk {self.name}: {error}") from error
        async with self._rebinding:
            await self._rebind_active(binding)
            self.post(Rebound(binding))
            await self._wait(lambda: self._state.binding == binding, REBIND_DEADLINE_S, "a record")
        text = f"{format_map(binding.map)} ({binding.source})"
        self.journal.note(time.time(), "threads", text)
        log.info("threads disk=%s %s", self.name, text)

    async def _rebind_active(self, binding: Binding) -> None:
        """Asks until one does it: a backend that dies meanwhile has a successor."""
        deadline = time.monotonic() + REBIND_DEADLINE_S
        while True:
            try:
                await self._ask("threads", map=list(binding.map))
            except (Unavailable, OutcomeUnknown):
                if self._state.stopping or time.monotonic() >= deadline:
                    raise
            else:
                return
            await asyncio.sleep(REBIND_RETRY_S)

    async def freeze(self) -> None:
        """Ends the spare; from now on nothing is started, and nobody waits for the image.

        Raises StateConflict while the disk is being upgraded, Unavailable.
        """
        if self._state.upgrade is not None:
            raise StateConflict(f"disk {self.name} is being upgraded", remedy="wait for its end")
        self.post(Freeze())
        await self._wait(
            lambda: self._state.frozen and self._state.spare is None,
            FREEZE_DEADLINE_S,
            "the end of the spare",
        )

    def thaw(self) -> None:
        """The disk has a spare again, and successors."""
        self.post(Thaw())

    async def arm_release(self, *, armed: bool) -> bool:
        """Has the active backend let go of the image as soon as the guest stands still, or keep it.

        Gives whether it holds the image now. Raises Unavailable, when another one has it too, and
        OutcomeUnknown.
        """
        return bool((await self._ask("handover", armed=armed))["owns_image"])

    def set_title(self, title: ImageTitle) -> None:
        """From now on backends are started by this right."""
        self.setup = replace(self.setup, title=title)
        self.backends.set_title(title)

    async def claim(self, title: ImageTitle) -> None:
        """As `entitle`, and the backend that awaits its claim gets it.

        If there is none any more, the next one will have it: then the disk is thawed. Raises
        Unavailable and OutcomeUnknown, as often as it is asked again.
        """
        self.set_title(title)
        if self._state.active is None:
            self.thaw()
            return
        await self._ask("claim", epoch=title.epoch, claim=title.claim)

    async def stop(self) -> None:
        """Ends all backends, the active one after draining.

        Raises OutcomeUnknown when a process does not end; the disk must then not be served
        elsewhere.
        """
        self.post(StopAsked())
        try:
            await self.changes.wait_until(
                lambda: self.stopped, timeout_s=STOP_DEADLINE_S, what="the backends' end"
            )
        except Unavailable as error:
            pids = [pid for pid in (self.active_pid, self.spare_pid) if pid]
            raise OutcomeUnknown(
                f"disk {self.name}: the backend {pids} does not end",
                remedy="look at its kernel stack in /proc/PID/stack; the storage may hang",
            ) from error
        await self.detach()
        self.setup.files.socket.unlink(missing_ok=True)
        self.setup.files.touched.unlink(missing_ok=True)
        remove_record(self.setup.record)

    async def detach(self) -> None:
        """Leaves the backends running, for another agent to adopt."""
        await super().detach()
        self._replies.close(Unavailable(f"nobody looks after disk {self.name} any more"))
        self.backends.release()

    # The shell's

    def decide(self, state: State, event: SupervisionEvent, now: float) -> Decision:
        """See `decide.decide`."""
        return decide(state, event, now, self.setup.policy)

    def record(self, before: State, after: State) -> bool:
        """Writes down what was decided. A record that cannot be written must not end supervision:
        the next agent finds the processes by their sockets.
        """
        if not self.stopped:
            self.backends.record(after, self.restart_count)
        return True

    def after_step(self, before: State) -> None:
        """Writes down the processes that were started."""
        self.record(before, self._state)

    def wake_at(self, state: State) -> float | None:
        """See `decide.next_wake`."""
        return next_wake(state)

    def tick(self) -> SupervisionEvent:
        """Time passed."""
        return Tick()

    def carry_out(self, effect: Effect) -> None:
        """Starts, signals and tells; nothing of it waits."""
        match effect:
            case Start(generation):
                active = self.generation == generation
                self.backends.start(effect, self._state.binding, active=active)
            case Rebind(generation):
                self.keep(self._follow(self.backends.get(generation)), "threads of the spare")
            case Terminate(generation):
                self.backends.send_signal(generation, signal.SIGTERM)
            case Kill(generation):
                self.backends.send_signal(generation, signal.SIGKILL)
            case TookOver():
                self._took_over(effect)
            case Refused(reason):
                self.refused = reason
            case UpgradeEnded(failure, ticket):
                self._upgrade_ended(failure, ticket)
            case UpgradeRefused(reason, ticket):
                error = StateConflict(f"disk {self.name} is not upgraded: {reason}")
                self._replies.answer(ticket, error)
            case Stopped():
                self.stopped = True
            case _:
                assert_never(effect)

    def _took_over(self, event: TookOver) -> None:
        now = time.time()
        self.reason = event.reason
        pid = self._pid(event.successor)
        self.restarts.append(
            Restart(
                time=now,
                generation=event.predecessor,
                reason="upgrade" if event.planned else event.reason,
                planned=event.planned,
                successor=event.successor,
                successor_pid=pid,
                seen_ns=time.monotonic_ns(),
            )
        )
        if not event.planned:
            self.restart_count += 1
        if event.successor is not None:
            self.backends.promote(event.successor)
        text = f"backend {event.predecessor} ended ({event.reason}); " + (
            f"backend {event.successor} takes over" if event.successor else "backing off"
        )
        self.journal.note(now, "upgrade" if event.planned else "restart", text)
        level = logging.INFO if event.planned else logging.WARNING
        log.log(level, "takeover disk=%s %s", self.name, text)

    def _upgrade_ended(self, failure: str, ticket: int) -> None:
        text = f"not upgraded: {failure}" if failure else f"upgraded to {self.binary}"
        self.journal.note(time.time(), "upgrade", text)
        log.log(logging.ERROR if failure else logging.INFO, "upgrade disk=%s %s", self.name, text)
        self._replies.answer(ticket, Unavailable(f"disk {self.name}: {text}") if failure else None)

    async def _follow(self, member: Running | None) -> None:
        """Tells a process the present map. If that fails, it is told once it serves."""
        async with self._rebinding:
            if member is None or self._state.binding is None:
                return
            with contextlib.suppress(SempervirtError):
                thread_map = list(self._state.binding.map)
                await control.ask(member.control, "threads", map=thread_map)

    def _seen(self, member: Running, status: dict[str, Any]) -> None:
        """The active process told its status."""
        # Never set back: a backend that has just taken over is not connected *yet*.
        self.backends.connected |= status.get("state") in takeover.CONNECTED_STATES
        error = status.get("last_error")
        if error and error != self.last_error:
            self.last_error = error
            text = f"{error.get('op')} at {error.get('offset')}: {error.get('message')}"
            self.journal.note(time.time(), "io-error", text)
            log.warning("io-error disk=%s backend=%d %s", self.name, member.generation, text)
        bound = takeover.thread_map(status)
        wanted = self._state.binding
        if wanted and bound and bound != wanted.map and not self._rebinding.locked():
            self.keep(self._follow(member), "threads")
        if self.restarts and self.restarts[-1].successor == member.generation:
            restart = self.restarts[-1]
            restart.milestones_ms = takeover.milestones(status["timeline_ns"], restart.seen_ns)
            restart.replayed = takeover.replayed_count(status)
        self.changes.notify()
