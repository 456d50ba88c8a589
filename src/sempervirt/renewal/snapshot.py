"""A snapshot of the disks of a running VM: all of them at one instant.

    on record ─► freeze: the guest's file systems, where its agent answers; at most FROZEN_S
      └─► quiesce each disk ─► snapshot each ─► resume each ─► thaw ─► each is sealed
            (one disk alone is an instant by itself: it is not quiesced)

Whatever fails on the way, the file systems are thawed and the disks resumed: by this agent, or by
the next one (`Thawing`), to which the record says that they may be frozen; a backend resumes by
itself when QUIESCE_MS are over. Then there is a snapshot of none of the disks: those that have a
layer more than before give it up, while they stand still if they can, as if it had never been. A
snapshot is there once it is sealed, which the backend does by
itself (docs/design/snapshots.md): an agent that dies meanwhile does not spoil it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from sempervirt.core.errors import (
    InvalidRequest,
    NotFound,
    OutcomeUnknown,
    RollbackFailed,
    SempervirtError,
    StateConflict,
    Unavailable,
)
from sempervirt.core.names import suggest
from sempervirt.disk.answers import LayerState, SnapshotTaken
from sempervirt.disk.driver import Disk
from sempervirt.host import background
from sempervirt.qemu.guest_agent import GuestAgent
from sempervirt.qemu.state import Runstate
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Snapshotting

log = logging.getLogger(__name__)

T = TypeVar("T")

# From the moment at which the guest is told to freeze to the one at which it is told to thaw.
FROZEN_S = 2.0
ANSWER_S = 1.0
QUIESCE_MS = 2000
SWITCH_S = 10.0
SEAL_S = 60.0
# For giving up snapshots of disks that stand still; and of those that do not.
UNDO_STILL_S, UNDO_S = 1.0, 10.0
SEAL_POLL_S = 0.05
# An agent that comes to a frozen guest tries for so long before it leaves that to a person.
THAW_AGAIN_S = 60.0


class Freezing(Enum):
    """Whether the guest's file systems are frozen. The values stand in the API."""

    AUTO = "auto"  # where the guest's agent answers
    REQUIRED = "required"  # or there is no snapshot
    NEVER = "never"


class Consistency(Enum):
    """What a snapshot is worth. The values stand in the API."""

    FILE_SYSTEMS = "file-systems"  # as after they were unmounted
    CRASH = "crash"  # as after a power failure


@dataclass(frozen=True)
class DiskSnapshot:
    """The snapshot of one disk; the disk took no request for `pause_ms`."""

    disk: str
    snapshot: int
    pause_ms: float


@dataclass(frozen=True)
class Taken:
    """What came of it. `reason`: why the file systems were not frozen; "" where they were, for
    `frozen_ms`.
    """

    consistency: Consistency
    reason: str
    frozen_ms: float | None
    disks: tuple[DiskSnapshot, ...]


Noted = Callable[[Mapping[str, int]], None]


async def snapshot_disks(
    vm: Vm, names: Sequence[str], freezing: Freezing, noted: Noted | None = None
) -> Taken:
    """Takes a snapshot of the disks `names` of `vm`, or of all that the guest can write to; returns
    when the snapshots are sealed. `noted` is told the number of each before the next agent would
    keep them: one that dies earlier has them given up.

    Raises NotFound, InvalidRequest, StateConflict or Unavailable: there is no snapshot of all of
    the disks, and the VM goes on. Raises OutcomeUnknown when nobody knows whether there is one, or
    whether the guest's file systems are still frozen.
    """
    disks = _chosen(vm, names)
    vm.ledger.require_idle()
    work = _Snapshot(vm, disks, freezing, noted)
    vm.employ(work)
    return await work.run()


async def snapshot_guarded(
    disks: Sequence[Disk], names: Sequence[str], freezing: Freezing
) -> Taken:
    """As `snapshot_disks`, for a disk whose VM is another manager's: its guest agent is not asked,
    so the snapshot is what a power failure leaves, and several disks have no instant.
    """
    chosen = [disk for disk in disks if not names or disk.setup.short_name in names]
    if len(chosen) != 1:
        known = ", ".join(disk.setup.short_name for disk in disks)
        raise InvalidRequest(
            "of a VM of another manager one disk can be taken at a time",
            remedy=f"name one with --disk: {known}",
        )
    if freezing is Freezing.REQUIRED:
        raise StateConflict(
            "the file systems of a VM of another manager are not frozen by us",
            remedy="freeze them there (virsh domfsfreeze), take the snapshot, and thaw them",
        )
    (disk,) = chosen
    taken = await disk.active().snapshot(frozen=False, timeout_s=SWITCH_S)
    await wait_sealed(disk, taken.snapshot)
    one = DiskSnapshot(disk.name, taken.snapshot, taken.pause_us / 1000)
    why = "its VM is another manager's, whose guest agent is not asked"
    return Taken(Consistency.CRASH, why, None, (one,))


def _chosen(vm: Vm, names: Sequence[str]) -> list[Disk]:
    """Raises NotFound, InvalidRequest."""
    known = [disk.name for disk in vm.spec.disks]
    for name in names:
        if name not in known:
            raise NotFound(f"VM {vm.name} has no disk {name}", remedy=suggest(name, known))
    chosen = []
    for disk in vm.spec.disks:
        if names and disk.name not in names:
            continue
        if disk.read_only or vm.has_ejected(disk.name):
            if names:
                why = "read-only" if disk.read_only else "ejected by the guest"
                raise InvalidRequest(f"disk {vm.name}/{disk.name} is {why}: nothing changes it")
            continue
        if disk.name not in vm.disks:
            raise InvalidRequest(
                f"disk {vm.name}/{disk.name} is served by QEMU itself, which takes no snapshots",
                remedy='serve it by backend = "blkd", or name the other disks with --disk',
            )
        if not vm.disks[disk.name].setup.command.has_control:
            raise InvalidRequest(f"the backend of disk {vm.name}/{disk.name} takes no commands")
        chosen.append(vm.disks[disk.name])
    if not chosen:
        raise InvalidRequest(f"VM {vm.name} has no disk that its guest can write to")
    return chosen


class _Snapshot:
    """One snapshot: a `Renewal`, for as long as it goes on."""

    def __init__(self, vm: Vm, disks: list[Disk], freezing: Freezing, noted: Noted | None) -> None:
        self.over = False
        self._noted = noted
        self._vm = vm
        self._disks = disks
        self._freezing = freezing
        self._task: asyncio.Task[None] | None = None
        self._switched = asyncio.Event()
        self._newest: Mapping[str, int] = {}
        self._answer: asyncio.Future[Taken] = asyncio.get_running_loop().create_future()

    @property
    def doing(self) -> str:
        """The work, in plain words."""
        return "a snapshot of its disks"

    def shown(self) -> tuple[Runstate, str] | None:
        """The guest runs on."""
        return None

    async def run(self) -> Taken:
        """To the end, also when whoever asked does not wait for it any more."""
        self._task = background.start(self._work(), f"{self._vm.name}: {self.doing}")
        return await asyncio.shield(self._answer)

    async def detach(self) -> None:
        """Leaves the sealing to the backends, and nothing frozen."""
        if self._task is None:
            return
        switched = asyncio.ensure_future(self._switched.wait())
        await asyncio.wait([self._task, switched], return_when=asyncio.FIRST_COMPLETED)
        self._task.cancel()
        switched.cancel()
        await asyncio.wait([self._task])

    async def _work(self) -> None:
        try:
            done = await self._take()
        except SempervirtError as error:
            self._note(f"no snapshot: {error.message}", logging.WARNING)
            self._answer.set_exception(error)
        else:
            numbers = ", ".join(f"{one.disk} {one.snapshot}" for one in done.disks)
            worth = done.consistency.value
            why = f" ({done.reason})" if done.reason else ""
            self._note(f"snapshot {numbers}, consistent: {worth}{why}", logging.INFO)
            self._answer.set_result(done)
        finally:
            self.over = True
            if not self._answer.done():
                self._answer.set_exception(OutcomeUnknown(f"{self.doing} was not waited for"))
            self._answer.exception()  # nobody may wait for it any more

    async def _take(self) -> Taken:
        layers = await self._each("looked at", lambda disk: disk.active().layers())
        self._newest = {name: one.newest for name, one in layers.items()}
        self._vm.begin(Snapshotting(newest=self._newest))
        try:
            return await self._take_all()
        except SempervirtError as error:
            if left := await give_up(self._disks, self._newest, UNDO_S):
                raise RollbackFailed(
                    f"{error.message}; and there may be a snapshot of some of the disks: {left}",
                    remedy=error.remedy or "look: semper disk snapshots",
                ) from error
            raise
        finally:
            self._end_work()

    def _end_work(self) -> None:
        if not self._switched.is_set():
            self._vm.end_work()
            self._switched.set()

    async def _take_all(self) -> Taken:
        frozen = _Frozen(self._vm, self._newest)
        async with contextlib.AsyncExitStack() as undo:
            reason = await self._freeze(frozen, undo)
            held = reason == ""
            taken = await self._switch(frozen=held, timeout_s=frozen.left_s if held else None)
            if held:
                reason = await frozen.doubt()
        if self._noted is not None:
            self._noted({disk.setup.short_name: taken[disk.name].snapshot for disk in self._disks})
        self._end_work()
        await asyncio.gather(
            *(wait_sealed(disk, taken[disk.name].snapshot) for disk in self._disks)
        )
        return Taken(
            Consistency.CRASH if reason else Consistency.FILE_SYSTEMS,
            reason,
            frozen.lasted_ms,
            tuple(
                DiskSnapshot(disk.name, one.snapshot, one.pause_us / 1000)
                for disk in self._disks
                for one in [taken[disk.name]]
            ),
        )

    async def _freeze(self, frozen: _Frozen, undo: contextlib.AsyncExitStack) -> str:
        """Freezes, if that is wanted and possible; why not. Raises StateConflict."""
        if self._freezing is Freezing.NEVER:
            return "not asked for"
        undo.push_async_callback(frozen.end)
        reason = await frozen.begin()
        if reason and self._freezing is Freezing.REQUIRED:
            raise StateConflict(
                f"the file systems of {self._vm.name} are not frozen: {reason}",
                remedy="without --freeze the snapshot is taken as it is, as after a power failure",
            )
        return reason

    async def _switch(self, *, frozen: bool, timeout_s: float | None) -> dict[str, SnapshotTaken]:
        """Opens a layer for each disk, at one instant. Raises StateConflict, Unavailable,
        OutcomeUnknown.
        """
        timeout_s = SWITCH_S if timeout_s is None else timeout_s

        async def snapshot(disk: Disk) -> SnapshotTaken:
            return await disk.active().snapshot(frozen=frozen, timeout_s=timeout_s)

        if len(self._disks) == 1:
            return await self._each("snapshot", snapshot)
        try:
            await self._each(
                "quiesced", lambda disk: disk.active().quiesce(QUIESCE_MS, timeout_s=timeout_s)
            )
            taken = await self._each("snapshot", snapshot)
        except SempervirtError:
            await give_up(self._disks, self._newest, UNDO_STILL_S)
            await self._resume()
            raise
        if passed := await self._resume():
            raise Unavailable(
                f"the snapshots of {self._vm.name} are not of one instant: {passed} took requests "
                "meanwhile",
                remedy="take another one",
            )
        return taken

    async def _each(self, what: str, ask: Callable[[Disk], Awaitable[T]]) -> dict[str, T]:
        """Asks all disks at once, and waits for all. Raises what the first one raises."""
        answers = await asyncio.gather(*(ask(disk) for disk in self._disks), return_exceptions=True)
        done: dict[str, T] = {}
        for disk, answer in zip(self._disks, answers, strict=True):
            if not isinstance(answer, BaseException):
                done[disk.name] = answer
        for disk, answer in zip(self._disks, answers, strict=True):
            if isinstance(answer, InvalidRequest) and disk.upgrade_available:
                raise InvalidRequest(
                    f"disk {disk.name}: {answer.message}",
                    remedy=f"its backend is of another release: semper disk upgrade {disk.name}",
                ) from answer
            if isinstance(answer, SempervirtError):
                others = f"; {what}: {', '.join(done)}" if done else ""
                raise type(answer)(
                    f"disk {disk.name}: {answer.message}{others}", remedy=answer.remedy
                ) from answer
            if isinstance(answer, BaseException):
                raise answer
        return done

    async def _resume(self) -> str:
        """Has all disks take requests again; which of them did so before."""
        answers = await asyncio.gather(
            *(disk.active().resume() for disk in self._disks), return_exceptions=True
        )
        return ", ".join(
            disk.name
            for disk, answer in zip(self._disks, answers, strict=True)
            if isinstance(answer, BaseException) or not answer.held
        )

    def _note(self, text: str, level: int) -> None:
        self._vm.machine.journal.note(time.time(), "snapshot", text)
        log.log(level, "snapshot vm=%s %s", self._vm.name, text)


class _Frozen:
    """The guest's file systems, from `begin` to `end`. `newest` is what `Snapshotting` has."""

    def __init__(self, vm: Vm, newest: Mapping[str, int]) -> None:
        self._newest = newest
        self.lasted_ms: float | None = None
        self._vm = vm
        self._begun: float | None = None

    @property
    def left_s(self) -> float:
        """How long they may stay frozen."""
        assert self._begun is not None
        return max(0.0, self._begun + FROZEN_S - time.monotonic())

    async def begin(self) -> str:
        """Freezes them; why they are not frozen, "" if they are."""
        if agent_of(self._vm) is None:
            return "the VM has no channel for a guest agent"
        if self._vm.run is not Runstate.RUNNING:
            return f"the guest is {self._vm.run.value}"
        try:
            await self._agent.ping(ANSWER_S)
            if not self._vm.advance(Snapshotting(frozen=True, newest=self._newest)):
                return "the record of the VM cannot be written, so nobody would know of it"
            self._begun = time.monotonic()
            count = await self._agent.freeze(FROZEN_S)
        except (StateConflict, Unavailable, OutcomeUnknown) as error:
            await self.end()
            return error.message
        if count == 0:
            await self.end()
            return "the guest has frozen none of them"
        return ""

    async def doubt(self) -> str:
        """Why they may not have been frozen until now; "" where they were."""
        try:
            if self.left_s > 0 and await self._agent.frozen(ANSWER_S):
                return ""
        except (StateConflict, Unavailable, OutcomeUnknown) as error:
            return error.message
        return "the guest has thawed them before the snapshot was taken"

    async def end(self) -> None:
        """Thaws them, if they were told to freeze. Raises OutcomeUnknown; the record says then that
        they may be frozen, until an agent has thawed them.
        """
        if self._begun is None:
            return
        begun, self._begun = self._begun, None
        try:
            await self._agent.thaw()
        finally:
            self.lasted_ms = (time.monotonic() - begun) * 1000
        self._vm.advance(Snapshotting(frozen=False, newest=self._newest))

    @property
    def _agent(self) -> GuestAgent:
        agent = agent_of(self._vm)
        assert agent is not None
        return agent


def agent_of(vm: Vm) -> GuestAgent | None:
    """The agent inside the guest of `vm`, if the VM has a channel for one."""
    channel = vm.spec.guest_agent
    if channel is None:
        return None
    return GuestAgent(vm.machine.files.channel(channel), vm.name, vm.pid)


async def give_up(disks: Iterable[Disk], newest: Mapping[str, int], timeout_s: float) -> str:
    """Gives up the snapshots that `disks` have beyond `newest`; which disks may have one still, and
    why, "" when none has.
    """

    async def undo(disk: Disk) -> None:
        layers = await disk.active().layers()
        if layers.newest > newest.get(disk.name, layers.newest):
            await disk.active().undo(layers.newest, timeout_s=timeout_s)

    disks = list(disks)
    answers = await asyncio.gather(*(undo(disk) for disk in disks), return_exceptions=True)
    left = []
    for disk, answer in zip(disks, answers, strict=True):
        if isinstance(answer, SempervirtError):
            left.append(f"{disk.name} ({answer.message})")
        elif isinstance(answer, BaseException):
            raise answer
    return ", ".join(left)


async def wait_sealed(disk: Disk, snapshot: int, timeout_s: float = SEAL_S) -> None:
    """Returns when a snapshot is there.

    Raises Unavailable when it never will be, OutcomeUnknown at the deadline.
    """
    deadline = time.monotonic() + timeout_s
    doubt = "it is not sealed yet"
    while time.monotonic() < deadline:
        try:
            layers = await disk.active().layers()
        except (Unavailable, OutcomeUnknown) as error:  # its backend may just be taken over from
            doubt = error.message
        else:
            match layers.state_of(snapshot):
                case LayerState.SEALED:
                    return
                case LayerState.OPENED if layers.last_error is None or layers.task is not None:
                    doubt = "what lies below is being flushed"
                case _:
                    why = layers.last_error or "its backend ended before it was sealed"
                    raise Unavailable(
                        f"snapshot {snapshot} of disk {disk.name} is not there: {why}",
                        remedy="take another one",
                    )
        await asyncio.sleep(SEAL_POLL_S)
    raise OutcomeUnknown(
        f"snapshot {snapshot} of disk {disk.name} may come to be: {doubt}",
        remedy=f"look again: semper disk snapshots {disk.name}",
    )


class Thawing:
    """Ends a snapshot during which the former agent ended: thaws the guest's file systems, and
    gives up what some disks have and others may not.

    A `Renewal`: the VM is busy meanwhile, and its journal tells what came of it.
    """

    doing = "the thaw of its file systems"

    def __init__(self, vm: Vm, work: Snapshotting) -> None:
        self._vm = vm
        self._task = background.start(self._end(work), f"{vm.name}: {self.doing}")

    @property
    def over(self) -> bool:
        """Whether nothing follows any more."""
        return self._task.done()

    def shown(self) -> tuple[Runstate, str] | None:
        """The guest runs, and writes to its disks may wait."""
        return None

    async def detach(self) -> None:
        """Leaves it to the next agent."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _end(self, work: Snapshotting) -> None:
        agent = agent_of(self._vm)
        if work.frozen and agent is not None and not self._vm.run.is_end:
            level, text = logging.WARNING, "thawed, after an agent that ended during a snapshot"
            try:
                await agent.thaw(THAW_AGAIN_S)
            except SempervirtError as error:
                level, text = logging.ERROR, f"{error.message}; {error.remedy}"
            self._note(level, text)
        if work.newest and not self._vm.run.is_end:
            disks = [disk for disk in self._vm.disks.values() if disk.name in work.newest]
            if left := await give_up(disks, work.newest, UNDO_S):
                self._note(logging.ERROR, f"there may be a snapshot of some of the disks: {left}")
        self._vm.end_work()

    def _note(self, level: int, text: str) -> None:
        self._vm.machine.journal.note(time.time(), "snapshot", text)
        log.log(level, "snapshot vm=%s %s", self._vm.name, text)
