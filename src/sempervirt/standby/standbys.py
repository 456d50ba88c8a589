"""The standbys of this host's VMs: which have some, and how they are enabled and removed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from sempervirt.cluster.cluster import read_settings
from sempervirt.core.errors import (
    InvalidRequest,
    NotFound,
    SempervirtError,
    StateConflict,
    Unavailable,
)
from sempervirt.core.names import NAME_MAX, is_name, suggest
from sempervirt.host import background
from sempervirt.host.places import Places
from sempervirt.host.records import RecordDamaged
from sempervirt.qemu.spec import VmSpec
from sempervirt.standby import decide, network
from sempervirt.standby.adapters import (
    LiveGenerations,
    config_of,
    number_of,
    require_possible,
)
from sempervirt.standby.disks import TakeSnapshot, copied
from sempervirt.standby.driver import StandbyDriver
from sempervirt.standby.fence_file import Fences, read_fences
from sempervirt.standby.first import WatchedFirst
from sempervirt.standby.lost import Loss, LostDisk, drop_lost, losses_of
from sempervirt.standby.means import Ability
from sempervirt.standby.offer import Offer
from sempervirt.standby.ports import Ports
from sempervirt.standby.record import (
    REHEARSALS,
    numbers_of,
    on_record,
    read_first,
    read_guest,
    record_of,
    standby_dir,
    write_first,
    write_taken,
)
from sempervirt.standby.recovery import Adopt, Leftovers
from sempervirt.standby.rehearsal import Rehearsal, Rehearsing
from sempervirt.standby.state import Effect, First, Life, Standby
from sempervirt.standby.there import FirstThere
from sempervirt.standby.values import Policy
from sempervirt.vm import claims
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.groups import Beside
from sempervirt.vm.house import House
from sempervirt.vm.vm import Vm

log = logging.getLogger(__name__)

UPKEEP_S = 60.0


@dataclass(frozen=True)
class Kept:
    """The standbys of one VM."""

    driver: StandbyDriver
    generations: LiveGenerations
    first: WatchedFirst | FirstThere
    watching: asyncio.Task[None]

    async def detach(self) -> None:
        """Ends the owner and its watch; what there is of standbys is left as it is."""
        self.watching.cancel()
        await asyncio.wait([self.watching])
        await self.driver.detach()


class Standbys:
    """Those of the VMs of `house`: a standby that takes over is put among its VMs, and one that has
    taken over and cannot be adopted among those that are unknown. `adopt` takes over what runs,
    `snapshot` takes one of disks of a VM.
    """

    def __init__(self, house: House, adopt: Adopt, snapshot: TakeSnapshot) -> None:
        self.kept: dict[str, Kept] = {}
        self.rehearsals: dict[str, Rehearsal] = {}
        self._rehearsing: set[str] = set()
        self._disabling: set[str] = set()
        self._firsts: dict[str, WatchedFirst | FirstThere] = {}
        self._left: dict[str, Standby] = {}
        self._house = house
        self._config = house.config
        self._adopt = adopt
        self._snapshot = snapshot
        self._leaving: list[asyncio.Task[None]] = []
        self._dismissing: set[str] = set()
        self._upkeep: asyncio.Task[None] | None = None
        self.offer = Offer(house, snapshot)

    def require(self, name: str) -> StandbyDriver:
        """The owner of the standbys of a VM. Raises NotFound."""
        if name in self.kept:
            return self.kept[name].driver
        hint = suggest(name, self.kept) or f"make some: semper standby enable {name}"
        raise NotFound(f"VM {name} has no standbys", remedy=hint)

    def find(self, name: str) -> StandbyDriver | None:
        """The owner of the standbys of a VM; None if it has none."""
        kept = self.kept.get(name)
        return None if kept is None else kept.driver

    def is_here(self, name: str) -> bool:
        """Whether the VM, of which standbys are kept, is of this host."""
        first = self._firsts.get(name)
        return not isinstance(first, FirstThere) or first.is_here

    def spec_of(self, name: str) -> VmSpec | None:
        """What a VM has of which standbys are kept here, wherever it runs; None: nobody knows."""
        vm = self._house.vms.get(name)
        return self._spec_there(name) if vm is None else vm.spec

    def abilities(self, name: str) -> Mapping[str, Ability]:
        """How it can be proved of each disk of a VM of another host that it is not written."""
        first = self._firsts.get(name)
        if not isinstance(first, FirstThere) or first.is_here:
            return {}
        return {disk: ability for disk, (_, ability) in first.abilities.items()}

    async def call_off(self, name: str) -> None:
        """An operator ends the VM: no standby is to bring it back. One that has taken over is the
        VM.
        """
        kept = self.kept.get(name)
        if kept is not None and kept.driver.state.take_over is not None:
            with contextlib.suppress(StateConflict):
                await kept.driver.cancel()

    def require_no_take_over(self, name: str) -> None:
        """Raises StateConflict while a standby of that VM takes over."""
        kept = self.kept.get(name)
        if kept is not None and kept.driver.state.take_over is not None:
            raise StateConflict(
                f"a standby of VM {name} takes over", remedy=f"see: semper standby show {name}"
            )

    def require_startable(self, spec: VmSpec) -> None:
        """Raises StateConflict when a standby has taken over and `spec` names the disks of before:
        they lack what was written since.
        """
        kept = self.kept.get(spec.name)
        serving = kept.driver.state.serving if kept is not None else None
        if kept is None or serving is None:
            return
        try:
            newest = read_guest(kept.generations.places(serving.number).state_dir).spec
        except RecordDamaged:
            return
        images = {disk.name: disk.image for disk in spec.disks}
        for disk in copied(newest):
            if images.get(disk.name) != disk.image:
                raise StateConflict(
                    f"standby {serving.number} of VM {spec.name} has taken over, and its disk "
                    f"{disk.name} is {disk.image}",
                    remedy="name that image in the VM file; or give up what was written since: "
                    f"semper standby disable {spec.name} --forget",
                )

    async def enable(self, vm: Vm, policy: Policy) -> StandbyDriver:
        """From now on the VM has standbys, kept so. Raises InvalidRequest or StateConflict when
        none can be made.
        """
        if vm.freed:
            raise StateConflict(
                f"VM {vm.name} has ended", remedy="start it, and enable its standbys then"
            )
        require_possible(vm)
        network.bridges_of(vm.spec, 0)
        return await self.keep(vm.spec, policy)

    async def keep(self, spec: VmSpec, policy: Policy) -> StandbyDriver:
        """As `enable`, of a VM of any host."""
        name = spec.name
        if (kept := self.kept.get(name)) is not None:
            state = kept.driver.state
            if name in self._disabling or (state.closing and not state.over):
                raise StateConflict(
                    f"the standbys of VM {name} are being removed",
                    remedy=f"when that is done: semper standby enable {name}",
                )
            kept.driver.set_policy(policy)
            return kept.driver
        # What was removed and is there all the same, as after `--forget`, keeps its number.
        numbers = await asyncio.to_thread(numbers_of, self._config, name)
        images = [number_of(disk.image) for disk in copied(spec)]
        last = max((number for number in (*numbers, *images) if number < REHEARSALS), default=0)
        if name in self.kept:  # another one has asked for it meanwhile
            return self.kept[name].driver
        state = replace(decide.begin(name, policy), last=last)
        try:
            record_of(self._config.state_dir, name).write(state)
        except OSError as error:
            raise Unavailable(
                f"the record of standbys cannot be written: {error.strerror}",
                remedy=f"make room: {self._config.state_dir}",
            ) from error
        if name not in self._house.vms:
            self._learn(name, spec)
        return self._start(state, [], self._generations(name, spec)).driver

    def beside(self) -> list[Beside]:
        """What runs for standbys and rehearsals. What boots, or is rehearsed, gives way to VMs;
        what waits has a VM's share: it is one as soon as it takes over.
        """
        found = []
        for name, kept in self.kept.items():
            making = kept.driver.state.making
            boots = making is not None and making.life is not Life.STANDING
            for number, vm in kept.generations.vms.items():
                if vm is self._house.vms.get(name):
                    continue
                made = boots and making is not None and making.number == number
                gives_way = made or number >= REHEARSALS
                found.append(Beside(vm, f"{name}@{number}", gives_way))
        return found

    async def rehearse(self, name: str) -> Rehearsal:
        """Has a copy of the newest standby of a VM go on, isolated. Raises NotFound, StateConflict
        when the VM does not run, no standby is ready or a rehearsal goes on, OutcomeUnknown when a
        process of the rehearsal does not end.
        """
        driver = self.require(name)
        ready = driver.state.ready
        if driver.state.first is not First.RUNNING or driver.state.take_over is not None:
            raise StateConflict(f"VM {name} does not run")
        if not ready:
            why = f": {driver.state.trouble}" if driver.state.trouble else ""
            raise StateConflict(f"no standby of VM {name} is ready{why}")
        if name in self._rehearsing:
            raise StateConflict(f"a rehearsal of VM {name} goes on")
        if name in self._disabling:
            raise StateConflict(f"the standbys of VM {name} are being removed")
        self._rehearsing.add(name)
        try:
            generations = self.kept[name].generations
            disks = self._firsts[name].disks()
            done = await Rehearsing(generations, ready[-1], disks).run()
        finally:
            self._rehearsing.discard(name)
        self.rehearsals[name] = done
        driver.rehearsed()
        said = done.failure or "the guest went on"
        driver.journal.note(time.time(), "standby", f"rehearsal with {done.number}: {said}")
        log.log(
            logging.WARNING if done.failure else logging.INFO,
            "standby vm=%s rehearsal number=%d: %s",
            name,
            done.number,
            said,
        )
        return done

    async def disable(self, name: str, *, forget: bool = False) -> None:
        """The VM has no standbys any more. With `forget` it is forgotten as well that one has taken
        over. Raises as `StandbyDriver.disable`; NotFound, and StateConflict for a VM that runs and
        was a standby.
        """
        driver = self.require(name)
        if name in self._rehearsing:
            raise StateConflict(f"a rehearsal of VM {name} goes on", remedy="wait for its end")
        if name in self._disabling:
            raise StateConflict(f"the standbys of VM {name} are being removed")
        self._disabling.add(name)
        try:
            await self._disable(driver, forget=forget)
        finally:
            self._disabling.discard(name)

    async def _disable(self, driver: StandbyDriver, *, forget: bool) -> None:
        name = driver.vm
        if not driver.state.closing:
            await driver.disable()
        elif not driver.state.over:  # as another agent, or somebody who did not wait, has begun it
            await driver.changes.wait_until(
                lambda: driver.state.over, timeout_s=None, what="the end of the standbys"
            )
        serving = driver.state.serving
        vm = self._house.vms.get(name)
        if serving is not None and not forget:
            return
        if serving is not None and vm is not None and not vm.freed:
            raise StateConflict(f"VM {name} runs, and was a standby: end it first")
        if serving is not None:
            try:
                await claims.forget_left(self._config, name)
            except StateConflict as error:  # it runs elsewhere; its old images stay what they are
                log.warning("standby vm=%s its old images are not forgotten: %s", name, error)
        await self.kept[name].detach()
        record_of(self._config.state_dir, name).remove()
        await asyncio.to_thread(self._remove_directories, name)
        del self.kept[name]

    async def forget_left(self, name: str) -> bool:
        """A standby on another host has taken over, and the VM may be run with the images that it
        had before; whether that was so. Raises StateConflict while the VM runs, Unavailable,
        OutcomeUnknown.
        """
        vm = self._house.vms.get(name)
        if vm is not None and not vm.freed:
            raise StateConflict(f"VM {name} runs", remedy="end it first")
        return await claims.forget_left(self._config, name)

    def _remove_directories(self, name: str) -> None:
        for base in (self._config.state_dir, self._config.run_dir):
            shutil.rmtree(standby_dir(base) / name, ignore_errors=True)

    async def open(self) -> None:
        """Goes on with what a former agent has left."""
        for name in await asyncio.to_thread(on_record, self._config.state_dir):
            generations = self._generations(name, read_first(self._config.state_dir, name))
            left = Leftovers(self._house, generations, self._adopt, self._promote)
            try:
                await self._recover(name, generations, left)
            except RecordDamaged as error:
                log.error("standby vm=%s %s", name, error)  # noqa: TRY400
                await left.rescue(name)
        self._upkeep = background.start(self._keep_up(), "standbys: upkeep", crash=True)

    async def _keep_up(self) -> None:
        """What is due by the day: rehearsals, and the end of what take-overs have lost."""
        while True:
            await asyncio.sleep(UPKEEP_S)
            for name in rehearsals_due(self.kept, time.time()):
                try:
                    await self.rehearse(name)
                except SempervirtError as error:
                    log.warning("standby vm=%s no rehearsal: %s", name, error.message)
            used = {disk.image for vm in self._house.vms.values() for disk in vm.spec.disks}
            await drop_lost(self._config.state_dir, used, time.time())

    async def _recover(self, name: str, generations: LiveGenerations, left: Leftovers) -> None:
        """Raises RecordDamaged."""
        state = record_of(self._config.state_dir, name).read()
        if state is None:  # somebody has moved it away: what these generations were nobody knows
            await left.rescue(name)
            return
        self._left[name] = state
        recovered, effects = await left.recover(state)
        self._start(recovered, effects, generations)

    async def close(self, *, keep: bool) -> None:
        """Leaves all for the next agent; without `keep` what waits is ended."""

        async def close(kept: Kept) -> None:
            await kept.detach()
            await kept.generations.close(keep=keep)

        if self._upkeep is not None:
            self._upkeep.cancel()
            await asyncio.wait([self._upkeep])
        await asyncio.gather(*(close(kept) for kept in self.kept.values()))
        await asyncio.gather(*self._leaving, return_exceptions=True)

    def _generations(self, name: str, spec: VmSpec | None) -> LiveGenerations:
        """Of a VM that is described by `spec`, if it is of another host or may be."""
        settings = read_settings(self._config)
        here = WatchedFirst(
            name,
            lambda: self._house.vms.get(name),
            self._snapshot,
            self.places_of,
            self._config.patience.command_s,
            partial(write_taken, self._config.state_dir, name),
        )
        first: WatchedFirst | FirstThere = here
        if settings is not None:
            first = FirstThere(
                name,
                self._config,
                here,
                spec,
                self._fences,
                partial(self._learn, name),
                lambda: self._dismiss(name),
                lambda: self._is_ready(name),
            )
        self._firsts[name] = first
        return LiveGenerations(
            self._config,
            name,
            lambda: self._house.vms.get(name),
            self._house.host,
            self._promote,
            os.uname().nodename[:NAME_MAX] if settings is None else settings.host,
            first,
        )

    def _fences(self) -> Fences:
        try:
            return read_fences(self._config.fences)
        except InvalidRequest as error:
            log.error("standby %s", error)  # noqa: TRY400
            return Fences()

    def _learn(self, name: str, spec: VmSpec) -> None:
        """So that the next agent knows what the VM has, also when its host is gone."""
        try:
            write_first(self._config.state_dir, spec)
        except OSError as error:
            log.error("standby vm=%s its description is not written: %s", name, error)  # noqa: TRY400

    def _is_ready(self, name: str) -> bool:
        kept = self.kept.get(name)
        return kept is not None and bool(kept.driver.state.ready) and not kept.driver.state.closing

    def _dismiss(self, name: str) -> None:
        """The store names another keeper of the standbys of a VM of another host."""
        kept = self.kept.get(name)
        if kept is None or name in self._dismissing or kept.driver.state.take_over is not None:
            return
        self._dismissing.add(name)
        log.warning("standby vm=%s its standbys are kept here no more", name)
        self._leaving.append(background.start(self._dismissed(name), f"{name}: dismissed"))

    async def _dismissed(self, name: str) -> None:
        try:
            await self.disable(name)
        except SempervirtError as error:  # it is told again
            log.warning("standby vm=%s %s", name, error)
        finally:
            self._dismissing.discard(name)

    def _start(self, state: Standby, effects: list[Effect], generations: LiveGenerations) -> Kept:
        name = state.vm
        first = self._firsts[name]
        ports = Ports(first, generations, record_of(self._config.state_dir, name))
        driver = StandbyDriver(state, ports)
        driver.start(effects)
        driver.begin_watching()
        watching = background.start(first.run(), f"{name}: watch", crash=True)
        self.kept[name] = Kept(driver, generations, first, watching)
        return self.kept[name]

    def config_of(self, vm: Vm) -> AgentConfig:
        """How a VM is run: the files of one that was a standby are where they were."""
        for number in numbers_of(self._config, vm.name):
            config = config_of(self._config, vm.name, number)
            if vm.ledger.path.is_relative_to(config.vm_state_dir(vm.name)):
                return config
        return self._config

    def places_of(self, vm: Vm) -> Places:
        """Where the processes of a VM have their files."""
        return self.config_of(vm).vm_places

    def prepare_start(self, spec: VmSpec) -> None:
        """A VM that came from a standby has that one's taps, which nobody else makes: also after a
        start of the host. What cannot be done is in the log: QEMU says what it lacks.
        """
        kept = self.kept.get(spec.name)
        serving = kept.driver.state.serving if kept is not None else None
        if kept is None or serving is None:
            return
        try:
            guest = read_guest(kept.generations.places(serving.number).state_dir)
            network.prepare_again(spec, guest.bridges)
        except SempervirtError as error:
            log.warning("standby vm=%s %s", spec.name, error)

    async def _promote(self, vm: Vm) -> None:
        """`vm`, which was a standby, is the VM of its name; the one before has ended."""
        before = self._house.vms.get(vm.name)
        self._house.vms[vm.name] = vm
        if before is not None and before is not vm:
            for event in before.machine.journal.events:
                vm.machine.journal.events.append(event)
            # Beside: the guest waits. An agent that dies meanwhile leaves that to the next one.
            leaving = self._leave(before, self._loss(vm.name, before.spec))
            self._leaving.append(background.start(leaving, f"{vm.name}: leave"))
        elif before is None and (spec := self._spec_there(vm.name)) is not None:
            noting = self._note_loss(vm.name, self._loss(vm.name, spec))
            self._leaving.append(background.start(noting, f"{vm.name}: loss"))

    async def losses(self, name: str) -> tuple[Loss, ...]:
        """What take-overs of a VM have lost, also when it has no standbys any more. Raises
        RecordDamaged, NotFound for what is no name of a VM, and so of no record.
        """
        if not is_name(name):
            raise NotFound("no VM can be called so", remedy="see: semper standby list")
        return await asyncio.to_thread(losses_of(self._config.state_dir, name).read)

    def _spec_there(self, name: str) -> VmSpec | None:
        first = self._firsts.get(name)
        return first.told_spec if isinstance(first, FirstThere) else None

    def _loss(self, name: str, before: VmSpec) -> Loss | None:
        """What the take-over under way loses of `before`: what that wrote after the snapshot."""
        kept = self.kept.get(name)
        state = kept.driver.state if kept is not None else self._left.get(name)
        over = state.take_over if state is not None else None
        standby = state.generation(over.number) if state is not None and over is not None else None
        disks = tuple(LostDisk(disk.name, disk.image) for disk in copied(before))
        if over is None or standby is None or not disks:
            return None
        return Loss(standby.number, standby.taken, over.began, disks)

    async def _note_loss(self, name: str, loss: Loss | None) -> None:
        try:
            if loss is not None:
                await asyncio.to_thread(losses_of(self._config.state_dir, name).add, loss)
        except (OSError, RecordDamaged) as error:
            log.error("standby vm=%s its loss is not noted: %s", name, error)  # noqa: TRY400

    async def _leave(self, before: Vm, loss: Loss | None) -> None:
        """Lets go of a VM whose place a standby has taken."""
        await self._note_loss(before.name, loss)
        await before.detach()
        records = before.ledger.path.parent
        await asyncio.to_thread(shutil.rmtree, records, ignore_errors=True)


def rehearsals_due(kept: Mapping[str, Kept], now: float) -> list[str]:
    """The VMs of which a take-over is to be rehearsed now (seconds since the epoch)."""
    due = []
    for name, one in kept.items():
        state = one.driver.state
        every_s = state.policy.test_every_s
        idle = state.first is First.RUNNING and state.take_over is None and not state.closing
        if every_s is not None and idle and state.ready and now - state.tested >= every_s:
            due.append(name)
    return due
