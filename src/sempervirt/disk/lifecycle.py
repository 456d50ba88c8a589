"""How a disk comes to be: started anew, or adopted from an agent that is gone."""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import replace

from sempervirt.core.errors import OutcomeUnknown, SempervirtError, Unavailable
from sempervirt.disk import running as processes
from sempervirt.disk.driver import Disk
from sempervirt.disk.evidence import record_of, testimony
from sempervirt.disk.held_image import HeldImage
from sempervirt.disk.program import Programs, path_of
from sempervirt.disk.record import DiskRecord, RecordedProcess, Role
from sempervirt.disk.running import Running
from sempervirt.disk.setup import DiskSetup
from sempervirt.disk.sockets import START_DEADLINE_S, Sockets, listen, replace_backends
from sempervirt.disk.state import Backend, Begin, Exited, Freeze, State, Tick
from sempervirt.host import process
from sempervirt.host.records import remove_record
from sempervirt.host.refusals import refusal
from sempervirt.host.sockets import borrow_listener, discard, turn_away

log = logging.getLogger(__name__)


async def start_disk(setup: DiskSetup) -> Disk:
    """Starts the first backend of a disk and returns when the backend listens.

    A disk whose title is still without a claim is frozen until `Disk.claim`.

    Raises ImageLocked, InvalidRequest or Unavailable as the backend gives its reason; nothing
    is left running then.
    """
    image = await HeldImage.begin(setup.name, setup.options.image)
    programs = Programs()
    try:
        token = programs.hold(setup.command.binary())
        listener = listen(setup)
    except SempervirtError:
        programs.keep_only(())
        image.close()
        raise
    setup.files.flush_failed.unlink(missing_ok=True)  # of a VM that did not end in order
    awaits = setup.title is not None and setup.title.epoch is None
    state = State(binary=token, binding=setup.binding, frozen=awaits)
    disk = Disk(setup, image, listener, programs, state)
    disk.start()
    disk.post(Begin())
    try:
        await disk.changes.wait_until(
            lambda: _is_up(disk, awaits=awaits),
            timeout_s=START_DEADLINE_S,
            what=f"the backend of disk {setup.name}",
        )
    except BaseException:
        await disk.stop()
        raise
    if not disk.state.refused and disk.state.active is not None:
        disk.watch_image()
        disk.keep(Sockets(disk).keep(), "sockets")
        return disk
    refused = disk.state.refused or disk.state.last_end
    await disk.stop()
    if disk.backends.last_end is None:
        raise Unavailable(f"disk {setup.name}: {refused}")
    raise refusal(f"disk {setup.name}", "the backend", *disk.backends.last_end)


def _is_up(disk: Disk, *, awaits: bool) -> bool:
    """Whether the first backend is there, or has ended."""
    state = disk.state
    if state.refused:
        return True
    if not awaits:
        return state.served
    return state.active.ready if state.active else state.last_end != ""


async def adopt_disk(setup: DiskSetup, *, frozen: bool = False) -> Disk:
    """Takes over the backends that an earlier agent started; guests go on meanwhile.

    With `frozen` a spare is killed and none is started, until `thaw`.

    The listening socket is taken back from a backend that holds it. Where that is not
    allowed, a new one is bound at the same path: then the old spare, which listens on a
    socket without a path, is killed before that, and the active one is replaced by a process
    with the new socket, as in an upgrade. Processes that nobody recorded are killed, unless the
    record itself is damaged or gone: then what lives is taken over, and `Disk.doubt` says why. The
    image is the one on record, wherever it is now.

    Raises RecordNewer, and Unavailable when the socket cannot be bound again.
    """
    found, doubt = await record_of(setup.record, setup.files, setup.command)
    record = found or DiskRecord(1, setup.command.binary() + "#", 0, ())
    own = set(await asyncio.to_thread(setup.files.find_identities))
    if not doubt and own and not any(item.identity in own for item in record.processes):
        doubt = f"{setup.record} names none of the processes that live of it"
        record = await testimony(setup.files, setup.command) or record
    if setup.title is not None and record.epoch_file is not None:
        setup = replace(setup, title=replace(setup.title, epoch_file=record.epoch_file))
    alive = await _alive(setup, record)
    image = await HeldImage.adopt(
        setup.name, setup.options.image, record.image, [item.identity.pid for item in alive]
    )
    listener = _borrowed(setup, alive)
    stale = listener is None and bool(alive)
    if stale:
        for item in alive[1:]:
            if (old := process.adopt(item.identity, lambda _end: None)) is not None:
                await old.end(0)
        alive = alive[:1]
    programs = Programs()
    backends = [Backend(item.generation, _hold(programs, item)) for item in alive]
    state = State(
        binary=backends[0].binary if backends else programs.hold_if_there(path_of(record.binary)),
        next_generation=record.next_generation,
        active=backends[0] if backends else None,
        spare=backends[1] if len(backends) > 1 else None,
        served=True,
        start_due=None if len(backends) > 1 or frozen else 0.0,
        binding=record.binding or setup.binding,
        restarts=record.restarts,
    )
    if listener is None:
        listener = listen(setup)
        turn_away(listener)
    disk = Disk(setup, image, listener, programs, state)
    disk.doubt = doubt
    disk.start()
    disk.watch_image()
    for item, backend in zip(alive, backends, strict=True):
        _admit(disk, item, backend.binary, active=item is alive[0])
    disk.post(Freeze() if frozen else Tick())
    if stale and setup.policy.spare:  # another one's successor has the present socket
        disk.keep(_replace_stale(disk), "replace the backend with a stale socket")
    disk.keep(Sockets(disk, disk.backends.control_sockets).keep(), "sockets")
    log.info(
        "adopt disk=%s active=%s spare=%s socket=%s",
        setup.name,
        disk.active_pid,
        disk.spare_pid,
        "bound again" if stale else "taken back",
    )
    return disk


async def _alive(setup: DiskSetup, record: DiskRecord) -> list[RecordedProcess]:
    """The recorded processes that still run, the active one first. All others are killed.

    A recorded process that is no backend of this disk is none of its processes, whatever it is.
    """
    own = set(await asyncio.to_thread(setup.files.find_identities))
    recorded = (item for item in record.processes if item.identity.is_alive())
    alive = [item for item in recorded if item.identity in own or not setup.command.has_control]
    alive.sort(key=lambda item: item.role is Role.SPARE)
    for pid in await processes.kill_orphans(setup.files, {item.identity.pid for item in alive}):
        log.warning("adopt disk=%s killed unrecorded backend pid=%d", setup.name, pid)
    return alive


def _borrowed(setup: DiskSetup, alive: list[RecordedProcess]) -> socket.socket | None:
    """The listening socket, from the first process that it can be taken back from; the younger one
    has the younger socket, if somebody has removed the other one's (`disk.sockets`).
    """
    for item in sorted(alive, key=lambda item: item.generation, reverse=True):
        listener = borrow_listener(item.identity.pid, item.listen_fd, setup.files.socket)
        if listener is not None:
            return listener
    return None


async def sweep_disk(setup: DiskSetup) -> None:
    """Ends what an earlier agent left running for a disk whose QEMU is gone.

    Raises OutcomeUnknown when a process does not end, RecordNewer.
    """
    record, _ = await record_of(setup.record, setup.files, setup.command)
    recorded = await _alive(setup, record) if record else []
    recorded.sort(key=lambda item: item.role is Role.ACTIVE)  # a spare would take over
    for item in recorded:
        adopted = process.adopt(item.identity, lambda _end: None)
        grace_s = setup.policy.drain_s if item.role is Role.ACTIVE else 0
        if adopted is not None and await adopted.end(grace_s) is None:
            raise OutcomeUnknown(f"disk {setup.name}: backend {adopted.pid} does not end")
    await processes.kill_orphans(setup.files, set())
    discard(setup.files.socket)
    discard(setup.files.session)
    discard(setup.files.flush_failed)
    remove_record(setup.record)


def _hold(programs: Programs, item: RecordedProcess) -> str:
    """The program of a running process, also if the program's file has been replaced since."""
    exe = f"/proc/{item.identity.pid}/exe"
    return programs.hold_if_there(path_of(item.binary), opened_from=exe)


def _admit(disk: Disk, item: RecordedProcess, token: str, *, active: bool) -> None:
    generation = item.generation
    adopted = process.adopt(item.identity, lambda end: disk.backends.ended(generation, end))
    if adopted is None:
        disk.post(Exited(generation, "ended while it was being adopted"))
        return
    files = disk.setup.files
    member = Running(
        generation,
        token,
        adopted,
        files.control(generation),
        files.log(generation),
        item.listen_fd,
    )
    disk.backends.admit(member, active=active)


async def _replace_stale(disk: Disk) -> None:
    """From an active process with a stale socket to one with the present socket."""
    try:
        if disk.setup.files.control(disk.generation).exists():
            await disk.wait_spare_ready(START_DEADLINE_S)
        await replace_backends(disk)
    except SempervirtError as error:
        log.error("adopt disk=%s keeps a backend with a stale socket: %s", disk.name, error)  # noqa: TRY400
