"""Emptying this host: how an evacuation is asked for, goes on after a restart of the agent, and how
the host comes back.

    report = await evacuate(house, EvacuationOrder(Cause.GUARD, why="the kernel oopsed in …"))
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from functools import partial
from typing import Protocol

from pydantic import TypeAdapter

from sempervirt.cluster import peer
from sempervirt.cluster.cluster import Cluster, Member, Settings, read_settings
from sempervirt.core.errors import (
    InvalidRequest,
    NotFound,
    SempervirtError,
    StateConflict,
    Unavailable,
)
from sempervirt.evacuation import decide
from sempervirt.evacuation.adapters import (
    ClusterFleet,
    ClusterMoves,
    Elsewhere,
    HostStandbys,
    NoneElsewhere,
    OwnService,
)
from sempervirt.evacuation.capacity import Capacity, capacity
from sempervirt.evacuation.driver import EvacuationDriver
from sempervirt.evacuation.elsewhere import KeptElsewhere
from sempervirt.evacuation.peacetime import Peacetime
from sempervirt.evacuation.placement import Place, Places, places
from sempervirt.evacuation.plan import Absent, Plan, Survey, plan
from sempervirt.evacuation.ports import Ports
from sempervirt.evacuation.record import EvacuationRecord
from sempervirt.evacuation.state import Decision, Evacuation, Passage, Step
from sempervirt.evacuation.values import (
    CONCURRENCY_MAX,
    Cause,
    EvacuationOrder,
    Fate,
    Report,
)
from sempervirt.host.http import understood
from sempervirt.host.owner import HOST_CLOCK
from sempervirt.host.records import RecordDamaged
from sempervirt.migration import moves, wire
from sempervirt.standby.standbys import Standbys
from sempervirt.vm.house import House

log = logging.getLogger(__name__)

FILE = "evacuation.json"
NOT_BEGUN = "it was not begun, for it could not be written down"
# How often processes that wait are counted.
READY_S = 5.0
# Another host asks all others about each of its VMs.
SURVEY_S = 120.0
_SURVEY = TypeAdapter(Survey)


class Emptied(House, Protocol):
    """The agent of a host that can be emptied; `evacuation` is the last one, `peacetime` what is
    known of the other hosts beforehand.
    """

    evacuation: EvacuationDriver | None
    peacetime: Peacetime
    standbys: Standbys


async def evacuate(house: Emptied, order: EvacuationOrder) -> Report:
    """Empties this host, and returns when every VM has an outcome. Raises as `begin`.

    A caller that does not wait any more ends nothing.
    """
    driver = await begin(house, order)
    await driver.wait_over()
    return driver.state.report()


async def begin(house: Emptied, order: EvacuationOrder) -> EvacuationDriver:
    """Begins to empty this host.

    One that an operator asked for gives way to one for a host that ends: what is on its way goes
    on, and the rest is planned anew. Raises InvalidRequest, StateConflict while another one goes on
    or when this host belongs to no cluster, Unavailable when it cannot be written down.
    """
    _check(house, order)
    if order.cause.ends_host:
        # A state directory that is full or hangs is no reason to lose the VMs.
        order = replace(order, without_records=True)
    # Again after each wait: somebody else may have begun one meanwhile.
    while (present := house.evacuation) is not None and not present.over:
        if present.state.order.cause.ends_host or not order.cause.ends_host:
            raise StateConflict(
                f"this host is being emptied already: {present.state.order.why}",
                remedy="see how far it is: semper host evacuate --show",
            )
        log.warning("evacuate: %s takes the place of %s", order, present.state.order)
        await present.detach()
        if house.evacuation is present:
            break
    state, effects = decide.begin(order, time.time(), HOST_CLOCK.now())
    state = _as_it_stands(house, state)
    log.warning(
        "evacuate cause=%s deadline_s=%g: %s", order.cause.value, order.deadline_s, order.why
    )
    record = _record(house)
    if not record.write(state) and not order.without_records:
        # What waits in memory is not to be begun by the next house.
        record.write(replace(state, step=Step.OVER, failure=NOT_BEGUN, ended=state.began))
        raise Unavailable(
            "that this host is to be emptied cannot be written down",
            remedy=f"make room in {house.config.state_dir}",
        )
    return _go(house, record, (state, effects))


def resume(house: Emptied) -> None:
    """Goes on with what an earlier agent began; its moves go on already (`moves.resume_all`)."""
    record = _record(house)
    try:
        left = record.read()
    except RecordDamaged as error:
        log.error("evacuate: %s", error)  # noqa: TRY400
        return
    if left is not None:
        if not left.over:
            log.warning("evacuate goes on, begun by an earlier agent: %s", left.order.why)
        _go(house, record, decide.recover(left))


async def plan_only(house: Emptied, order: EvacuationOrder) -> Plan:
    """What would be done. Gives images their ids, if they have none, and changes nothing else.

    Raises InvalidRequest, StateConflict, Unavailable.
    """
    _check(house, order)
    seen = await _fleet(house, order).look(order.destinations)
    return plan(seen.survey, order)


async def places_for(house: Emptied, name: str) -> Places:
    """Which hosts a VM of this one could move to, the best first, and what stands in the way of the
    others. Gives its images their ids, if they have none.

    Raises NotFound for a VM that does not run here, StateConflict, Unavailable.
    """
    settings = _require_cluster(house)
    vm = house.vm(name)
    if vm.freed or vm.run.is_end:
        raise StateConflict(f"VM {name} does not run", remedy=f"semper vm start {name}")
    fleet = ClusterFleet(house, moves.obstacles_here, measured=False)
    seen = await fleet.look((), only=name)
    need = seen.survey.need(name)
    if need is None:
        raise StateConflict(f"VM {name} moves to {dict(seen.moving).get(name, 'another host')}")
    absent = [Place(one.host, (one.why,)) for one in seen.survey.absent]
    own = Place(settings.host, ("it runs there",))
    return Places((*places(need, seen.survey.rooms), *absent, own), need.stuck)


async def survey(house: Emptied) -> Survey:
    """The VMs of this host, and which others could start them. Gives images their ids, if they have
    none. Raises StateConflict, Unavailable.
    """
    _require_cluster(house)
    fleet = ClusterFleet(house, moves.obstacles_here, measured=False, starting=True)
    return (await fleet.look(())).survey


async def find_capacity(house: Emptied, lost: int) -> Capacity:
    """Whether the VMs of the cluster have room when so many hosts are lost. Asks every host about
    all others. Raises StateConflict, Unavailable when the store does not answer.
    """
    _require_cluster(house)
    async with Cluster.opened(house.config) as cluster:
        members = [member for member in await cluster.members() if not member.revoked]
        answers = await asyncio.gather(*(_surveyed(house, cluster, one) for one in members))
    found = {one.host.name: said for one, said in zip(members, answers, strict=True)}
    surveys = {host: said for host, said in found.items() if isinstance(said, Survey)}
    absent = tuple(said for said in answers if isinstance(said, Absent))
    if lost > len(surveys):
        raise StateConflict(f"hosts that answer: {len(surveys)}; {lost} of them cannot be lost")
    return await asyncio.to_thread(capacity, surveys, lost, absent)


async def _surveyed(house: Emptied, cluster: Cluster, member: Member) -> Survey | Absent:
    name = member.host.name
    if name == cluster.settings.host:
        return await survey(house)
    if member.presence is None:
        return Absent(name, f"the agent of {name} is silent")
    try:
        async with peer.connect(cluster, name, member.host.address) as connection:
            said = await connection.call("GET", "/host/survey", timeout_s=SURVEY_S)
            return understood(_SURVEY, said, "GET /host/survey")
    except SempervirtError as error:
        return Absent(name, f"it cannot be asked: {error.message}")


def last(house: Emptied) -> EvacuationDriver:
    """The last evacuation of this host, also one that goes on. Raises NotFound."""
    if house.evacuation is None:
        raise NotFound("this host was never emptied", remedy="semper host evacuate")
    return house.evacuation


async def bring_back(house: Emptied, *, after_shutdown: bool = False) -> Report | None:
    """Puts this host into service again; gives what the last evacuation has moved away, None if
    there was none. With `after_shutdown` only a host that a shutdown has taken out of service: one
    that an operator has emptied before the shutdown stays out. Raises StateConflict while an
    evacuation goes on, Unavailable.
    """
    present = house.evacuation
    if after_shutdown and (present is None or present.state.taken_out_by is not Cause.SHUTDOWN):
        return None
    _require_over(present)
    await house.service.put_in()
    if (begun := house.evacuation) is not None and begun is not present:
        order = begun.state.order
        await house.service.take_out(order.why, without_records=order.without_records)
        _require_over(begun)
    return None if present is None else present.state.report()


def _require_over(present: EvacuationDriver | None) -> None:
    if present is not None and not present.over:
        raise StateConflict(
            "this host is being emptied",
            remedy="wait for the end, or give it up: semper host evacuate --cancel",
        )


async def keep_ready(house: Emptied, count: int) -> None:
    """Keeps so many ends of the wire waiting, for moves from a host on which no program can be
    started any more; until it is cancelled.
    """
    reserve = wire.waiting(house.config.run_dir / "wired-waiting.log")
    wire.fall_back_on(reserve)
    try:
        while True:
            reserve.keep(count)
            await asyncio.sleep(READY_S)
    finally:
        wire.fall_back_on(None)
        reserve.release()


def _as_it_stands(house: Emptied, begun: Evacuation) -> Evacuation:
    """With what is left of evacuations before, if this host is out of service since then."""
    present = house.evacuation
    if house.service.absence is None:
        return begun
    if present is None:
        return replace(begun, out_by=Cause.OPERATOR)
    away = tuple(present.state.report().away.items())
    return replace(begun, earlier=away, out_by=present.state.taken_out_by)


def _require_cluster(house: Emptied) -> Settings:
    settings = read_settings(house.config)
    if settings is None:
        raise StateConflict(
            "this host belongs to no cluster, so its VMs have nowhere to go",
            remedy="join one: semper host join",
        )
    return settings


def _check(house: Emptied, order: EvacuationOrder) -> None:
    """Raises InvalidRequest, StateConflict."""
    settings = _require_cluster(house)
    if settings.host in order.destinations:
        raise InvalidRequest(f"{settings.host} is this host", remedy="name others: --to HOST")
    if not 1 <= order.concurrency <= CONCURRENCY_MAX:
        raise InvalidRequest(f"from 1 to {CONCURRENCY_MAX} moves go on at once")
    if not 0 < order.deadline_s <= 86400:
        raise InvalidRequest("the deadline is at most a day away")


def _record(house: Emptied) -> EvacuationRecord:
    return EvacuationRecord(house.config.state_dir / FILE)


def _fleet(house: Emptied, order: EvacuationOrder) -> ClusterFleet:
    ends, against = order.cause.ends_host, moves.obstacles_here
    return ClusterFleet(
        house,
        against,
        measured=not ends,
        peacetime=_peacetime(house, order),
        broken=order.broken,
        elsewhere=_elsewhere(house, order),
    )


def _elsewhere(house: Emptied, order: EvacuationOrder) -> Elsewhere:
    """A VM that a shutdown leaves here is ended in order, and so loses nothing of its disks; with a
    standby it would.
    """
    if order.cause is not Cause.GUARD:
        return NoneElsewhere()
    return KeptElsewhere(house.config, house.standbys.offer, house.peacetime)


def _peacetime(house: Emptied, order: EvacuationOrder) -> Peacetime | None:
    return house.peacetime if order.cause.ends_host else None


def _go(house: Emptied, record: EvacuationRecord, begun: Decision) -> EvacuationDriver:
    state, effects = begun
    order = state.order
    ports = Ports(
        OwnService(house.service, order, state.began),
        _fleet(house, order),
        ClusterMoves(house, partial(moves.depart, house), order, _peacetime(house, order)),
        HostStandbys(house, house.standbys.find, _own_name(house), _elsewhere(house, order)),
        record,
    )
    driver = house.evacuation = EvacuationDriver(state, ports, followed=_tell)
    if not state.over:
        driver.start(effects)
    return driver


def _own_name(house: Emptied) -> str:
    settings = read_settings(house.config)
    return settings.host if settings is not None else "this host"


def _tell(before: Evacuation, after: Evacuation) -> None:
    """Each change of a VM's fate is a line in the log."""
    was = {one.vm: one.fate for one in before.passages}
    for one in after.passages:
        if one.fate is not was.get(one.vm):
            log.log(_level(one), "evacuate vm=%s %s", one.vm, _in_words(one))
    if after.over and not before.over:
        counts = ", ".join(
            f"{fate.value} {count}"
            for fate in Fate
            if (count := sum(one.fate is fate for one in after.passages))
        )
        log.warning("evacuate is over: %s %s", counts or "no VM was here", after.failure)


def _level(one: Passage) -> int:
    bad = (Fate.STAYS, Fate.UNKNOWN, Fate.LOST)
    return logging.ERROR if one.fate in bad else logging.INFO


def _in_words(one: Passage) -> str:
    why = "; ".join(part for part in (one.reason and one.reason.value, one.why) if part)
    text = f"{one.fate.value} {one.host}".strip()
    return f"{text}: {why}" if why else text
