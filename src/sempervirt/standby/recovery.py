"""What a former agent has left of a VM's standbys: its record, their directories, what runs.

recover   by the record: each generation is what its record and its processes say together
rescue    without it: a standby that has taken over runs on as the VM; those that wait are ended
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from sempervirt.core.errors import OutcomeUnknown, SempervirtError
from sempervirt.host.owner import HOST_CLOCK
from sempervirt.qemu.state import Runstate
from sempervirt.standby import decide
from sempervirt.standby.adapters import LiveGenerations
from sempervirt.standby.record import REHEARSALS, numbers_of, read_taken, record_of
from sempervirt.standby.state import Effect, Found, Life, Standby, Step
from sempervirt.standby.values import Tier
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.house import Adopted, House
from sempervirt.vm.unknown import UnknownVm
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Standing

log = logging.getLogger(__name__)

ASKED_S = 5.0
STATUS_WAITS = ("inmigrate",)

Adopt = Callable[[AgentConfig], Awaitable[Adopted]]


class Leftovers:
    """Those of one VM. `adopt` takes over what runs of the VMs of a configuration, `promote` makes
    one the VM of its name.
    """

    def __init__(
        self,
        house: House,
        generations: LiveGenerations,
        adopt: Adopt,
        promote: Callable[[Vm], Awaitable[None]],
    ) -> None:
        self._house = house
        self._generations = generations
        self._adopt = adopt
        self._promote = promote

    async def recover(self, state: Standby) -> tuple[Standby, list[Effect]]:
        """How it goes on from the state that is on record. Raises RecordDamaged."""
        name, generations, config = state.vm, self._generations, self._house.config
        found: dict[int, Found] = {}
        for number in await asyncio.to_thread(numbers_of, config, name):
            known = state.generation(number)
            serves = known is not None and known.life is Life.SERVING
            vm = await self._adopted(number, serves=serves)
            if known is None:
                await self._remove(number, vm)
                continue
            if vm is not None and vm.run.is_end and known.life not in (Life.SERVING, Life.LOST):
                await vm.detach()  # what booted for it once, or has waited
                vm = None
            if vm is None:
                file = generations.has_file(number)
                found[number] = Found.KEPT if known.tier is Tier.FILE and file else Found.NOTHING
                continue
            generations.vms[number] = vm
            found[number] = await _found(vm)
            if serves or found[number] is Found.RUNS:
                await self._serve(vm)
                if not vm.run.is_end:
                    await generations.settle_served(number)
        over = state.take_over
        gone = (Found.NOTHING, Found.KEPT)
        claiming = over is not None and over.step is Step.CLAIMING
        if over is not None and claiming and found.get(over.number, Found.NOTHING) in gone:
            await generations.release_left(over.number)
        taken = await asyncio.to_thread(read_taken, config.state_dir, name)
        recovered, effects = decide.recover(with_taken(state, taken), found, HOST_CLOCK.now())
        try:
            record_of(config.state_dir, name).write(recovered)
        except OSError as error:  # this agent has VMs to look after, also on a full disk
            log.error("standby vm=%s record not written: %s", name, error)  # noqa: TRY400
        return recovered, effects

    async def rescue(self, name: str) -> None:
        """The record of standbys is damaged or gone: one that has taken over runs on as the VM, by
        its own record; those that wait are ended. No file is removed but those of a rehearsal.
        """
        for number in await asyncio.to_thread(numbers_of, self._house.config, name):
            vm = await self._adopted(number)
            if number >= REHEARSALS:
                await self._remove(number, vm)
                continue
            if vm is None:
                continue
            if vm.run.is_end or isinstance(vm.work, Standing):
                with contextlib.suppress(OutcomeUnknown):
                    await vm.kill("the record of its standbys is damaged")
                await vm.detach()
            else:
                await self._serve(vm)

    async def _remove(self, number: int, vm: Vm | None) -> None:
        """What cannot be removed is left for the next agent: this one has other VMs as well."""
        if vm is not None:
            self._generations.vms[number] = vm
        try:
            await self._generations.remove(number)
        except (SempervirtError, OSError) as error:
            log.error("standby number=%d is not removed: %s", number, error)  # noqa: TRY400

    async def _serve(self, vm: Vm) -> None:
        """`vm`, which took over once, is the VM; unless one of that name was started after that."""
        other = self._house.vms.get(vm.name)
        if other is None or (other.freed and not vm.run.is_end):
            await self._promote(vm)

    async def _adopted(self, number: int, *, serves: bool = False) -> Vm | None:
        """The VM that is left of a generation. A standby that nobody can take over is ended; one
        that `serves` is the VM, runs on, and is unknown.
        """
        adopted = await self._adopt(self._generations.config(number))
        for name, unknown in adopted.unknown.items():
            if serves:
                self._house.unknown.setdefault(name, unknown)
            else:
                await _end(unknown)
        return next(iter(adopted.vms.values()), None)


def with_taken(state: Standby, taken: tuple[tuple[str, int], ...]) -> Standby:
    """With the snapshots of a generation that a former agent has begun, and not put on record."""
    generations = tuple(
        replace(one, snapshots=taken) if one.life is Life.TAKING else one
        for one in state.generations
    )
    return replace(state, generations=generations)


async def _end(unknown: UnknownVm) -> None:
    with contextlib.suppress(SempervirtError):
        await unknown.kill()
    await unknown.detach()


async def _found(vm: Vm) -> Found:
    """What the QEMU of a generation does."""
    if vm.run.is_end:
        return Found.NOTHING
    asked = (Runstate.RUNNING, Runstate.PAUSED, Runstate.HALTED)
    try:
        await vm.machine.wait_state(*asked, timeout_s=ASKED_S)
        status = (await vm.machine.execute("query-status"))["status"]
    except SempervirtError:
        return Found.NOTHING
    if status in STATUS_WAITS:
        return Found.WAITS
    return Found.RUNS if status == "running" else Found.LOADED
