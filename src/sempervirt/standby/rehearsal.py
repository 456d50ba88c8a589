"""A rehearsal of a take-over: a copy of what waits goes on, isolated, on copies of all disks.

    copied ─► started ─► loaded ─► running ─► answered ─► nothing is left of it
    memory, state, disks; a snapshot of the disks that are handed over

What waits is not touched, and can take over meanwhile. The copy has a number of its own beside the
generations, so that an agent which begins anew removes what another one has left of it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from sempervirt.core.errors import SempervirtError, Unavailable
from sempervirt.host import process
from sempervirt.host.lending import group_of, lend
from sempervirt.qemu import device_state, memory
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.standby import initialised, network
from sempervirt.standby.adapters import (
    LiveGenerations,
    require_memory,
    require_room,
)
from sempervirt.standby.disks import FirstDisks, copied, shared
from sempervirt.standby.record import REHEARSALS, Guest, read_guest, write_guest
from sempervirt.standby.state import Generation
from sempervirt.standby.values import Tier
from sempervirt.vm.vm import Vm

COPY_S = 3600.0
RUNS_S = 30.0
USED_S = 10.0
USED_POLL_S = 0.1
PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class Rehearsal:
    """What came of a rehearsal with generation `number`, begun at `time` (seconds since the epoch).
    `steps` are the milliseconds from its beginning to the end of each step; `failure` is why it did
    not get further, "" if it did.
    """

    number: int
    time: float
    steps: tuple[tuple[str, float], ...]
    notes: tuple[str, ...]
    failure: str = ""


class Rehearsing:
    """One rehearsal with a generation that is READY; `first` are the disks of the VM."""

    def __init__(
        self,
        generations: LiveGenerations,
        generation: Generation,
        first: FirstDisks,
    ) -> None:
        self._generations = generations
        self._generation = generation
        self._first = first
        self._number = REHEARSALS + generation.number
        self._begun = time.monotonic()
        self._time = time.time()
        self._steps: list[tuple[str, float]] = []
        self._notes: list[str] = []

    async def run(self) -> Rehearsal:
        """To the end; nothing is left of it then. Raises OutcomeUnknown when a process does not
        end.
        """
        failure = ""
        try:
            await self._go()
        except SempervirtError as error:
            failure = error.message
        except OSError as error:
            failure = str(error)
        finally:
            await self._remove()
        return Rehearsal(
            self._generation.number, self._time, tuple(self._steps), tuple(self._notes), failure
        )

    async def _remove(self) -> None:
        try:
            await self._generations.remove(self._number)
        except (OSError, Unavailable) as error:
            said = error.message if isinstance(error, Unavailable) else str(error)
            self._notes.append(f"its copies of the disks are not removed: {said}")

    async def _go(self) -> None:
        spec = await self._copy()
        self._done("copied")
        vm = await self._start(spec)
        self._done("started")
        state = self._generations.state_file(self._number)
        lend(state, group_of(vm.machine.files.directory))
        await device_state.load(vm.machine.execute, state, prepared=True)
        self._done("loaded")
        await vm.machine.execute("cont")
        await vm.machine.wait_state(Runstate.RUNNING, timeout_s=RUNS_S)
        self._done("running")
        self._notes += await initialised.greet(vm)
        for disk in shared(spec):
            used = await _wait_used(vm, disk.name)
            what = "uses" if used else f"has not used within {USED_S:g} s"
            self._notes.append(f"the guest {what} its disk {disk.name}")
        if vm.run is not Runstate.RUNNING:
            raise Unavailable(f"the guest is {vm.run.value}: {vm.state.why}")
        self._done("answered")
        await self._look(vm)

    async def _look(self, vm: Vm) -> None:
        """What else there is to see in a guest that has gone on: for trials."""

    def _done(self, step: str) -> None:
        self._steps.append((step, round((time.monotonic() - self._begun) * 1e3, 1)))

    async def _copy(self) -> VmSpec:
        """Copies disks and state; the VM that is started from them."""
        own = self._generations.places(self._number)
        there = self._generations.places(self._generation.number)
        guest = await asyncio.to_thread(read_guest, there.state_dir)
        written = (*copied(guest.spec), *shared(guest.spec))
        images = {
            disk.name: disk.image.with_name(f"{_base(disk.image)}.standby-{self._number}")
            for disk in written
        }
        disks = tuple(
            disk.model_copy(update={"image": images.get(disk.name, disk.image)})
            for disk in guest.spec.disks
        )
        spec = guest.spec.model_copy(update={"disks": disks})
        spec = network.isolated(spec, self._number)
        await require_memory(guest.spec)
        await require_room({disk.image: images[disk.name] for disk in written})
        await asyncio.to_thread(_make, own.state_dir, own.run_dir, Guest(spec, {}))
        for disk in copied(guest.spec):
            await _copy_file(disk.image, images[disk.name])
        names = [disk.name for disk in shared(guest.spec)]
        if names:
            await self._copy_shared(names, images)
        files = self._generations.files(self._generation.number)
        for source in files:
            base = own.run_dir if source.is_relative_to(there.run_dir) else own.state_dir
            await _copy_file(source, base / source.name)
        return spec

    async def _copy_shared(self, names: Sequence[str], images: dict[str, Path]) -> None:
        """As they are now in the VM that runs."""
        taken = await self._first.take(names)
        for name, number in taken.numbers:
            try:
                await self._first.copy_out(name, number, images[name])
            finally:
                if note := await self._first.give_up(name, number, {number}):
                    self._notes.append(note)

    async def _start(self, spec: VmSpec) -> Vm:
        generation = self._generation
        network.prepare(spec)
        match generation.tier:
            case Tier.READY:
                waits = self._generations.vms.get(generation.number)
                if waits is None or waits.pid is None:
                    raise Unavailable(f"standby {generation.number} does not wait any more")
                source = memory.open_of(waits.pid)
                try:
                    with memory.created(spec.memory) as descriptor:
                        await asyncio.to_thread(copy_memory, source, descriptor)
                        return await self._generations.start_isolated(
                            self._number, generation.machine, descriptor
                        )
                finally:
                    os.close(source)
            case Tier.FILE:
                return await self._generations.start_isolated(
                    self._number, generation.machine, None
                )
            case _:
                assert_never(generation.tier)


def _base(image: Path) -> str:
    return image.name.partition(".standby-")[0]


def _make(state_dir: Path, run_dir: Path, guest: Guest) -> None:
    for directory in (state_dir, run_dir):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_guest(state_dir, guest)


async def _copy_file(source: Path, target: Path) -> None:
    """Shared with the original where the storage can do that. Raises CommandFailed."""
    await process.run(
        ["cp", "--reflink=auto", "--sparse=always", str(source), str(target)], timeout_s=COPY_S
    )


def copy_memory(source: int, target: int) -> None:
    """All that is not a hole. Raises OSError."""
    size, at = os.fstat(source).st_size, 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError:  # nothing but holes follows
            return
        end = os.lseek(source, at, os.SEEK_HOLE)
        while at < end:
            piece = os.pread(source, min(PIECE_BYTES, end - at), at)
            at += os.pwrite(target, piece, at)


async def _wait_used(vm: Vm, name: str) -> bool:
    """Whether the guest has read a disk."""
    deadline = time.monotonic() + USED_S
    while time.monotonic() < deadline:
        with suppress(SempervirtError):
            status = await vm.disks[name].status()
            if any(queue.reads for queue in status.queues):
                return True
        await asyncio.sleep(USED_POLL_S)
    return False
