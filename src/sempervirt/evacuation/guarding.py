"""The guard of this agent's host: what the room `guard` asks for when the host dies is that the VMs
leave, and here they are evacuated.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol, assert_never

from sempervirt.core.errors import InvalidRequest, SempervirtError
from sempervirt.evacuation import orders
from sempervirt.evacuation.orders import Emptied
from sempervirt.evacuation.values import Cause, EvacuationOrder, Fate, Outcome, Report
from sempervirt.guard import presets as guard_presets
from sempervirt.guard.adapters import HeardRecord, KernelModule, shutdowns, sources
from sempervirt.guard.driver import Guard
from sempervirt.guard.presets import Presets
from sempervirt.guard.sources.module import ModuleDevice
from sempervirt.guard.state import BeginEvacuation, EvacuationEnded

log = logging.getLogger(__name__)

# So many moves at a time: a host that dies has no other use for its link.
TOGETHER = 4
# The answer comes so long after the deadline at the latest: a move that has begun may end by then.
GRACE_S = 10.0


class Guarded(Emptied, Protocol):
    """The agent of a host that is guarded."""

    guard: Guard | None


class Evacuations:
    """Evacuates the host for its guard."""

    def __init__(self, house: Emptied) -> None:
        self._house = house

    async def evacuate(self, order: BeginEvacuation) -> EvacuationEnded:
        """See `guard.ports.Evacuator`."""
        house = self._house
        here = self._here()
        if not here:
            return EvacuationEnded((), (), ())
        vms = house.vms.items()
        broken = frozenset(name for name, vm in vms if name in here and vm.pid in order.broken)
        why = ""
        report: Report | None = None
        try:
            async with asyncio.timeout(order.deadline_s + GRACE_S):
                report = await self._evacuate(order, broken)
        except TimeoutError:
            why = "it is not over by its deadline"
            report = None if house.evacuation is None else house.evacuation.state.report()
        except SempervirtError as error:
            why = error.message
        return outcome_of(report, self._here(), broken, why)

    def _here(self) -> frozenset[str]:
        """The VMs of this host, also those that may run, or are about to: as long as there is one,
        the host is not empty.
        """
        house = self._house
        known = {name for name, vm in house.vms.items() if not (vm.freed or vm.run.is_end)}
        unknown = {name for name, one in house.unknown.items() if one.end is None}
        return frozenset(known | unknown | house.launching.keys())

    async def _evacuate(self, order: BeginEvacuation, broken: frozenset[str]) -> Report:
        """Raises SempervirtError. One that goes on already for a host that ends is waited for."""
        present = self._house.evacuation
        if present is not None and not present.over and present.state.order.cause.ends_host:
            await present.wait_over()
            return present.state.report()
        wanted = EvacuationOrder(
            Cause.SHUTDOWN if order.shutdown else Cause.GUARD,
            "; ".join(order.evidence),
            deadline_s=order.deadline_s,
            concurrency=TOGETHER,
            broken=tuple(sorted(broken)),
        )
        return await orders.evacuate(self._house, wanted)


def outcome_of(
    report: Report | None, here: frozenset[str], broken: frozenset[str], why: str = ""
) -> EvacuationEnded:
    """What the guard makes of an evacuation. `here` are the VMs that this host has afterwards: one
    of which the report says nothing (there was no plan, say) is left. `broken` are VMs whose own
    QEMU has a dead thread: those that are still here are lost, and are not waited for.
    """
    moved: list[str] = []
    left: list[str] = []
    lost: list[str] = []
    outcomes = () if report is None else report.outcomes
    whys = [why, "" if report is None else report.failure]
    for vm in sorted(here - {one.vm for one in outcomes}):
        (lost if vm in broken else left).append(vm)
    for one in outcomes:
        match one.fate:
            case Fate.MOVED | Fate.STANDBY | Fate.ENDED:
                moved.append(one.vm)
            case Fate.LOST:
                lost.append(one.vm)
                whys.append(_why(one))
            case Fate.STAYS | Fate.UNKNOWN | Fate.WAITS | Fate.MOVES | Fate.CHECKS | Fate.FALLS:
                (lost if one.vm in broken else left).append(one.vm)
                whys.append(_why(one))
            case _:
                assert_never(one.fate)
    return EvacuationEnded(
        tuple(moved), tuple(left), tuple(lost), "; ".join(text for text in whys if text)
    )


def _why(one: Outcome) -> str:
    reasons = (one.reason.value if one.reason else one.fate.value, one.why)
    return f"{one.vm}: {': '.join(text for text in reasons if text)}"


@asynccontextmanager
async def guarded(house: Guarded, operators: Path) -> AsyncIterator[Guard]:
    """Guards the host until the block is left. What is wrong with an operator's presets is an error
    in the log, and the shipped ones are in force: the VMs need a guard all the same.
    """
    held = shutdowns()
    device = ModuleDevice()
    presets, trouble = await asyncio.to_thread(read_presets, operators)
    heard = await asyncio.to_thread(HeardRecord, house.config.state_dir / "guard.json")
    guard = Guard(presets, Evacuations(house), KernelModule(), held, heard=heard)
    guard.trouble = trouble
    guard.start()
    guard.watch(sources(device, held), device)
    house.guard = guard
    try:
        yield guard
    finally:
        house.guard = None
        await guard.detach()


def read_presets(operators: Path) -> tuple[Presets, str]:
    """The presets that are in force, and what is wrong with the operator's."""
    try:
        return guard_presets.load(operators), ""
    except InvalidRequest as error:
        log.error("guard: %s; the shipped presets are in force", error)  # noqa: TRY400
        return guard_presets.shipped(), str(error)
