"""Evacuations one after the other: what the host is afterwards, and which VMs are away."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sempervirt.cluster.service import Service
from sempervirt.core.errors import StateConflict, Unavailable
from sempervirt.evacuation import orders
from sempervirt.evacuation.adapters import NoneElsewhere, OwnService
from sempervirt.evacuation.elsewhere import KeptElsewhere
from sempervirt.evacuation.record import EvacuationRecord
from sempervirt.evacuation.state import Evacuation, Passage, Step
from sempervirt.evacuation.values import Cause, EvacuationOrder, Fate

BY_OPERATOR = EvacuationOrder(Cause.OPERATOR, "its fan is loud")
BY_SHUTDOWN = EvacuationOrder(Cause.SHUTDOWN, "the host goes down")
BY_GUARD = EvacuationOrder(Cause.GUARD, "event 0: panic", without_records=True)


class Driver:
    """One evacuation that does nothing by itself."""

    def __init__(self, state: Evacuation) -> None:
        self.state = state
        self.detached = 0

    @property
    def over(self) -> bool:
        return self.state.over

    async def detach(self) -> None:
        self.detached += 1
        await asyncio.sleep(0)  # others take their turn

    def end(self, *moved: str) -> None:
        passages = tuple(Passage(vm, Fate.MOVED, "b") for vm in moved)
        self.state = replace(self.state, step=Step.OVER, passages=passages, ended=1.0)


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An agent whose evacuations are begun, and end when the test says so."""
    settings = SimpleNamespace(host="a")
    monkeypatch.setattr(orders, "read_settings", lambda _config: settings)

    def go(agent: Any, _record: object, begun: tuple[Evacuation, object]) -> Any:
        agent.evacuation = Driver(begun[0])
        return agent.evacuation

    monkeypatch.setattr(orders, "_go", go)
    config = SimpleNamespace(state_dir=tmp_path)
    return SimpleNamespace(config=config, evacuation=None, service=Service.read(tmp_path))


async def emptied(agent: Any, order: EvacuationOrder, *moved: str) -> None:
    """The host is taken out of service, and its VMs have left."""
    driver: Any = await orders.begin(agent, order)
    await agent.service.take_out(order.why)
    driver.end(*moved)


async def test_a_host_that_a_shutdown_has_emptied_comes_back_by_itself(agent: Any) -> None:
    await emptied(agent, BY_SHUTDOWN, "web")  # by the guard, which logind has told
    await emptied(agent, BY_SHUTDOWN)  # and once more, by the unit
    report = await orders.bring_back(agent, after_shutdown=True)
    assert report is not None
    assert report.away == {"web": "b"}
    assert agent.service.absence is None


@pytest.mark.parametrize("order", [BY_OPERATOR, BY_GUARD])
async def test_a_host_that_was_out_before_the_shutdown_stays_out(
    agent: Any, order: EvacuationOrder
) -> None:
    await emptied(agent, order, "web")
    await emptied(agent, BY_SHUTDOWN)
    assert await orders.bring_back(agent, after_shutdown=True) is None
    assert agent.service.absence is not None
    # Whoever brings it back is told of all VMs that are away.
    report = await orders.bring_back(agent)
    assert report is not None
    assert report.away == {"web": "b"}
    assert agent.service.absence is None


async def test_what_came_back_with_the_host_is_not_away_any_more(agent: Any) -> None:
    await emptied(agent, BY_OPERATOR, "web")
    await orders.bring_back(agent)
    await emptied(agent, BY_OPERATOR, "db")
    assert agent.evacuation.state.report().away == {"db": "b"}
    assert agent.evacuation.state.taken_out_by is Cause.OPERATOR


async def test_a_host_that_is_to_be_emptied_meanwhile_does_not_come_back(
    agent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await emptied(agent, BY_OPERATOR, "web")
    put_in = agent.service.put_in

    async def slowly() -> None:
        await put_in()
        await orders.begin(agent, BY_GUARD)

    monkeypatch.setattr(agent.service, "put_in", slowly)
    with pytest.raises(StateConflict, match="is being emptied"):
        await orders.bring_back(agent)
    assert agent.service.why_not == BY_GUARD.why


async def test_two_that_displace_a_third_are_not_begun_both(agent: Any) -> None:
    await orders.begin(agent, BY_OPERATOR)
    begun = await asyncio.gather(
        orders.begin(agent, BY_GUARD),
        orders.begin(agent, BY_SHUTDOWN),
        return_exceptions=True,
    )
    assert sorted(type(one).__name__ for one in begun) == [
        Driver.__name__, StateConflict.__name__,
    ]  # fmt: skip
    assert agent.evacuation in begun


async def test_one_of_a_host_that_ends_is_begun_without_a_record(
    agent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the state directory is full; also in the place of one that an operator began."""
    await orders.begin(agent, BY_OPERATOR)
    monkeypatch.setattr(EvacuationRecord, "write", lambda _self, _state: False)
    driver = await orders.begin(agent, BY_SHUTDOWN)
    assert agent.evacuation is driver
    assert driver.state.order.without_records
    agent.evacuation = None
    assert (await orders.begin(agent, BY_SHUTDOWN)).state.order.cause is Cause.SHUTDOWN
    # The control: an operator's is not begun.
    agent.evacuation = None
    with pytest.raises(Unavailable, match="cannot be written down"):
        await orders.begin(agent, BY_OPERATOR)


async def test_one_that_fails_at_once_leaves_a_host_as_it_was(tmp_path: Path) -> None:
    service = Service.read(tmp_path)
    first = OwnService(service, BY_OPERATOR, 0.0)
    await first.mark("its fan is loud")
    await first.unmark()
    assert service.why_not == ""
    await first.mark("its fan is loud")
    second = OwnService(service, BY_OPERATOR, time.time() + 60)
    await second.mark("again")
    await second.unmark()
    assert service.why_not == "its fan is loud"


@pytest.mark.parametrize("order", [BY_OPERATOR, BY_SHUTDOWN, BY_GUARD])
def test_only_a_host_that_dies_leaves_vms_to_other_hosts_standbys(
    agent: Any, order: EvacuationOrder
) -> None:
    """In order, a VM that stays is ended with nothing lost; a standby lacks what was written."""
    agent.standbys, agent.peacetime = SimpleNamespace(offer=None), None
    found = orders._elsewhere(agent, order)
    assert isinstance(found, KeptElsewhere if order is BY_GUARD else NoneElsewhere)
