"""What the command line says of each phase of a migration, and with which exit status it ends."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from sempervirt.api.client import Client
from sempervirt.api.schemas import MigrateRequest, VmView
from sempervirt.cli import main, migrate, vm
from sempervirt.cli.migrate import PATIENCE_S
from sempervirt.core.errors import AgentUnavailable, NotFound, SempervirtError
from sempervirt.migration.messages import MigrationView
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.vm.phases import Mode, Phase

WHY = "its QEMU was killed"
# What is said on the source, once the phase is the last.
SENTENCES = {
    Phase.PREPARE: "b prepares for the VM, which runs on a",
    Phase.PRECOPY: "the VM runs on a, which sends its memory to b",
    Phase.SWITCHOVER: "the guest stands still until b has everything",
    Phase.COMMIT: "the guest stands still until the store has given the VM to b",
    Phase.POSTCOPY: "until all has arrived, the loss of either host loses the VM",
    Phase.DONE: "the VM has moved to b",
    Phase.ABANDONED: f"the VM stays on a: {WHY}",
    Phase.UNKNOWN: f"whether a or b owns it is not known: {WHY}",
    Phase.LOST: f"the VM is lost, because part of its memory was on each host ({WHY})",
}
UNDER_WAY = (Phase.PREPARE, Phase.PRECOPY, Phase.SWITCHOVER, Phase.COMMIT, Phase.POSTCOPY)
STAYS, UNKNOWN, LOST, TOO_LATE = 6, 7, 10, 5


def moved(phase: Phase, *, over: bool | None = None) -> MigrationView:
    """A migration of VM web from a to b."""
    return MigrationView(
        id="0" * 32,
        vm="web",
        source="a",
        destination="b",
        phase=phase,
        over=phase.is_end if over is None else over,
        mode=Mode.POSTCOPY if phase in (Phase.POSTCOPY, Phase.LOST) else Mode.PRECOPY,
        why="" if phase in UNDER_WAY or phase is Phase.DONE else WHY,
        may_cancel=phase in (Phase.PREPARE, Phase.PRECOPY, Phase.SWITCHOVER),
        started=0.0,
        elapsed_s=1.0,
        memory=1 << 30,
        remaining=1 << 20,
        passes=3,
        dirtied=5e6,
        expected_blackout_ms=40.0,
        limit_ms=75.0,
        throttle=20,
        blackout_ms=None,
        timeline_ms={},
        wire=None,
    )


def shown(migration: MigrationView | None, state: Runstate, why: str = "") -> VmView:
    """VM web on a."""
    return VmView(
        name="web",
        state=state,
        why=why,
        pid=None,
        accelerator="tcg",
        memory=1 << 30,
        vcpus=1,
        started=0.0,
        resets=0,
        disks=[],
        queues={},
        channels={},
        console=Path("/run/console"),
        end=None,
        migration=migration,
        events=[],
        spec=VmSpec(name="web"),
    )


Answer = MigrationView | SempervirtError


class FakeClient:
    """Answers what is scripted; the last answer again and again."""

    def __init__(self, began: MigrationView, answers: Sequence[Answer] = ()) -> None:
        self._began = began
        self._answers: Iterator[Answer] = chain(answers, repeat((began, *answers)[-1]))
        self.vm_view = shown(began, Runstate.RUNNING)

    async def migrate(self, _name: str, _request: MigrateRequest) -> MigrationView:
        """The move has begun."""
        return self._began

    async def migration(self, _name: str) -> MigrationView:
        """How far the move is."""
        answer = next(self._answers)
        if isinstance(answer, SempervirtError):
            raise answer
        return answer

    async def cancel_migration(self, _name: str) -> MigrationView:
        """What came of it."""
        return self._began

    async def vm(self, _name: str) -> VmView:
        """The one VM."""
        return self.vm_view

    async def vms(self) -> list[VmView]:
        """All VMs."""
        return [self.vm_view]


class Semper:
    """`semper`, with a scripted agent and a clock that runs ahead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self._now = 0.0

    def __call__(self, client: FakeClient, *arguments: str) -> tuple[int, str]:
        """The exit status, and all that was said, as one line."""

        def ask(question: Callable[[Client], Awaitable[Any]]) -> Any:
            async def answer() -> Any:
                return await question(client)  # type: ignore[arg-type]

            return asyncio.run(answer())

        for module in (migrate, vm):
            self._monkeypatch.setattr(module, "ask_agent", ask)
        self._monkeypatch.setattr(migrate, "POLL_S", 0.0)
        self._monkeypatch.setattr("sempervirt.cli.migrate.monotonic", self._later)
        self._monkeypatch.setenv("COLUMNS", "400")
        self._monkeypatch.setattr(sys, "argv", ["semper", "vm", *arguments])
        with pytest.raises(SystemExit) as end:
            main.main()
        said = self._capsys.readouterr()
        return int(end.value.code or 0), " ".join((said.out + said.err).split())

    def _later(self) -> float:
        self._now += PATIENCE_S / 5
        return self._now


@pytest.fixture
def semper(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Semper:
    return Semper(monkeypatch, capsys)


def test_there_is_a_sentence_for_every_phase() -> None:
    assert set(SENTENCES) == set(Phase)


@pytest.mark.parametrize(
    ("phase", "status", "said"),
    [
        (Phase.DONE, 0, "the VM has moved to b"),
        (Phase.ABANDONED, STAYS, f"VM web stays on a: {WHY}"),
        (Phase.LOST, LOST, "VM web is lost: part of its memory was on a and part on b"),
        (Phase.UNKNOWN, UNKNOWN, "whether b owns VM web is not known, and nothing runs it"),
    ],
)
def test_the_end_of_a_move_is_the_end_of_the_command(
    semper: Semper, phase: Phase, status: int, said: str
) -> None:
    client = FakeClient(moved(Phase.PREPARE), [moved(Phase.PRECOPY), moved(phase)])
    code, text = semper(client, "migrate", "web", "--to", "b")
    assert code == status
    assert said in text
    assert SENTENCES[phase] in text


def test_a_vm_that_is_lost_is_not_said_to_stay_or_to_be_safe_to_move_again(semper: Semper) -> None:
    _, text = semper(FakeClient(moved(Phase.LOST)), "migrate", "web", "--to", "b")
    assert "stays" not in text
    assert "b owns them; there: semper vm kill web, then semper vm run FILE" in text


def test_unknown_is_waited_for_before_it_is_the_end(semper: Semper) -> None:
    client = FakeClient(moved(Phase.PREPARE), [moved(Phase.UNKNOWN)] * 3 + [moved(Phase.DONE)])
    assert semper(client, "migrate", "web", "--to", "b")[0] == 0


@pytest.mark.parametrize("phase", list(Phase))
def test_a_detached_move_says_how_far_it_is(semper: Semper, phase: Phase) -> None:
    code, text = semper(FakeClient(moved(phase)), "migrate", "web", "--to", "b", "--detach")
    ends = {Phase.ABANDONED: STAYS, Phase.UNKNOWN: UNKNOWN, Phase.LOST: LOST}
    assert code == ends.get(phase, 0)
    assert f"{phase.value}: " in text
    assert SENTENCES[phase] in text


@pytest.mark.parametrize("phase", list(Phase))
def test_the_end_of_a_cancellation(semper: Semper, phase: Phase) -> None:
    code, text = semper(FakeClient(moved(phase)), "migrate", "web", "--cancel")
    late = {Phase.DONE: TOO_LATE, Phase.POSTCOPY: TOO_LATE, Phase.ABANDONED: 0, Phase.LOST: LOST}
    assert code == late.get(phase, UNKNOWN)
    assert SENTENCES[phase] in text


def test_an_agent_that_begins_anew_is_waited_for(semper: Semper) -> None:
    gone = AgentUnavailable("no agent answers")
    client = FakeClient(moved(Phase.PREPARE), [moved(Phase.PRECOPY), gone, moved(Phase.DONE)])
    assert semper(client, "migrate", "web", "--to", "b")[0] == 0


def test_an_agent_that_stays_away_leaves_the_outcome_unknown(semper: Semper) -> None:
    client = FakeClient(moved(Phase.PRECOPY), [AgentUnavailable("no agent answers")])
    code, text = semper(client, "migrate", "web", "--to", "b")
    assert code == UNKNOWN
    assert f"has not answered for {PATIENCE_S:g} s; at last the VM runs on a" in text


@pytest.mark.parametrize(("phase", "status"), [(Phase.PRECOPY, UNKNOWN), (Phase.DONE, 0)])
def test_a_move_that_the_agent_forgot(semper: Semper, phase: Phase, status: int) -> None:
    client = FakeClient(moved(phase, over=False), [NotFound("VM web was not migrated from here")])
    assert semper(client, "migrate", "web", "--to", "b")[0] == status


@pytest.mark.parametrize("phase", list(Phase))
def test_a_vm_is_shown_with_its_migration(semper: Semper, phase: Phase) -> None:
    client = FakeClient(moved(phase))
    code, text = semper(client, "show", "web")
    assert code == 0
    assert SENTENCES[phase] in text
    assert ("3, 1M left" in text) != phase.is_end


@pytest.mark.parametrize("phase", list(Phase))
def test_a_list_tells_why_a_vm_is_as_it_is(semper: Semper, phase: Phase) -> None:
    client = FakeClient(moved(phase))
    client.vm_view = shown(moved(phase), Runstate.PAUSED, "the agent's own words")
    _, text = semper(client, "list")
    told = phase in (Phase.POSTCOPY, Phase.LOST)
    assert (SENTENCES[phase] in text) == told
    assert ("the agent's own words" in text) != told


def test_a_list_tells_that_a_vm_that_runs_is_about_to_move(semper: Semper) -> None:
    assert "moves to b" in semper(FakeClient(moved(Phase.PRECOPY)), "list")[1]
    client = FakeClient(moved(Phase.PRECOPY))
    client.vm_view = shown(None, Runstate.RUNNING)
    assert "moves" not in semper(client, "list")[1]
