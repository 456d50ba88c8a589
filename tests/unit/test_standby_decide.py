"""The machine of standbys: some ways, by hand. `test_standby_worlds` has random ones."""

from __future__ import annotations

from sempervirt.core.errors import Unavailable
from sempervirt.core.failure import Failure
from sempervirt.standby import decide as machine
from sempervirt.standby.state import (
    Booted,
    CancelAsked,
    Claim,
    Claimed,
    Copied,
    DisableAsked,
    Effect,
    Event,
    Failed,
    FailoverAsked,
    Fence,
    Fenced,
    First,
    FirstSeen,
    Found,
    Frozen,
    Life,
    Load,
    Loaded,
    PolicyAsked,
    Probed,
    Refuse,
    Remove,
    Removed,
    Run,
    Runs,
    Settled,
    StandAgain,
    Standby,
    Stood,
    Take,
    Taken,
    Tick,
)
from sempervirt.standby.values import Policy, Tier

POLICY = Policy(60.0, 2, Tier.READY)


def run(state: Standby, *events: Event, now: float = 0.0) -> tuple[Standby, list[Effect]]:
    effects: list[Effect] = []
    for event in events:
        state, more = machine.decide(state, event, now)
        effects += more
    return state, effects


def ready(number: int = 1, state: Standby | None = None, now: float = 0.0) -> Standby:
    state = state or machine.begin("web", Policy(60.0, 1, Tier.READY))
    state, effects = run(
        state,
        FirstSeen(First.RUNNING),
        Tick(),
        Taken(number, 5.0, (("root", 7),), "crash"),
        Copied(number),
        Booted(number, 20.0),
        Settled(number),
        Frozen(number, "pc-q35-10.0", 1),
        Stood(number),
        now=now,
    )
    assert state.ready[-1].number == number, effects
    return state


def test_the_new_one_is_ready_before_the_old_one_goes() -> None:
    state = ready(2, ready(), now=61.0)
    assert [(one.number, one.life) for one in state.generations] == [
        (1, Life.RETIRING),
        (2, Life.READY),
    ]
    state, effects = run(state, Removed(1), now=62.0)
    assert [one.number for one in state.generations] == [2]
    assert not effects


def test_a_generation_that_cannot_be_loaded_leaves_the_take_over_to_the_one_before() -> None:
    policy = Policy(60.0, 2, Tier.READY)
    state = ready(2, ready(1, machine.begin("web", policy)), now=61.0)
    state, effects = run(state, FirstSeen(First.DEAD, "killed", 99.0), now=70.0)
    assert effects == [Load(2, "pc-q35-10.0", Tier.READY), Fence(kill=False)]
    failure = Failure.named(Unavailable, "no")
    state, effects = run(state, Failed(effects[0], failure), Fenced(), now=70.1)  # type: ignore[arg-type]
    assert effects == [Remove(2), Load(1, "pc-q35-10.0", Tier.READY)]
    state, effects = run(state, Loaded(1), now=70.2)
    assert effects == [Claim(1)]


def test_an_older_one_that_takes_over_is_not_removed_when_a_newer_one_stands() -> None:
    """Its QEMU would be killed between the claim and the order to run."""
    policy = Policy(60.0, 1, Tier.READY)
    state = ready(1, machine.begin("web", policy))
    state, _ = run(state, FirstSeen(First.RUNNING), Tick(), now=61.0)
    state, _ = run(state, Taken(2, 66.0, (), ""), Copied(2), Booted(2, 20.0), Settled(2), now=62.0)
    state, _ = run(state, FirstSeen(First.DEAD, "killed", 99.0), Loaded(1), Fenced(), now=70.0)
    state, effects = run(state, Frozen(2, "pc-q35-10.0", 1), Stood(2), now=71.0)
    assert not [effect for effect in effects if isinstance(effect, Remove)]
    state, effects = run(state, Claimed(1), now=72.0)
    assert effects == [Run(1)]


def test_what_was_to_be_removed_again_is_removed_once_by_the_next_agent() -> None:
    state, effects = run(ready(), DisableAsked(1))
    state, _ = run(state, Failed(Remove(1), Failure.named(Unavailable, "no")))
    state, effects = machine.recover(state, {}, 100.0)
    assert effects == [Remove(1)]
    _, effects = run(state, Tick(), now=200.0)
    assert effects == []


def test_a_vm_that_runs_is_not_taken_over_unless_that_is_forced() -> None:
    state = ready()
    state, effects = run(state, FailoverAsked(1, force=False, time=9.0))
    assert isinstance(effects[0], Refuse)
    assert state.take_over is None
    state, effects = run(state, FailoverAsked(2, force=True, time=9.0))
    assert effects == [Load(1, "pc-q35-10.0", Tier.READY), Fence(kill=True)]


def test_a_take_over_that_was_called_off_is_declared_by_an_operator_only() -> None:
    policy = Policy(60.0, 2, Tier.READY)
    state = ready(2, ready(1, machine.begin("web", policy)), now=61.0)
    state, _ = run(state, FirstSeen(First.DEAD, "killed", 70.0), CancelAsked(1))
    assert state.past is not None
    assert (state.take_over, state.past.trouble) == (None, "an operator has called it off")
    state, effects = run(state, Stood(2), FirstSeen(First.AWAY), FirstSeen(First.DEAD, "killed"))
    assert (state.take_over, effects) == (None, [])
    # What is past the claim is the VM.
    claiming, _ = run(ready(), FirstSeen(First.DEAD, "killed", 9.0), Loaded(1), Fenced())
    _, effects = run(claiming, CancelAsked(2))
    assert isinstance(effects[0], Refuse)
    # Another death is another matter.
    state, _ = run(state, FirstSeen(First.RUNNING), FirstSeen(First.DEAD, "killed", 100.0))
    assert state.take_over is not None


def called_off() -> tuple[Standby, list[Effect]]:
    """The first VM runs after all, when standby 1 has loaded its state."""
    state, _ = run(ready(), FirstSeen(First.DEAD, "killed", 70.0), Loaded(1), now=30.0)
    return run(state, FirstSeen(First.RUNNING), now=31.0)


def test_a_take_over_that_is_called_off_spends_no_standby() -> None:
    state, effects = called_off()
    assert effects == [StandAgain(1, "pc-q35-10.0", Tier.READY)]
    assert [one.life for one in state.generations] == [Life.RETURNING]
    assert "not spent" in state.trouble
    assert state.past is not None
    assert any("not spent" in note for note in state.past.notes)
    # Meanwhile it does not take over, and the next one is made when it was due.
    due = state.due
    state, effects = run(state, FirstSeen(First.DEAD, "killed", 71.0), now=32.0)
    assert (state.take_over, effects) == (None, [])
    state, effects = run(state, Stood(1, 72.0), now=33.0)
    assert effects == [Load(1, "pc-q35-10.0", Tier.READY), Fence(kill=False)]
    assert state.due == due


def test_one_that_does_not_wait_once_more_is_replaced_at_once() -> None:
    state, (again,) = called_off()
    assert isinstance(again, StandAgain)
    failure = Failure.named(Unavailable, "no memory")
    state, effects = run(state, Failed(again, failure), now=32.0)
    assert effects == [Remove(1)]
    assert "another one is made: no memory" in state.trouble
    _, effects = run(state, Tick(), now=32.0)
    assert effects == [Take(2)]


def test_an_agent_that_died_meanwhile_leaves_one_that_waits_or_none() -> None:
    state, _ = called_off()
    (one,) = state.generations
    for found, life, effect in (
        # Nobody knows whether it was prepared for its state before the agent died.
        (Found.WAITS, Life.RETURNING, [StandAgain(1, one.machine, one.tier)]),
        (Found.KEPT, Life.READY, []),
        (Found.LOADED, Life.RETIRING, [Remove(1)]),
        (Found.NOTHING, Life.RETIRING, [Remove(1)]),
    ):
        recovered, effects = machine.recover(state, {1: found}, 100.0)
        assert [one.life for one in recovered.generations] == [life], found
        assert [each for each in effects if isinstance(each, StandAgain | Remove)] == effect, found


def test_a_vm_that_was_stopped_in_order_is_not_taken_over() -> None:
    state, effects = run(ready(), FirstSeen(First.AWAY, "the guest powered off"))
    assert state.take_over is None
    assert not effects


def served() -> Standby:
    """Generation 1 has taken over."""
    state, _ = run(ready(), FirstSeen(First.DEAD, "killed", 99.0))
    state, _ = run(state, Loaded(1), Fenced(), Claimed(1), Runs(1), Probed(1, 100.0))
    assert state.serving is not None
    return state


def test_standbys_that_were_removed_come_again_when_they_are_asked_for() -> None:
    state, _ = run(served(), DisableAsked(1))
    assert state.over
    nothing, effects = run(state, FirstSeen(First.RUNNING), Tick(), now=1.0)
    assert (nothing.making, effects) == (None, [])
    state, effects = run(state, PolicyAsked(POLICY), FirstSeen(First.RUNNING), Tick(), now=2.0)
    assert effects == [Take(2)]
    assert state.serving is not None


def test_standbys_that_are_being_removed_do_not_come_again_by_another_policy() -> None:
    state, effects = run(ready(), DisableAsked(1), PolicyAsked(POLICY))
    assert effects == [Remove(1)]
    assert state.closing


def test_lost_disks_go_after_a_week_also_when_there_are_no_standbys_any_more() -> None:
    state = ready(2, served(), now=700.0)
    state, _ = run(state, FirstSeen(First.DEAD, "killed", 800.0))
    state, _ = run(state, Loaded(2), Fenced(), Claimed(2), Runs(2), Probed(2, 801.0))
    state, _ = run(state, DisableAsked(1))
    kept, effects = run(state, FirstSeen(First.RUNNING, time=800.0 + 6 * 86400))
    assert [one.life for one in kept.generations] == [Life.LOST, Life.SERVING]
    assert not effects
    _, effects = run(state, FirstSeen(First.RUNNING, time=801.0 + 7 * 86400))
    assert effects == [Remove(1)]


def test_what_is_lost_to_a_standby_that_was_still_being_made_has_its_true_length() -> None:
    state = machine.begin("web", Policy(60.0, 1, Tier.READY))
    state, _ = run(state, FirstSeen(First.RUNNING), Tick(), Taken(1, 5.0, (("root", 7),), "crash"))
    state, _ = run(state, Copied(1), FirstSeen(First.DEAD, "killed", 30.0), Booted(1, 20.0))
    state, _ = run(state, Settled(1), Frozen(1, "pc-q35-10.0", 1), Stood(1, 65.0))
    assert state.take_over is not None
    assert (state.take_over.began, state.generations[0].taken) == (65.0, 5.0)
