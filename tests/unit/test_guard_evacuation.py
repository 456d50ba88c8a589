"""What the guard makes of an evacuation: which VMs are out, are tried again, or are lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sempervirt.core.errors import Unavailable
from sempervirt.evacuation import orders
from sempervirt.evacuation.guarding import Evacuations, outcome_of
from sempervirt.evacuation.values import (
    Cause,
    EvacuationOrder,
    Fate,
    Outcome,
    Reason,
    Report,
)
from sempervirt.guard.decide import decide
from sempervirt.guard.presets import shipped
from sempervirt.guard.state import BeginEvacuation, EvacuationEnded, GuardState, Phase
from sempervirt.qemu.state import Runstate

ORDER = EvacuationOrder(Cause.GUARD, "event 0: panic")
NONE, HERE = frozenset[str](), frozenset({"web"})


def report(*outcomes: Outcome, failure: str = "") -> Report:
    return Report(ORDER, 0.0, 1.0, outcomes, failure)


@pytest.mark.parametrize("fate", [Fate.MOVED, Fate.STANDBY, Fate.ENDED])
def test_what_runs_elsewhere_or_has_ended_is_out(fate: Fate) -> None:
    ended = outcome_of(report(Outcome("web", fate)), NONE, frozenset({"web"}))
    assert (ended.moved, ended.left, ended.lost) == (("web",), (), ())


@pytest.mark.parametrize(
    "fate", [Fate.STAYS, Fate.UNKNOWN, Fate.WAITS, Fate.MOVES, Fate.CHECKS, Fate.FALLS]
)
def test_what_is_not_known_to_be_out_is_tried_again_unless_its_own_thread_is_dead(
    fate: Fate,
) -> None:
    outcome = Outcome("web", fate, reason=Reason.REFUSED, why="b: no memory")
    ended = outcome_of(report(outcome), HERE, frozenset())
    assert (ended.moved, ended.left, ended.lost) == ((), ("web",), ())
    assert "web: every host that fits has refused it, or the move failed: b: no memory" in ended.why
    broken = outcome_of(report(outcome), HERE, HERE)
    assert (broken.left, broken.lost) == ((), ("web",))


def test_every_fate_has_its_place_and_no_vm_is_told_twice() -> None:
    outcomes = [Outcome(fate.value, fate) for fate in Fate]
    ended = outcome_of(report(*outcomes, failure="the store is gone"), NONE, NONE)
    told = [*ended.moved, *ended.left, *ended.lost]
    assert sorted(told) == sorted(fate.value for fate in Fate)
    assert ended.lost == ("lost",)
    assert ended.why.startswith("the store is gone")


async def test_a_host_is_not_empty_while_a_vm_there_is_unknown_or_being_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def silent(_agent: object, _order: object) -> Report:
        raise Unavailable("the store is silent")

    monkeypatch.setattr(orders, "evacuate", silent)
    agent: Any = SimpleNamespace(vms={}, unknown={}, launching={}, evacuation=None)
    begin = BeginEvacuation(("event 0: panic",), 1.0, frozenset(), shutdown=False)
    guard = Evacuations(agent)
    assert await guard.evacuate(begin) == EvacuationEnded((), (), ())
    agent.unknown = {"web": SimpleNamespace(end=None), "gone": SimpleNamespace(end=object())}
    ended = await guard.evacuate(begin)
    assert (ended.left, ended.why) == (("web",), "the store is silent")
    agent.unknown, agent.launching = {}, {"db": object()}
    assert (await guard.evacuate(begin)).left == ("db",)


def test_a_host_whose_evacuation_had_no_plan_is_not_empty() -> None:
    """The store was silent until the deadline: the report names no VM, and all are here."""
    silent = report(failure="hosts and VMs were not heard by the deadline")
    ended = outcome_of(silent, frozenset({"web", "db"}), frozenset({"db"}))
    assert (ended.moved, ended.left, ended.lost) == ((), ("web",), ("db",))
    assert ended.why == "hosts and VMs were not heard by the deadline"
    # The control: nothing is here, and nothing was.
    assert outcome_of(silent, NONE, NONE).left == ()
    assert outcome_of(None, HERE, NONE).left == ("web",)


async def test_a_death_is_not_let_happen_while_nobody_knows_a_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def no_plan(_agent: object, _order: object) -> Report:
        return report(failure="hosts and VMs were not heard by the deadline")

    monkeypatch.setattr(orders, "evacuate", no_plan)
    vms = {
        "web": SimpleNamespace(freed=False, run=Runstate.RUNNING, pid=790),
        "ended": SimpleNamespace(freed=False, run=Runstate.STOPPED, pid=None),
        "gone": SimpleNamespace(freed=True, run=Runstate.STOPPED, pid=None),
    }
    agent: Any = SimpleNamespace(vms=vms, unknown={}, launching={}, evacuation=None)
    begin = BeginEvacuation(("event 0: panic",), 1.0, frozenset(), shutdown=False)
    ended = await Evacuations(agent).evacuate(begin)
    assert ended.left == ("web",)
    evacuating = GuardState(Phase.EVACUATING, module=True, put_off=True, attempts=1)
    state, effects = decide(shipped(), evacuating, ended, 1.0)
    assert (state.phase, effects) == (Phase.WAITING, [])
