"""What a VM's owner knows, as observations; and an agent that is late notices that itself."""

from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sempervirt.core.errors import StateConflict, Unavailable
from sempervirt.host.places import Places
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import FOR_STANDBY, End, Runstate, VmState
from sempervirt.standby import first as first_module
from sempervirt.standby import local_fence, watching
from sempervirt.standby.evidence import (
    LOOK_S,
    NOTHING_SEEN,
    Death,
    Died,
    Evidence,
    Finished,
    Heard,
    Looked,
    Mended,
    Observation,
    Sign,
    Silent,
    Trouble,
    Troubled,
    note,
)
from sempervirt.standby.first import WatchedFirst
from sempervirt.standby.means import Means, NotYet, Proven
from sempervirt.standby.messages import END_S
from sempervirt.standby.rules import Provable, Rules
from sempervirt.standby.watching import Seen, Watch, observations, observed
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import MergingLayers, Saving, Work

NOW, MONITOR_S = 1000.0, 10.0
KILLED = End("QEMU was killed by signal 9", None, 9)


@dataclass
class Known:
    """What an owner knows of a VM: as much of `Vm` as is looked at."""

    state: VmState
    ailments: str = ""
    work: Work | None = None

    @property
    def run(self) -> Runstate:
        """The runstate."""
        return self.state.run

    @property
    def end(self) -> End | None:
        """How it ended."""
        return self.state.end


def seen(known: Known, evidence: Evidence = NOTHING_SEEN) -> list[Observation]:
    """The observations at NOW."""
    return observed(cast(Vm, known), evidence, NOW, MONITOR_S)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (VmState(Runstate.RUNNING), [Heard(NOW, Sign.MONITOR)]),
        (VmState(Runstate.STARTING), []),
        (
            VmState(Runstate.UNKNOWN, "no answer"),
            [Silent(NOW, Sign.MONITOR, NOW - MONITOR_S, "no answer")],
        ),
        (
            VmState(Runstate.HALTED, "the guest panicked"),
            [
                Heard(NOW, Sign.MONITOR),
                Died(NOW, Death.GUEST_PANICKED, "the guest panicked"),
            ],
        ),
        (
            VmState(Runstate.HALTED, "watchdog"),
            [Heard(NOW, Sign.MONITOR), Died(NOW, Death.GUEST_WATCHDOG, "watchdog")],
        ),
        # A disk that gives errors is no death of the guest.
        (VmState(Runstate.HALTED, "io-error"), [Heard(NOW, Sign.MONITOR)]),
        (
            VmState(Runstate.CRASHED, KILLED.reason, end=KILLED),
            [Died(NOW, Death.QEMU_ENDED, KILLED.reason)],
        ),
        # It ended while no agent looked: its guest may have powered itself off.
        (VmState(Runstate.CRASHED, "?", end=End("ended, how is not known")), []),
        # With this host: what its boot means to the VM stands in the VM file.
        (VmState(Runstate.CRASHED, "?", end=End("with its host", with_host=True)), []),
        (
            VmState(Runstate.STOPPED, "killed on request", end=End("killed on request", None, 9)),
            [Finished(NOW, "killed on request")],
        ),
    ],
)
def test_what_is_known_is_observed(state: VmState, expected: list[Observation]) -> None:
    assert seen(Known(state)) == expected


@pytest.mark.parametrize(
    ("run", "end", "death"),
    [
        (Runstate.CRASHED, End("with its host", with_host=True), Death.HOST_BOOTED),
        # By a fence whose answer was lost.
        (Runstate.STOPPED, End(FOR_STANDBY, None, 9), Death.QEMU_ENDED),
        (Runstate.STOPPED, End("killed on request", None, 9), None),
        (Runstate.CRASHED, End("how is not known"), None),
    ],
)
def test_what_another_host_tells_of_an_end(run: Runstate, end: End, death: Death | None) -> None:
    told = observations(Seen(run, end.reason, end), NOTHING_SEEN, NOW, MONITOR_S, there=True)
    assert [one.death for one in told if isinstance(one, Died)] == ([death] if death else [])
    here = observations(Seen(run, end.reason, end), NOTHING_SEEN, NOW, MONITOR_S)
    assert not [one for one in here if isinstance(one, Died)]


@pytest.mark.parametrize(("because", "merges"), [("killed on request", True), (FOR_STANDBY, False)])
def test_a_vm_that_is_ended_for_a_standby_keeps_its_layers(because: str, *, merges: bool) -> None:
    """To merge them may take hours, for which nobody waits who takes its place."""
    spec = VmSpec.model_validate(
        {"name": "web", "disks": [{"name": "root", "image": "/srv/a.raw", "snapshots": "merge"}]}
    )
    begun: list[object] = []
    state = VmState(Runstate.STOPPED, because, killed_because=because)
    vm: Any = SimpleNamespace(work=None, run=state.run, state=state, spec=spec, begin=begun.append)
    Vm._plan_merges(vm)
    assert bool(begun) is merges


async def test_a_fence_does_not_wait_for_layers_that_go_into_their_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a VM that was ended before: until then the answer is not yet, and told in time."""

    async def kill(_because: str) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(local_fence, "ENDS_S", 0.05)
    merging: Any = SimpleNamespace(
        kill=kill, work=MergingLayers(), machine=SimpleNamespace(identity=None)
    )
    proof = await local_fence.LocalFence(merging, Places(Path(), Path())).prove()
    assert isinstance(proof, NotYet)
    assert "go into their images" in proof.why
    assert END_S > local_fence.ENDS_S


def test_troubles_are_told_when_they_begin_and_when_they_end() -> None:
    known = Known(VmState(Runstate.PAUSED), "the medium hangs", Saving(resume=True))
    told = [one for one in seen(known) if isinstance(one, Troubled)]
    assert {one.trouble for one in told} == {Trouble.DISK, Trouble.PAUSED, Trouble.WORK}
    evidence = NOTHING_SEEN
    for one in told:
        evidence = note(evidence, one)
    assert not [one for one in seen(known, evidence) if isinstance(one, Troubled)]
    mended = seen(Known(VmState(Runstate.RUNNING)), evidence)
    assert {one.trouble for one in mended if isinstance(one, Mended)} == set(Trouble) - {
        Trouble.STORE
    }


@pytest.mark.parametrize(("late_s", "late"), [(0.1, False), (7.0, True)])
async def test_an_agent_that_is_late_notices_it(late_s: float, late: bool) -> None:
    """The clock goes on from look to look, and jumps once, while the agent sleeps."""
    looks = 0

    def clock() -> float:
        return 100.0 + looks * LOOK_S + (late_s if looks else 0.0)

    watch: Any = Watch("web", lambda: None, Rules, Provable.YES, clock=clock)
    see = watch.see

    def counted(one: Observation) -> None:
        nonlocal looks
        see(one)
        looks += isinstance(one, Looked)

    watch.see = counted
    looking = asyncio.create_task(watch.run())
    try:
        async with asyncio.timeout(90):
            while looks < 2:  # noqa: ASYNC110 - looks of another task
                await asyncio.sleep(0)
        assert (watch.evidence.punctual_since > 100.0) == late
    finally:
        looking.cancel()
        await asyncio.wait([looking])


@pytest.mark.parametrize("forgotten", [True, False])
def test_the_death_of_a_vm_that_was_forgotten_is_not_that_of_the_next_one(
    *, forgotten: bool
) -> None:
    """The next one must not be taken for the first one, also not by where it is in this process's
    memory. The control: of a VM that was not forgotten the death stands.
    """
    dead = VmState(Runstate.CRASHED, KILLED.reason, end=KILLED)
    vms: list[Known] = [Known(dead)]
    watch = Watch("web", lambda: cast(Vm, vms[0]), Rules, Provable.YES)
    kinds = [watch.look().permission.kind]
    if forgotten:
        place = weakref.ref(vms.pop())
        gc.collect()
        assert place() is not None, "the next VM may be in the same place"
        vms.append(Known(VmState(Runstate.RUNNING)))
    kinds.append(watch.look().permission.kind)
    assert kinds == ["go-ahead", "stay" if forgotten else "go-ahead"]


async def test_a_service_is_silent_only_when_it_has_answered_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a guest that boots, or a wrong address, ends a healthy VM; and its standby after it."""
    monkeypatch.setattr(watching, "ASK_S", 0.0)
    answers = iter(["refused", "refused", "", "refused"])
    asked_all = asyncio.Event()

    async def ask() -> str | None:
        if (answer := next(answers, None)) is None:
            asked_all.set()
        return answer

    watch = Watch("web", lambda: None, Rules, Provable.YES, ask)
    told: list[str] = []
    see = watch.see

    def noted(one: Observation) -> None:
        told.append(type(one).__name__)
        see(one)

    monkeypatch.setattr(watch, "see", noted)
    asking = asyncio.create_task(watch._ask_again())
    async with asyncio.timeout(90):
        await asked_all.wait()
    asking.cancel()
    await asyncio.wait([asking])
    assert told == ["Heard", "Silent"]
    assert caplog.text.count("has not answered in this life") == 1


@dataclass
class Described(Known):
    """With what its VM file says of standbys."""

    spec: Any = field(default_factory=lambda: SimpleNamespace(standby=None))


@pytest.mark.parametrize(
    ("run", "error"), [(Runstate.UNKNOWN, Unavailable), (Runstate.RUNNING, StateConflict)]
)
async def test_a_new_agent_asks_before_it_gives_a_take_over_up(
    run: Runstate, error: type[Exception]
) -> None:
    """The agent that has seen the guest panic may have died since. The control: a VM that runs."""
    known = cast(Vm, Described(VmState(run)))
    first = WatchedFirst("web", lambda: known, _none, lambda _vm: Places(Path(), Path()), 1.0)
    with pytest.raises(error):
        await first.fence(kill=False)


@pytest.mark.parametrize("why", ["killed on request", FOR_STANDBY])
async def test_a_vm_that_somebody_has_ended_meanwhile_is_not_brought_back(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: one that the fence itself has ended, at its attempt before."""

    class Proving:
        def __init__(self, *_: object) -> None:
            pass

        async def prove(self) -> Proven:
            """It has ended."""
            return Proven(Means.LOCK_HERE, "seen")

    monkeypatch.setattr(first_module, "LocalFence", Proving)
    known = cast(Vm, Described(VmState(Runstate.STOPPED, why)))
    first = WatchedFirst("web", lambda: known, _none, lambda _vm: Places(Path(), Path()), 1.0)
    if why == FOR_STANDBY:
        await first.fence(kill=False)
    else:
        with pytest.raises(StateConflict, match="ended on purpose"):
            await first.fence(kill=False)


async def _none(*_: object) -> Any:
    raise AssertionError


@pytest.mark.parametrize(("heard_s", "dead"), [(0.9, True), (2.0, False), (None, False)])
def test_a_qemu_of_which_the_monitor_answered_until_its_end_has_died(
    heard_s: float | None, dead: bool
) -> None:
    """Also one that another agent has started, of which nobody tells how it ended."""
    evidence = NOTHING_SEEN
    if heard_s is not None:
        evidence = note(evidence, Heard(NOW - heard_s, Sign.MONITOR))
    ended = Known(VmState(Runstate.CRASHED, "?", end=End("ended, how is not known")))
    assert bool([one for one in seen(ended, evidence) if isinstance(one, Died)]) is dead
    stopped = Known(VmState(Runstate.STOPPED, "it powered off", end=End("it powered off")))
    assert not [one for one in seen(stopped, evidence) if isinstance(one, Died)]
