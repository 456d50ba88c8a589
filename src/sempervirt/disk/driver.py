"""The owner of a disk of a running VM: carries out what `disk.decide` decides.

The agent holds the listening socket; every backend inherits it, and QEMU connects to it again by
path after each take-over. What became of the processes arrives as events (`host.owner`).
"""

from __future__ import annotations

import contextlib
import signal
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import assert_never

from sempervirt.core.errors import (
    InvalidRequest,
    OutcomeUnknown,
    SempervirtError,
    StateConflict,
    Unavailable,
)
from sempervirt.core.events import Journal
from sempervirt.core.failure import Failure
from sempervirt.core.queue_map import Binding, DevicePlan, check_map
from sempervirt.disk import takeover
from sempervirt.disk.answers import BlockMap, LastError, Resized, Status
from sempervirt.disk.backend import ImageTitle
from sempervirt.disk.backends import Backends
from sempervirt.disk.client import BackendClient
from sempervirt.disk.decide import condition, decide, next_wake
from sempervirt.disk.held_image import LOOK_S, HeldImage
from sempervirt.disk.history import History
from sempervirt.disk.program import Programs, is_installed, path_of
from sempervirt.disk.running import Running
from sempervirt.disk.setup import DiskSetup
from sempervirt.disk.state import (
    NOT_SERVED,
    Accept,
    Condition,
    Connected,
    Decision,
    Effect,
    Freeze,
    Kill,
    MapSeen,
    Noted,
    RebindAsked,
    RebindEnded,
    Refuse,
    Start,
    State,
    StopAsked,
    SupervisionEvent,
    Tell,
    Terminate,
    Thaw,
    Tick,
    Told,
    TookOver,
    UpgradeAsked,
    UpgradeEnded,
)
from sempervirt.disk.takeover import Restart
from sempervirt.disk.upgrade import check_binary
from sempervirt.host.owner import HOST_CLOCK, Clock, Owner, Replies
from sempervirt.host.records import remove_record
from sempervirt.host.sockets import discard

# Beyond the deadlines of supervision itself; only a process stuck in the kernel takes longer.
STOP_DEADLINE_S = 40.0
FREEZE_DEADLINE_S = 10.0


class Disk(Owner[State, SupervisionEvent, Effect]):
    """Made by `lifecycle.start_disk` or `lifecycle.adopt_disk`; ends with `stop` or `detach`.

    Beside the state there are handles, and nothing is decided by them: the processes and the
    programs that they were started from (`backends`), the file that they serve (`image`), what
    happened (`history`), and in `setup` the title by which the next backend is started. `doubt` is
    why the record that the disk was adopted from could not be believed; "" where it could.
    """

    def __init__(
        self,
        setup: DiskSetup,
        image: HeldImage,
        listener: socket.socket,
        programs: Programs,
        state: State,
        clock: Clock = HOST_CLOCK,
    ) -> None:
        super().__init__(f"disk {setup.name}", state, clock)
        self.setup = setup
        self.name = setup.name
        self.history = History(setup.name)
        self.image = image
        self.backends = Backends(setup, image, listener, programs, self)
        self._served_bytes: int | None = None
        self._front_end = False
        self.doubt = ""
        self._replies = Replies()

    # What it is like

    @property
    def condition(self) -> Condition:
        """How the disk is served, and whether a spare stands by."""
        return condition(self._state, self.setup.policy)

    @property
    def reason(self) -> str:
        """Why the active process does not get on, or why the last one ended; "" while neither is
        so.
        """
        if self._state.active is not None and (stall := self._state.active.stall) is not None:
            for_s = self._clock.now() - stall.since
            return f"{stall.blame.value}, since {for_s:.0f} s: {stall.evidence}"
        return self._state.last_end

    @property
    def ailment(self) -> str:
        """Why guests wait for the disk, in plain words; "" when the disk is served."""
        condition = self.condition
        if condition not in NOT_SERVED:
            return ""
        cause = self.reason or "its backend takes over"
        return f"disk {self.name} is {condition.value}: {cause}"

    @property
    def restart_count(self) -> int:
        """How many take-overs there were that nobody had asked for, also under earlier agents."""
        return self._state.restarts

    @property
    def upgrade_count(self) -> int:
        """How many upgrades had success since this agent looks after the disk."""
        return self.history.upgrade_count

    @property
    def restarts(self) -> deque[Restart]:
        """The last changes of the active process, the oldest first."""
        return self.history.restarts

    @property
    def last_error(self) -> LastError | None:
        """What failed last on the host's side."""
        return self.history.last_error

    @property
    def flush_failed(self) -> bool:
        """Whether a flush has failed: what the guest wrote before may not be on the medium, and
        every flush fails until the VM was stopped.
        """
        return self.setup.files.flush_failed.exists()

    @property
    def journal(self) -> Journal:
        """The last events, for people."""
        return self.history.journal

    @property
    def logs(self) -> dict[str, Path]:
        """The logs of who serves (""), who waits ("spare") and who served before ("previous"), as
        far as there are such.
        """
        files, state = self.setup.files, self._state
        members = {"": state.active, "spare": state.spare}
        found = {role: files.log(one.generation) for role, one in members.items() if one}
        before = [log for log in files.logs() if log not in found.values()]
        return {**found, "previous": before[-1]} if before else found

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

    # What its active backend tells; each raises Unavailable when there is none

    async def status(self) -> Status:
        """The active backend's own status, asked now. Raises OutcomeUnknown."""
        return await self.active().status()

    async def block_map(self) -> BlockMap:
        """What the active backend knows of blocks in the guest's pages, in numbers."""
        return await self.active().block_map()

    async def verify_block_map(self) -> None:
        """Begins to compare every page with the disk, unless that is going on; `block_map` tells
        how far the comparison is.
        """
        await self.active().verify_block_map()

    def export_block_map(self, *, verify: bool) -> AsyncIterator[bytes]:
        """The map in its binary form (docs/reference/map-format.md), in pieces."""
        return self.active().export_block_map(verify=verify)

    def active(self) -> BackendClient:
        """What can be asked of the active backend; the next call may find another one."""
        member = self.backends.get(self.generation)
        if member is None:
            raise Unavailable(f"disk {self.name} has no active backend now: {self.reason}")
        return member.client

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
            said = f", {words}" if (words := self.backends.complaint) else ""
            text = f"{error.message}; it is {self.condition.value}{last}{said} ({self._state})"
            raise Unavailable(text) from error

    async def upgrade(self, binary: str | None = None) -> None:
        """Serves from another binary (by default the installed one); the guest goes on.

        Returns when the new one serves. Raises StateConflict when the disk is not served or
        is being upgraded, Unavailable when the new one failed: then the old binary serves.
        """
        chosen = binary or self.setup.command.binary()
        await check_binary(chosen, self.setup.options)
        await self._serve_from(self.backends.programs.hold(chosen))

    async def renew(self) -> None:
        """As `upgrade`, from the program that serves, wherever its file is."""
        await self._serve_from(self._token)

    async def _serve_from(self, token: str) -> None:
        ticket, ended = self._replies.open()
        self.post(UpgradeAsked(token, ticket))
        await ended

    async def rebind(self, binding: Binding) -> None:
        """Moves queues to other threads; the guest goes on, and no request is lost.

        Returns when the active backend has done so; the spare and all later ones follow, also
        after a restart of the agent. Raises InvalidRequest for a map that does not fit,
        Unavailable or OutcomeUnknown when no backend did it within `Policy.rebind_s`: the former
        map stays the one that counts.
        """
        try:
            check_map(binding.map, self.setup.options.queues)
        except ValueError as error:
            raise InvalidRequest.of(error, f"disk {self.name}: ") from error
        ticket, ended = self._replies.open()
        self.post(RebindAsked(binding, ticket))
        await ended

    async def resize(self, size_bytes: int) -> Resized:
        """Makes the image larger while the guest runs. Raises InvalidRequest for a size that would
        cut something off, Unavailable, OutcomeUnknown.
        """
        done = await self.active().resize(size_bytes)
        self._served_bytes = done.size_bytes
        self.history.resized(done)
        await self.look_at_image()
        return done

    async def freeze(self) -> None:
        """Ends the spare; from now on nothing is started, and nobody waits for the image.

        Raises StateConflict while the disk is being upgraded, Unavailable.
        """
        ticket, accepted = self._replies.open()
        self.post(Freeze(ticket))
        await accepted
        await self._wait(
            lambda: self._state.frozen and self._state.spare is None,
            FREEZE_DEADLINE_S,
            "the end of the spare",
        )

    def thaw(self) -> None:
        """The disk has a spare again, and successors."""
        self.post(Thaw())

    async def arm_release(self, *, armed: bool) -> bool:
        """Has the active backend release the image as soon as the guest stands still, or keep it.

        Returns whether the backend holds the image now. Raises Unavailable, also when another
        process has the image, and OutcomeUnknown.
        """
        return await self.active().arm_release(armed=armed)

    def set_title(self, title: ImageTitle) -> None:
        """From now on backends are started with this title. The record stays that of the image:
        what stands beside the image's path by now may be another one's.
        """
        if self.setup.title is not None:
            title = replace(title, epoch_file=self.setup.title.epoch_file)
        self.setup = replace(self.setup, title=title)
        self.backends.set_title(title)

    async def claim(self, title: ImageTitle) -> None:
        """As `set_title`, and the backend that awaits its claim gets the claim of `title`.

        If there is no backend any more, the next one will have the claim: then the disk is thawed.
        Raises Unavailable and OutcomeUnknown; the same claim may be given again.
        """
        assert title.epoch is not None
        assert title.claim is not None
        self.set_title(title)
        if self._state.active is None:
            self.thaw()
            return
        await self.active().give_claim(title.epoch, title.claim)

    def drop_title(self) -> None:
        """From now on backends are started without a claim: nobody has one on the image any more.
        The one that serves keeps the image, by its lock.
        """
        self.setup = replace(self.setup, title=None)
        self.backends.set_title(None)
        self.thaw()

    def retire(self) -> None:
        """Tells the active process to drain and to end; the spare takes over."""
        self.backends.send_signal(self.generation, signal.SIGTERM)

    async def stop(self) -> None:
        """Ends all backends, the active one after draining.

        Raises OutcomeUnknown when a process does not end; the disk must then not be served
        elsewhere.
        """
        self.post(StopAsked())
        try:
            await self.changes.wait_until(
                lambda: self._state.stopped, timeout_s=STOP_DEADLINE_S, what="the backends' end"
            )
        except Unavailable as error:
            pids = [pid for pid in (self.active_pid, self.spare_pid) if pid]
            raise OutcomeUnknown(
                f"disk {self.name}: the backend {pids} does not end",
                remedy="look at its kernel stack in /proc/PID/stack; the storage may hang",
            ) from error
        await self.detach()
        discard(self.setup.files.socket)
        discard(self.setup.files.touched)
        discard(self.setup.files.session)
        discard(self.setup.files.flush_failed)
        remove_record(self.setup.record)

    async def detach(self) -> None:
        """Leaves the backends running, for another agent to adopt."""
        await super().detach()
        self._replies.close(Unavailable(f"nobody looks after disk {self.name} any more"))
        self.backends.detach()
        self.image.close()

    def watch_image(self) -> None:
        """From now on it is noticed when the image is moved, removed, or of another size."""
        self.keep(self._watch_image(), "image")

    async def _watch_image(self) -> None:
        while True:
            await self.look_at_image()
            await self._clock.sleep(LOOK_S)

    async def look_at_image(self) -> None:
        """Looks now what has become of the image."""
        if await self.image.look(self.backends.pids, lambda: self._served_bytes):
            self.history.image(self.image.finding)
            self.record(self._state, self._state)
            self.changes.notify()

    # What an owner is made of (`host.owner`)

    def decide(self, state: State, event: SupervisionEvent, now: float) -> Decision:
        """See `disk.decide`."""
        return decide(state, event, now, self.setup.policy)

    def record(self, before: State, after: State) -> bool:
        """Writes down what was decided. A record that cannot be written must not end supervision:
        the next agent finds the processes by their sockets.
        """
        if not after.stopped:
            self.backends.record(after)
        return True

    def after_step(self, before: State) -> None:
        """Writes down the processes that were started."""
        self.record(before, self._state)
        self.backends.keep_programs(self._state)

    def wake_at(self, state: State) -> float | None:
        """See `decide.next_wake`."""
        return next_wake(state)

    def tick(self) -> SupervisionEvent:
        """Time passed."""
        return Tick()

    def carry_out(self, effect: Effect) -> None:
        """Starts, signals, and begins to tell."""
        match effect:
            case Start(generation):
                active = self.generation == generation
                self.backends.start(effect, self._state.binding, active=active)
            case Terminate(generation):
                self.backends.send_signal(generation, signal.SIGTERM)
            case Kill(generation):
                self.backends.send_signal(generation, signal.SIGKILL)
            case Tell(generation):
                self.keep(self._tell(effect, self.backends.get(generation)), "threads")
            case Noted(generation, text):
                self.history.noted(generation, text)
            case TookOver(_, successor):
                self.history.took_over(effect, self._pid(successor))
                if successor is not None:
                    self.backends.promote(successor)
                else:
                    self.backends.turn_away()
            case _:
                self._answer(effect)

    def _answer(self, effect: UpgradeEnded | RebindEnded | Accept | Refuse) -> None:
        match effect:
            case UpgradeEnded(failure, ticket):
                text = f"not upgraded: {failure}" if failure else f"upgraded to {self.binary}"
                self.history.upgrade_ended(text, failed=bool(failure))
                error = Unavailable(f"disk {self.name}: {text}") if failure else None
                self._replies.answer(ticket, error)
            case RebindEnded(ticket, binding, failed):
                if failed is None:
                    self.history.rebound(binding)
                self._replies.answer(ticket, failed.error() if failed else None)
            case Accept(ticket):
                self._replies.answer(ticket)
            case Refuse(ticket, done, reason):
                text = f"disk {self.name} is not {done}: {reason}"
                self._replies.answer(ticket, StateConflict(text))
            case _:
                assert_never(effect)

    async def _tell(self, effect: Tell, member: Running | None) -> None:
        failure = None
        try:
            if member is None:
                raise Unavailable(f"disk {self.name}: backend {effect.generation} has ended")
            await member.client.move_queues(effect.binding.map)
        except SempervirtError as error:
            failure = Failure.of(error)
        self.post(Told(effect.generation, failure))

    # What `backends` reports

    @property
    def connection_expected(self) -> bool:
        """Whether QEMU has been connected once, so that it will connect to the next backend."""
        # The QEMU of another manager may be gone, and come again.
        return self._front_end if self.setup.is_guarded else self._state.connected

    def seen(self, generation: int, status: Status) -> None:
        """The active process, of that generation, told its status."""
        if takeover.is_connected(status) and not self._state.connected:
            self.post(Connected())
        binding = self._state.binding
        if binding is not None and status.thread_map != binding.map:
            self.post(MapSeen(generation, status.thread_map))
        self._served_bytes = status.size_bytes
        self._front_end = takeover.is_connected(status)
        self.history.seen(generation, status)
        if status.flush_failed:
            self._leave_word()
        self.changes.notify()

    def _leave_word(self) -> None:
        """Of a failed flush, for every later backend, also where somebody has removed the file that
        this one has left (crates/blkd/src/flushes.rs: that it is there is the word).
        """
        with contextlib.suppress(OSError):  # its directory is made again; then at the next status
            self.setup.files.flush_failed.touch(mode=0o600)
