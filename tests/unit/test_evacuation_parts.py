"""What an evacuation is made of, each by itself: words about a VM, records, service, what waits."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sempervirt.agent import Agent, AgentConfig
from sempervirt.cli import evacuate as commands
from sempervirt.cli.evacuate import _print, in_words, judge, parse_duration
from sempervirt.cli.evacuate import begun as begin_order
from sempervirt.cli.output import Output
from sempervirt.cluster import peer
from sempervirt.cluster.cluster import Cluster
from sempervirt.cluster.service import FILE, Service
from sempervirt.core.errors import (
    InvalidRequest,
    NotFound,
    OutcomeUnknown,
    StateConflict,
    StateLost,
    Unavailable,
)
from sempervirt.core.failure import Failure
from sempervirt.daemon.logs import MemoryFirst
from sempervirt.evacuation import adapters, decide
from sempervirt.evacuation.adapters import HostStandbys, NoneElsewhere
from sempervirt.evacuation.adapters import judge as place_of
from sempervirt.evacuation.messages import (
    Asker,
    EvacuateRequest,
    EvacuationView,
    evacuation_view,
)
from sempervirt.evacuation.peacetime import Peacetime
from sempervirt.evacuation.placement import Need, Room
from sempervirt.evacuation.plan import Survey
from sempervirt.evacuation.record import BOOTED_ANEW, EvacuationRecord
from sempervirt.evacuation.state import (
    Checked,
    Evacuation,
    Failed,
    LookAround,
    Marked,
    MoveOver,
    MoveVm,
    Passage,
    StandbyRuns,
    Step,
    Surveyed,
    Tick,
    Way,
    Word,
)
from sempervirt.evacuation.values import Cause, EvacuationOrder, Fate, Outcome, Reason, Report
from sempervirt.host import records
from sempervirt.host.http import Unanswered
from sempervirt.host.late_records import LateRecords
from sempervirt.host.records import RecordDamaged
from sempervirt.migration import sides
from sempervirt.migration.obstacles import HostSide, Obstacle
from sempervirt.migration.source.migration import SourceMigration
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.vm.phases import Arrival, Phase
from sempervirt.vm.work import Departing

ORDER = EvacuationOrder(Cause.OPERATOR, "its fan is loud", ("b",), 60.0, 3)


# Where a VM is


@pytest.mark.parametrize(
    ("owner", "arrival", "word"),
    [
        ("b", Arrival.RUNNING, Word.THERE),
        ("b", None, Word.THERE),
        (None, Arrival.RUNNING, Word.THERE),
        ("a", None, Word.HERE),
        ("a", Arrival.RUNNING, Word.HERE),
        ("c", Arrival.RUNNING, Word.ELSEWHERE),
        ("", None, Word.ELSEWHERE),
        ("", Arrival.RUNNING, Word.ELSEWHERE),
        ("b", Arrival.LOST, Word.ELSEWHERE),
        (None, Arrival.ABORTED, Word.ELSEWHERE),
    ],
)
def test_a_vm_is_where_store_and_destination_say(
    owner: str | None, arrival: Arrival | None, word: Word
) -> None:
    found = place_of("web", "a", "b", owner, arrival)
    assert found.word is word
    assert found.why or (owner, arrival) == ("b", Arrival.RUNNING)


def test_a_vm_of_nobody_has_not_moved_to_nowhere() -> None:
    assert place_of("web", "a", "", "", None).word is Word.ELSEWHERE


@pytest.mark.parametrize(
    ("owner", "arrival"), [(None, None), ("b", Arrival.PROMISED), (None, Arrival.INCOMING)]
)
def test_it_is_asked_again_while_neither_says_enough(
    owner: str | None, arrival: Arrival | None
) -> None:
    with pytest.raises(Unavailable):
        place_of("web", "a", "b", owner, arrival)


# Records


def moving() -> Evacuation:
    begun, _ = decide.begin(ORDER, 1795384877.9, 100.0)
    passages = (
        Passage("web", Fate.MOVES, "b", tried=("c",), rounds=1, began_s=0.5),
        Passage("db", Fate.STAYS, reason=Reason.NO_MEMORY, why="too big", ended_s=0.1),
    )
    return replace(begun, step=Step.MOVE, passages=passages)


def test_the_next_agent_reads_what_was_written(tmp_path: Path) -> None:
    record = EvacuationRecord(tmp_path / "evacuation.json")
    assert record.read() is None
    assert record.write(moving())
    assert record.read() == moving()
    later = replace(moving(), earlier=(("old", "c"),), out_by=Cause.SHUTDOWN)
    assert record.write(later)
    assert record.read() == later


def test_a_record_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    path = tmp_path / "evacuation.json"
    record = EvacuationRecord(path)
    record.write(moving())
    content = json.loads(path.read_text())
    for name in ("earlier", "out_by"):
        del content["evacuation"][name]
    path.write_text(json.dumps(content))
    assert record.read() == moving()


def test_a_host_that_booted_anew_is_not_emptied_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = EvacuationRecord(tmp_path / "evacuation.json")
    record.write(moving())
    monkeypatch.setattr("sempervirt.evacuation.record.boot_id", lambda: "another")
    left = record.read()
    assert left is not None
    assert (left.over, left.failure) == (True, BOOTED_ANEW)
    assert decide.recover(left) == (left, [])


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evacuation.json"
    record = EvacuationRecord(path)
    record.write(moving())
    content = json.loads(path.read_text())
    for damage in (
        {"evacuation": 1},
        {"evacuation": {**content["evacuation"], "step": "fly"}},
        {"evacuation": {**content["evacuation"], "passages": [{"vm": 1}]}},
        {"evacuation": {**content["evacuation"], "until": "soon"}},
    ):
        path.write_text(json.dumps({**content, **damage}))
        with pytest.raises(RecordDamaged):
            record.read()
    order = {**content["evacuation"]["order"], "concurrency": 0}
    path.write_text(
        json.dumps({**content, "evacuation": {**content["evacuation"], "order": order}})
    )
    with pytest.raises(RecordDamaged):
        record.read()


# Service


async def test_a_host_stays_out_of_service_until_it_is_put_in(tmp_path: Path) -> None:
    told: list[str] = []
    service = Service.read(tmp_path)
    service.listen(lambda: told.append(service.why_not))
    service.require("VM web is not started")
    await service.take_out("its fan is loud")
    with pytest.raises(StateConflict, match=r"out of service \(its fan is loud\): VM web"):
        service.require("VM web is not started")
    again = Service.read(tmp_path)
    assert again.absence == service.absence is not None
    await again.put_in()
    assert Service.read(tmp_path).absence is None
    assert told == ["its fan is loud"]


async def test_what_cannot_be_written_down_takes_no_host_out_but_a_dying_one(
    tmp_path: Path,
) -> None:
    (tmp_path / FILE).mkdir()  # no record can replace it
    service = Service(tmp_path / FILE)
    with pytest.raises(Unavailable, match="cannot be written"):
        await service.take_out("its fan is loud")
    assert service.absence is None
    await service.take_out("its kernel dies", without_records=True)
    assert service.why_not == "its kernel dies"


def test_a_record_that_cannot_be_read_keeps_the_host_out(tmp_path: Path) -> None:
    for content in ("", "{}", '{"version": 1}', '{"version": 1, "why": 1, "since": 1}'):
        (tmp_path / FILE).write_text(content)
        assert Service.read(tmp_path).why_not


# Records and log lines on a host whose disk does not answer


DEADLINE_S = 90.0


@pytest.fixture
def frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Records below `tmp_path` are written by a thread that hangs until the event is set."""
    thawed = threading.Event()
    replace_now = records._replace_bytes

    def hang(path: Path, content: bytes, *, durable: bool) -> None:
        thawed.wait(DEADLINE_S)
        replace_now(path, content, durable=durable)

    monkeypatch.setattr(records, "_replace_bytes", hang)
    monkeypatch.setattr(records, "_late", LateRecords(tmp_path, patience_s=0.1))
    yield thawed
    thawed.set()


def test_a_frozen_disk_holds_nobody_and_gets_the_newest_record_later(
    tmp_path: Path, frozen: threading.Event
) -> None:
    record = EvacuationRecord(tmp_path / "evacuation.json")
    ended: list[bool] = []

    def write() -> None:
        ended.extend(record.write(replace(moving(), bounds=n)) for n in range(3))

    writer = threading.Thread(target=write)
    writer.start()
    writer.join(DEADLINE_S)
    assert ended == [False, False, False]
    frozen.set()
    late = records._late
    assert late is not None
    late._changed.acquire()
    assert late._changed.wait_for(lambda: not late._waiting and late._begun is None, DEADLINE_S)
    late._changed.release()
    left = record.read()
    assert left is not None
    assert left.bounds == 2
    late._patience_s = DEADLINE_S
    assert record.write(moving())  # and it is as before


async def test_what_was_refused_is_not_done_when_the_disk_answers_again(
    tmp_path: Path, frozen: threading.Event
) -> None:
    service = Service(tmp_path / FILE)
    with pytest.raises(Unavailable, match="does not answer"):
        await service.take_out("its fan is loud")
    late = records._late
    assert late is not None
    frozen.set()
    with late._changed:
        assert late._changed.wait_for(lambda: not late._waiting and late._begun is None, DEADLINE_S)
    assert Service.read(tmp_path).absence is None


def test_a_record_that_fails_says_so_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_late", LateRecords(tmp_path))
    with pytest.raises(FileNotFoundError):
        records.write_record(tmp_path / "none" / "x.json", 1, {})
    (tmp_path / "d").mkdir()
    assert not records.remove_record(tmp_path / "d")
    records.write_record(tmp_path / "x.json", 1, {"a": 1})
    assert records.read_record(tmp_path / "x.json", 1) == {"version": 1, "a": 1}


def test_who_waits_for_a_record_is_told_which_storage_is_silent(
    tmp_path: Path, frozen: threading.Event
) -> None:
    with pytest.raises(OSError, match="does not answer") as caught:
        records.write_record(tmp_path / "x.json", 1, {})
    assert caught.value.errno == errno.ETIMEDOUT
    assert not frozen.is_set()


def test_a_log_that_nobody_reads_holds_nobody() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        handler = MemoryFirst(stream, lines_max=10)
        logger = logging.Logger("test")
        logger.addHandler(handler)
        for number in range(30):
            logger.warning("%d %s", number, "x" * 65536)
        heard = threading.Thread(target=_drain, args=(reader,), daemon=True)
        heard.start()
        handler.flush()
        logger.warning("the last")
        handler.flush()
    heard.join(DEADLINE_S)
    assert _heard[-1].endswith("the last")
    assert any("lines of the log are lost" in line for line in _heard)


_heard: list[str] = []


def _drain(reader: int) -> None:
    with os.fdopen(reader) as stream:
        _heard.extend(line.rstrip("\n") for line in stream)


# Decisions that the explorer does not look at


def planned(cause: Cause, *needs: Need, rooms: tuple[Room, ...] = (Room("b", 100),)) -> Any:
    state, _ = decide.begin(replace(ORDER, cause=cause), 0.0, 0.0)
    state, _ = decide.decide(state, Marked(), 0.0)
    return decide.decide(state, Surveyed(Survey(rooms, needs)), 1.0)


def test_highest_priority_first_and_never_more_at_once() -> None:
    needs = [Need(f"vm{n}", 1, priority=n) for n in range(8)]
    state, effects = planned(Cause.OPERATOR, *needs)
    assert [effect.vm for effect in effects if isinstance(effect, MoveVm)] == ["vm7", "vm6", "vm5"]
    assert [one.began_s for one in state.passages[:4]] == [1.0, 1.0, 1.0, None]


def test_what_stays_under_an_operator_falls_on_a_host_that_ends() -> None:
    big = Need("big", 200)
    state, effects = planned(Cause.OPERATOR, big)
    assert (state.passages[0].fate, effects) == (Fate.STAYS, [])
    assert state.over
    state, effects = planned(Cause.GUARD, big)
    assert state.passages[0].fate is Fate.FALLS
    assert len(effects) == 1


def test_a_move_has_what_is_left_of_the_deadline() -> None:
    _, effects = planned(Cause.GUARD, Need("web", 1))
    assert effects == [MoveVm("web", "b", 59.0, pressing=True)]


def test_each_host_is_asked_twice_for_an_operator() -> None:
    rooms = (Room("b", 100), Room("c", 50))
    state, effects = planned(Cause.OPERATOR, Need("web", 1), rooms=rooms)
    asked, now = [], 1.0
    while not state.over:
        asked += [effect.host for effect in effects if isinstance(effect, MoveVm)]
        event = MoveOver("web", Way.STAYED, "no room") if effects else Tick()
        now = max(now, decide.wake_at(state) or now) if not effects else now
        state, effects = decide.decide(state, event, now)
    assert asked == ["b", "c", "b", "c"]
    one = state.passages[0]
    assert (one.fate, one.reason, one.why) == (Fate.STAYS, Reason.REFUSED, "c: no room")


def test_a_host_that_ends_is_left_as_long_as_there_is_time() -> None:
    state, effects = planned(Cause.GUARD, Need("web", 1))
    rounds, now = 0, 1.0
    while state.passages[0].fate is not Fate.FALLS:
        rounds += sum(isinstance(effect, MoveVm) for effect in effects)
        event = MoveOver("web", Way.STAYED, "no") if effects else Tick()
        now = max(now, decide.wake_at(state) or now) if not effects else now
        state, effects = decide.decide(state, event, now)
    assert rounds > decide.ROUNDS
    assert state.passages[0].reason is Reason.TOO_LATE


def test_a_host_without_vms_is_empty_at_once() -> None:
    state, effects = planned(Cause.OPERATOR)
    assert state.over
    assert state.report().emptied
    assert effects == []


# Standbys, which are on the host that is emptied


class Standbys:
    """Of one VM; a standby that takes over is the VM, and runs."""

    def __init__(self, vm: Any) -> None:
        self.state = SimpleNamespace(serving=None)
        self.asked: list[bool] = []
        self._vm = vm

    async def failover(self, *, force: bool) -> None:
        self.asked.append(force)
        self._vm.run = Runstate.RUNNING
        self.state.serving = object()


@pytest.mark.parametrize("run", [Runstate.CRASHED, Runstate.UNKNOWN])
async def test_a_vm_that_does_not_run_falls_once_to_its_standby(run: Runstate) -> None:
    vm: Any = SimpleNamespace(run=run, work=None)
    standbys: Any = Standbys(vm)
    house: Any = SimpleNamespace(vms={"web": vm})
    port = HostStandbys(house, lambda _vm: standbys, "a", NoneElsewhere())
    for _ in range(2):  # the second time for an agent that has begun anew
        assert await port.fall("web") == StandbyRuns("web", "a", here=True)
    assert standbys.asked == [True]


async def test_a_vm_that_runs_is_not_ended_for_a_standby_beside_it() -> None:
    vm: Any = SimpleNamespace(run=Runstate.RUNNING, work=None)
    standbys: Any = Standbys(vm)
    house: Any = SimpleNamespace(vms={"web": vm})
    with pytest.raises(NotFound, match="on this host as well"):
        await HostStandbys(house, lambda _vm: standbys, "a", NoneElsewhere()).fall("web")
    with pytest.raises(NotFound, match="no warm standby"):
        await HostStandbys(house, lambda _vm: None, "a", NoneElsewhere()).fall("web")
    assert standbys.asked == []


async def test_a_vm_that_may_have_moved_is_not_ended_for_its_standby() -> None:
    work = Departing("1", "b", "b:7443", running=True)
    vm: Any = SimpleNamespace(run=Runstate.UNKNOWN, work=work)
    standbys: Any = Standbys(vm)
    house: Any = SimpleNamespace(vms={"web": vm})
    port = HostStandbys(house, lambda _vm: standbys, "a", NoneElsewhere())
    with pytest.raises(StateConflict, match="move to b is not over"):
        await port.fall("web")
    assert standbys.asked == []
    vm.work = None  # the control: the move was given up
    await port.fall("web")
    assert standbys.asked == [True]


class Kept:
    """A host that keeps a standby of web."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def keeper(self, vm: str) -> str | None:
        return "b" if vm == "web" else None

    async def take_over(self, vm: str) -> None:
        self.asked.append(vm)


@pytest.mark.parametrize("run", list(Runstate))
async def test_a_vm_falls_to_its_standby_on_another_host_before_one_that_dies_with_it(
    run: Runstate,
) -> None:
    vm: Any = SimpleNamespace(run=run, work=None)
    standbys: Any = Standbys(vm)
    house: Any = SimpleNamespace(vms={"web": vm})
    kept = Kept()
    port = HostStandbys(house, lambda _vm: standbys, "a", kept)
    assert await port.fall("web") == StandbyRuns("web", "b")
    assert (kept.asked, standbys.asked) == (["web"], [])
    vm.work = Departing("1", "b", "b:7443", running=True)
    with pytest.raises(StateConflict, match="move to b is not over"):
        await port.fall("web")
    with pytest.raises(NotFound):  # the control: of another VM nobody keeps one
        await HostStandbys(house, lambda _vm: None, "a", kept).fall("db")


async def test_a_vm_with_a_dead_thread_is_moved_only_where_it_has_no_such_standby() -> None:
    """The move of one whose thread never runs again hangs; without a standby nothing is lost by
    trying.
    """

    async def nothing(_vm: object) -> list[Obstacle]:
        raise Unavailable("asked")

    house: Any = None
    facts: Any = None
    fleet = adapters.ClusterFleet(
        house, nothing, measured=False, broken=("web", "db"), elsewhere=Kept()
    )

    async def stuck(name: str) -> str:
        vm: Any = SimpleNamespace(name=name, run=Runstate.RUNNING)
        return (await fleet._look_here(vm, facts, "a")).stuck

    assert "its standby on b takes over" in await stuck("web")
    assert "asked" in await stuck("db")


def test_a_standby_that_took_over_here_leaves_as_the_vm() -> None:
    state, _ = planned(Cause.GUARD, Need("web", 1, stuck="its QEMU does not answer"))
    assert state.passages[0].fate is Fate.FALLS
    state, effects = decide.decide(state, StandbyRuns("web", "a", here=True), 2.0)
    assert [type(effect) for effect in effects] == [LookAround]
    survey = Survey((Room("b", 100),), (Need("web", 1),))
    state, effects = decide.decide(state, Surveyed(survey, look=1), 3.0)
    assert effects == [MoveVm("web", "b", 57.0, pressing=True)]
    state, _ = decide.decide(state, MoveOver("web", Way.MOVED, host="b"), 4.0)
    state, _ = decide.decide(state, Checked("web", Word.THERE), 5.0)
    assert (state.passages[0].fate, state.passages[0].host) == (Fate.STANDBY, "b")
    assert state.report().emptied


def test_a_vm_that_was_leaving_while_hosts_were_asked_is_asked_for_when_it_stays() -> None:
    """As when the agent begins anew, and the move with it is abandoned."""
    state, _ = decide.begin(replace(ORDER, cause=Cause.OPERATOR), 0.0, 0.0)
    state, _ = decide.decide(state, Marked(), 0.0)
    rooms = (Room("b", 100),)
    leaving = Surveyed(Survey(rooms, ()), moving=(("web", "b"),))
    state, _ = decide.decide(state, leaving, 1.0)
    for look in range(1, decide.ROUNDS):
        assert state.passages[0].fate is Fate.MOVES
        state, effects = decide.decide(state, MoveOver("web", Way.STAYED, "anew"), 2.0)
        assert (state.passages[0].fate, effects) == (Fate.WAITS, [])
        assert decide.wake_at(state) == 2.0 + decide.AGAIN_S
        state, effects = decide.decide(state, Tick(), 2.0 + decide.AGAIN_S)
        assert effects == [LookAround(ORDER.destinations, look)]
        asked, _ = decide.decide(state, Surveyed(Survey(rooms, (Need("web", 1),)), look=look), 5.0)
        assert (asked.passages[0].fate, asked.passages[0].host) == (Fate.MOVES, "b")
        state, _ = decide.decide(state, replace(leaving, look=look), 5.0)
    # Not for ever.
    state, _ = decide.decide(state, MoveOver("web", Way.STAYED, "anew"), 6.0)
    assert (state.passages[0].fate, state.passages[0].reason) == (Fate.STAYS, Reason.REFUSED)


def test_an_answer_from_before_a_standby_ran_is_not_the_plan_for_that() -> None:
    stuck = [Need(vm, 1, stuck="its QEMU does not answer") for vm in ("web", "db")]
    state, _ = planned(Cause.GUARD, *stuck)
    state, first = decide.decide(state, StandbyRuns("web", "a", here=True), 2.0)
    state, second = decide.decide(state, StandbyRuns("db", "a", here=True), 2.1)
    looks = [effect.look for effect in (*first, *second) if isinstance(effect, LookAround)]
    assert looks == [1, 2]
    # The first question was asked when nobody knew that the standby of db runs.
    rooms = (Room("b", 100),)
    early = Survey(rooms, (Need("web", 1), stuck[1]))
    state, effects = decide.decide(state, Surveyed(early, look=1), 3.0)
    assert effects == []
    late = Failed(LookAround((), 1), Failure.named(Unavailable, "the store is silent"))
    state, effects = decide.decide(state, late, 3.1)
    assert (effects, state.failure) == ([], "")
    survey = Survey(rooms, (Need("web", 1), Need("db", 1)))
    state, effects = decide.decide(state, Surveyed(survey, look=2), 4.0)
    assert [effect.vm for effect in effects if isinstance(effect, MoveVm)] == ["db", "web"]


def test_guests_have_no_more_memory_than_the_host_gives_them(tmp_path: Path) -> None:
    agent = Agent(AgentConfig(tmp_path, tmp_path, guest_memory=64 << 20))
    assert agent.memory_left == 64 << 20
    agent._require_memory(VmSpec(name="web", memory=64 << 20))
    with pytest.raises(StateConflict, match="may have 64M more"):
        agent._require_memory(VmSpec(name="web", memory=65 << 20))
    # One that is being started has its own already.
    agent.launching["db"] = VmSpec(name="db", memory=32 << 20)
    assert agent.memory_left == 32 << 20
    assert Agent(AgentConfig(tmp_path, tmp_path)).memory_left is None


# What people read


def report(*fates: Fate, failure: str = "") -> Report:
    outcomes = tuple(
        Outcome(f"vm{n}", fate, "b", Reason.NO_MEMORY if fate is Fate.STAYS else None, "why")
        for n, fate in enumerate(fates)
    )
    return Report(ORDER, 100.0, 130.0, outcomes, failure)


@pytest.mark.parametrize(
    ("fates", "error"),
    [
        ((Fate.MOVED, Fate.STANDBY, Fate.ENDED), None),
        ((Fate.MOVED, Fate.STAYS), Unavailable),
        ((Fate.STAYS, Fate.UNKNOWN), OutcomeUnknown),
        ((Fate.UNKNOWN, Fate.LOST), StateLost),
    ],
)
def test_the_command_ends_by_the_worst_that_happened(
    fates: tuple[Fate, ...], error: type[Exception] | None
) -> None:
    view = evacuation_view(report(*fates), {})
    assert view.emptied is (error is None)
    if error is None:
        judge(view)
    else:
        with pytest.raises(error):
            judge(view)


def test_an_evacuation_that_failed_has_not_emptied_the_host() -> None:
    view = evacuation_view(report(failure="the store is silent"), {})
    assert not view.emptied
    with pytest.raises(Unavailable, match="the store is silent"):
        judge(view)


def test_a_loss_is_told_also_where_the_evacuation_failed() -> None:
    with pytest.raises(StateLost, match="vm0"):
        judge(evacuation_view(report(Fate.LOST, failure="the store is silent"), {}))


def test_what_is_shown_of_one_that_failed_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    _print(evacuation_view(report(failure="the store is silent"), {}), Output.TABLE)
    assert "the store is silent" in capsys.readouterr().out


@pytest.mark.parametrize("fate", Fate)
def test_each_fate_has_its_words(fate: Fate) -> None:
    view = evacuation_view(report(fate), {"vm0": 4096})
    assert in_words(view.vms[0])
    assert view.vms[0].remaining_bytes == (4096 if fate is Fate.MOVES else None)


def test_what_did_not_come_back_is_told_by_the_worst_of_it() -> None:
    commands.judge_return({})
    refused, unknown, lost = Unavailable("b refuses"), OutcomeUnknown("silent"), StateLost("gone")
    with pytest.raises(Unavailable, match="web: b refuses"):
        commands.judge_return({"web": refused})
    with pytest.raises(OutcomeUnknown, match="web: b refuses; db: silent"):
        commands.judge_return({"web": refused, "db": unknown})
    with pytest.raises(StateLost, match="db: gone"):
        commands.judge_return({"web": unknown, "db": lost})


async def test_a_shutdown_waits_for_an_evacuation_that_goes_on() -> None:
    going = evacuation_view(replace(report(Fate.MOVES), ended=None), {})
    ended = evacuation_view(report(Fate.MOVED), {})

    class Busy:
        """A client whose host is being emptied already."""

        seen = going

        async def evacuate_host(self, _request: EvacuateRequest) -> EvacuationView:
            raise StateConflict("this host is being emptied already")

        async def evacuation(self) -> EvacuationView:
            return self.seen

    client: Any = Busy()
    shutdown = EvacuateRequest(cause=Asker.SHUTDOWN)
    assert await begin_order(client, shutdown) == (going, False)
    with pytest.raises(StateConflict):
        await begin_order(client, EvacuateRequest())
    client.seen = ended
    with pytest.raises(StateConflict):
        await begin_order(client, shutdown)


async def test_a_shutdown_that_cannot_be_waited_for_says_what_is_in_the_way() -> None:
    class Alone:
        """A client of a host that belongs to no cluster, and was never emptied."""

        async def evacuate_host(self, _request: EvacuateRequest) -> EvacuationView:
            raise StateConflict("this host belongs to no cluster")

        async def evacuation(self) -> EvacuationView:
            raise NotFound("this host was never emptied")

    client: Any = Alone()
    with pytest.raises(StateConflict, match="no cluster"):
        await begin_order(client, EvacuateRequest(cause=Asker.SHUTDOWN))


async def test_a_shutdown_begins_its_own_when_the_other_one_has_ended_meanwhile() -> None:
    begun = evacuation_view(replace(report(Fate.WAITS), ended=None), {})

    class Late:
        """A client whose host was being emptied until a moment ago."""

        asked = 0

        async def evacuate_host(self, _request: EvacuateRequest) -> EvacuationView:
            self.asked += 1
            if self.asked == 1:
                raise StateConflict("this host is being emptied already")
            return begun

        async def evacuation(self) -> EvacuationView:
            return evacuation_view(report(Fate.STAYS), {})

    client: Any = Late()
    assert await begin_order(client, EvacuateRequest(cause=Asker.SHUTDOWN)) == (begun, True)


def test_what_another_one_has_left_is_tried_again_before_a_shutdown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The guard's evacuation has hold_s, which may be seconds; the host goes down after ours."""
    views = {
        "theirs": evacuation_view(replace(report(Fate.MOVES), ended=None), {}),
        "left": evacuation_view(report(Fate.STAYS), {}),
        "ours": evacuation_view(report(Fate.MOVED), {}),
    }
    asked: list[str] = []

    class Guarded:
        """A client of a host whose guard gives up soon."""

        async def evacuate_host(self, request: EvacuateRequest) -> EvacuationView:
            asked.append(request.cause.value)
            if len(asked) == 1:
                raise StateConflict("this host is being emptied already")
            return views["ours"]

        async def evacuation(self) -> EvacuationView:
            seen.append("asked")
            return views["theirs"] if len(seen) == 1 else views["left"]

    seen: list[str] = []
    client: Any = Guarded()
    monkeypatch.setattr(commands, "ask_agent", lambda work: asyncio.run(work(client)))
    commands.evacuate(shutdown=True)
    assert asked == ["shutdown", "shutdown"]


def test_an_order_beyond_its_bounds_is_refused_in_words() -> None:
    with pytest.raises(InvalidRequest, match="deadline_s"):
        commands.evacuate(deadline="48h")
    with pytest.raises(InvalidRequest, match="why"):
        commands.evacuate(why="")


def test_times_are_read_as_people_write_them() -> None:
    assert [parse_duration(text) for text in ("90", "90s", "5m", "1.5 h")] == [90, 90, 300, 5400]
    for text in ("", "soon", "5d", "-1s", "0"):
        with pytest.raises(InvalidRequest):
            parse_duration(text)


def test_a_request_becomes_an_order() -> None:
    order = EvacuateRequest(to=["b"], why="because").order()
    assert order == EvacuationOrder(Cause.OPERATOR, "because", ("b",))


# Hosts that are asked


async def test_a_host_that_hangs_is_not_asked_of_every_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    @asynccontextmanager
    async def connect(*_: object) -> AsyncIterator[None]:
        yield

    async def host_side(_connection: object, spec: Any, _patience_s: float) -> HostSide:
        asked.append(spec.name)
        await asyncio.sleep(0)
        raise failure

    monkeypatch.setattr(peer, "connect", connect)
    monkeypatch.setattr(adapters, "host_side", host_side)
    vms: Any = [
        SimpleNamespace(name=f"vm{n}", spec=SimpleNamespace(name=f"vm{n}")) for n in range(100)
    ]
    member: Any = SimpleNamespace(host=SimpleNamespace(name="b", address="b:7443"))
    cluster: Any = None
    failure: Exception = Unanswered("the agent did not answer")
    answer = await adapters._ask(cluster, member, vms)
    assert len(asked) == adapters.QUESTIONS
    assert answer.absent is not None
    assert answer.absent.why == "it cannot be asked: the agent did not answer"
    # The control: one that refuses to speak of a VM is asked of the others.
    asked.clear()
    failure = Unavailable("the image is not there")
    await adapters._ask(cluster, member, vms)
    assert len(asked) == 100


async def test_a_host_that_is_silent_now_counts_by_what_it_said_in_peace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a host that ends, where each question has its bound."""
    patience: list[float] = []

    @asynccontextmanager
    async def connect(*_: object) -> AsyncIterator[None]:
        yield

    async def host_side(_connection: object, _spec: object, patience_s: float) -> HostSide:
        patience.append(patience_s)
        raise Unanswered("the agent did not answer")

    monkeypatch.setattr(peer, "connect", connect)
    monkeypatch.setattr(adapters, "host_side", host_side)
    vms: Any = [SimpleNamespace(name=name, spec=None) for name in ("web", "db")]
    member: Any = SimpleNamespace(host=SimpleNamespace(name="b", address="b:7443"))
    cluster: Any = None
    known = Peacetime()
    side = HostSide("b", "tcg", "9.2.0", memory_available=7)
    known.note("b", "web", side)
    answer = await adapters._ask(cluster, member, vms, known)
    assert (answer.room.memory_bytes, answer.absent) == (7, None)
    assert answer.sides == {"web": side, "db": "the agent did not answer"}
    assert max(patience) == adapters.PRESSED_S
    # The control: one of which nothing is known is absent; and an operator's waits as ever.
    patience.clear()
    assert (await adapters._ask(cluster, member, vms, Peacetime())).absent is not None
    assert (await adapters._ask(cluster, member, vms, None)).absent is not None
    assert max(patience) > adapters.PRESSED_S


async def test_hosts_are_those_of_peace_while_the_store_is_away() -> None:
    known = Peacetime()
    members: Any = {"b": object()}

    class Away:
        async def members(self) -> list[object]:
            raise Unavailable("etcd does not answer")

    house: Any = None
    cluster: Any = Away()

    async def nothing(_vm: object) -> list[Obstacle]:
        return []

    fleet = adapters.ClusterFleet(house, nothing, measured=False, peacetime=known)
    with pytest.raises(Unavailable, match="which hosts there are"):
        await fleet._members(cluster)
    known.members = members
    assert await fleet._members(cluster) == members
    # The control: an operator's evacuation waits for the store.
    with pytest.raises(Unavailable):
        await adapters.ClusterFleet(house, nothing, measured=True)._members(cluster)


@pytest.mark.parametrize(
    ("told", "pace"),
    [
        ({"status": "measured", "dirty-rate": 3}, float(3 << 20)),
        ({"status": "measured", "dirty-rate": "many"}, 0.0),
        ({"status": "measured", "dirty-rate": -1}, 0.0),
        ({"status": "measured", "dirty-rate": 10**400}, float(1 << 40)),
        ({"status": "measured", "dirty-rate": float("nan")}, 0.0),
        ({"status": "measured"}, 0.0),
    ],
)
async def test_a_hostile_qemu_tells_no_pace(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, object], pace: float
) -> None:
    async def execute(_command: str, _arguments: object = None) -> object:
        return told

    monkeypatch.setattr(adapters, "DIRTY_S", 0)
    vm: Any = SimpleNamespace(name="web", machine=SimpleNamespace(execute=execute))
    assert await adapters._dirtied(vm) == pace


async def test_a_vm_that_cannot_be_looked_at_keeps_the_others_from_nothing() -> None:
    async def against(vm: Any) -> list[Obstacle]:
        raise vm.failure

    fleet = adapters.ClusterFleet(SimpleNamespace(), against, measured=False)
    facts: Any = None
    for failure in (Unavailable("/nfs does not answer"), OSError("an input/output error")):
        vm: Any = SimpleNamespace(name="web", run=Runstate.RUNNING, failure=failure)
        found = await fleet._look_here(vm, facts, "a")
        assert found.stuck == f"it cannot be looked at: {failure}"


async def test_storage_that_hangs_is_waited_for_once_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Path] = []
    every = asyncio.Event()

    async def hang(path: Path, call: Any) -> Any:
        if path.parent != Path("/nfs"):
            return call()
        begun.append(path)
        if len(begun) == 4:
            every.set()
        await every.wait()  # all of them are asked before the first one is given up
        raise Unavailable(f"{path} does not answer")

    monkeypatch.setattr(sides, "call_storage", hang)
    (tmp_path / "initrd").touch()
    spec = VmSpec(
        name="web",
        kernel=Path("/nfs/kernel"),
        initrd=tmp_path / "initrd",
        disks=[{"name": f"d{n}", "image": f"/nfs/{n}"} for n in range(3)],
    )
    facts: Any = SimpleNamespace(
        accelerator=SimpleNamespace(kind="tcg"),
        features=SimpleNamespace(version="9", passes_through=True),
    )
    async with asyncio.timeout(DEADLINE_S):
        side = await sides.side_of(facts, "a", spec, vm_state=None, source=False)
    assert [seen.problem for seen in side.images.values()] == [
        f"/nfs/{n} does not answer" for n in range(3)
    ]
    assert side.missing == ("/nfs/kernel (/nfs/kernel does not answer)",)


async def test_a_vm_that_is_being_started_is_told_as_one_that_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def nothing() -> list[Any]:
        return []

    @asynccontextmanager
    async def opened(_config: object) -> AsyncIterator[Any]:
        yield SimpleNamespace(members=nothing, settings=SimpleNamespace(host="a"))

    monkeypatch.setattr(Cluster, "opened", opened)
    house: Any = SimpleNamespace(config=None, vms={}, unknown={}, launching={"db": object()})
    house.host = nothing
    against: Any = None
    seen = await adapters.ClusterFleet(house, against, measured=False).look(())
    assert [(need.vm, need.stuck) for need in seen.survey.needs] == [("db", "it is being started")]


async def test_a_vm_that_an_operator_moves_meanwhile_is_followed() -> None:
    async def depart(*_: object) -> Any:
        departed.append("web")
        raise StateConflict("VM web is not running")

    async def wait_until(_condition: object, **_: object) -> None:
        driver.over = True

    departed: list[str] = []
    driver = SimpleNamespace(
        over=False,
        state=SimpleNamespace(phase=Phase.DONE, why=""),
        changes=SimpleNamespace(wait_until=wait_until),
    )
    moving: Any = SourceMigration.__new__(SourceMigration)
    moving.work, moving._driver = SimpleNamespace(destination="c"), driver
    vm: Any = SimpleNamespace(run=Runstate.STOPPED, moving=moving, state=SimpleNamespace(why=""))
    house: Any = SimpleNamespace(vms={"web": vm})
    port = adapters.ClusterMoves(house, depart, ORDER)
    moved = MoveOver("web", Way.MOVED, host="c")
    assert await port.move("web", "b", 60.0, pressing=False) == moved
    assert departed == []
    # It has left before its turn came.
    assert await port.move("web", "b", 60.0, pressing=False) == moved
    assert departed == ["web"]
    # The control: nobody has moved it, and it has ended.
    vm.moving = None
    assert (await port.move("web", "b", 60.0, pressing=False)).way is Way.ENDED
