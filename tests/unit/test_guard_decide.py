"""What the guard decides: every phase, rates, storms, shutdowns; and a day of ordinary signs."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from sempervirt.guard.decide import DECISIONS_MAX, QUIET_S, decide, wake_at
from sempervirt.guard.presets import Afterwards, Meaning, Presets, Rule, shipped
from sempervirt.guard.signs import Sign, SignId
from sempervirt.guard.sources.module import ModuleCommand
from sempervirt.guard.state import (
    Action,
    BeginEvacuation,
    Effect,
    EvacuationEnded,
    Event,
    GuardState,
    KeepHeard,
    LoadingEnded,
    LoadModule,
    ModuleIsThere,
    Phase,
    ReleaseShutdown,
    Seen,
    TellModule,
    Tick,
)

SHIPPED = shipped()
PANIC = Sign(SignId.MODULE_PANIC, "event 0: panic", broken=(790,))
OUT = EvacuationEnded(("web",), (), ())
LEFT = EvacuationEnded((), ("web",), (), "web: b refuses")
GO = TellModule(ModuleCommand.EVACUATED)


class Host:
    """Steps the guard, and keeps what it asked for."""

    def __init__(self, presets: Presets = SHIPPED, *, module: bool = True) -> None:
        self.presets = presets
        self.state = GuardState(module=module)
        self.now = 1000.0

    def step(self, event: Event) -> list[Effect]:
        self.state, effects = decide(self.presets, self.state, event, self.now)
        return effects

    def see(self, *signs: Sign) -> list[Effect]:
        return [effect for sign in signs for effect in self.step(Seen(sign))]

    def pass_s(self, seconds: float) -> list[Effect]:
        self.now += seconds
        return self.step(Tick())

    def phase(self) -> Phase:
        return self.state.phase

    @property
    def actions(self) -> list[Action]:
        return [decision.action for decision in self.state.decisions]


def sign(identifier: SignId, count: int = 1) -> Sign:
    return Sign(identifier, f"{identifier.value} was seen", count=count)


def with_rule(identifier: SignId, rule: Rule) -> Presets:
    return replace(SHIPPED, rules={**SHIPPED.rules, identifier: rule})


# An evacuation


def test_a_death_that_was_put_off_evacuates_then_it_may_happen() -> None:
    host = Host()
    assert host.see(PANIC) == [
        BeginEvacuation(("event 0: panic",), SHIPPED.deadline_s, frozenset({790}), shutdown=False)
    ]
    assert host.phase() is Phase.EVACUATING
    assert host.step(OUT) == [GO]
    assert host.phase() is Phase.EMPTY
    assert host.actions == [Action.EVACUATES, Action.EVACUATED]


def test_the_next_agent_does_not_begin_again_with_what_was_dealt_with() -> None:
    """Which it hears from the device once more. A later event begins an evacuation as ever."""
    panic = replace(PANIC, ns=7_000)
    host = Host(replace(SHIPPED, afterwards=Afterwards.STAY))
    # The control: an agent that dies before the VMs are out leaves the event to the next one.
    assert [type(effect) for effect in host.see(panic)] == [BeginEvacuation]
    assert host.step(LEFT) == []
    for _ in range(SHIPPED.attempts):
        host.pass_s(10_000)
        host.step(LEFT)
    assert (host.phase(), host.state.settled_ns) == (Phase.STAYING, 0)
    host.see(replace(panic, ns=7_001))
    assert host.step(OUT) == [KeepHeard(7_001)]
    following = Host(host.presets)
    following.state = replace(following.state, settled_ns=7_001, heard_ns=7_001)
    assert following.see(panic, replace(panic, ns=7_001)) == []
    assert following.phase() is Phase.WATCHING
    # What was parked then is parked still, and the death is still put off.
    assert following.state.broken == {790}
    assert following.state.put_off
    later = following.see(replace(panic, ns=7_002, broken=(791,)))
    assert isinstance(later[0], BeginEvacuation)
    assert later[0].broken == {790, 791}


def test_an_event_of_which_nothing_follows_is_dealt_with_at_once() -> None:
    host = Host()
    warning = replace(sign(SignId.MODULE_WARNING), ns=5)
    assert host.see(warning) == [KeepHeard(5)]
    assert host.see(warning, replace(warning, ns=4)) == []


def test_the_operator_may_keep_the_host_afterwards() -> None:
    host = Host(replace(SHIPPED, afterwards=Afterwards.STAY))
    host.see(PANIC)
    assert host.step(OUT) == []


def test_without_the_module_nobody_is_told_to_let_a_death_happen() -> None:
    host = Host(module=False)
    effects = host.see(sign(SignId.LOG_OOPS))
    assert [type(effect) for effect in effects] == [LoadModule, BeginEvacuation]
    assert host.step(OUT) == []


def test_further_signs_while_it_goes_on_are_evidence_and_begin_nothing() -> None:
    host = Host()
    host.see(PANIC)
    assert host.see(*[replace(PANIC, evidence=f"event {n}") for n in range(1, 1000)]) == []
    assert len(host.state.cause) == 8
    assert host.state.tallies[SignId.MODULE_PANIC].total == 1000
    assert len(host.state.decisions) == 1


def test_after_it_a_further_sign_looks_again() -> None:
    host = Host(replace(SHIPPED, afterwards=Afterwards.STAY))
    host.see(PANIC)
    host.step(OUT)
    assert [type(effect) for effect in host.see(PANIC)] == [BeginEvacuation]


def test_what_was_left_is_tried_again_after_pauses_that_grow_then_an_operator_is_needed() -> None:
    host = Host()
    host.see(PANIC)
    for attempt in range(1, SHIPPED.attempts):
        assert host.step(LEFT) == []
        assert host.phase() is Phase.WAITING
        pause_s = SHIPPED.retry_after_s * 2 ** (attempt - 1)
        assert wake_at(host.state) == host.now + pause_s
        assert host.pass_s(pause_s - 0.1) == []
        assert [type(effect) for effect in host.pass_s(0.1)] == [BeginEvacuation]
    assert host.step(LEFT) == []
    assert host.phase() is Phase.STAYING
    assert wake_at(host.state) is None
    # The module's own deadline decides, and nothing that is left is given up by us.
    assert GO not in host.pass_s(10_000)


def test_a_vm_that_cannot_be_saved_does_not_hold_the_host() -> None:
    host = Host()
    host.see(PANIC)
    assert host.step(EvacuationEnded(("web",), (), ("db",))) == [GO]
    assert "lost: db" in host.state.decisions[-1].evidence


def test_an_answer_that_nobody_waits_for_changes_nothing() -> None:
    host = Host()
    assert host.step(OUT) == []
    assert host.state == GuardState(module=True)


# Rates, storms


def test_a_rule_takes_effect_at_its_number_within_its_time() -> None:
    host = Host(with_rule(SignId.LOG_SOFT_LOCKUP, Rule(Meaning.EVACUATE, 3, 60.0)))
    lockup = sign(SignId.LOG_SOFT_LOCKUP)
    assert host.see(lockup, lockup) == []
    host.now += 61
    assert host.see(lockup, lockup) == []
    assert Action.EVACUATES not in host.actions
    assert [type(effect) for effect in host.see(lockup)] == [BeginEvacuation]


def test_several_at_once_count_each() -> None:
    host = Host(with_rule(SignId.MEMORY_CORRECTED, Rule(Meaning.EVACUATE, 10, 60.0)))
    assert host.see(sign(SignId.MEMORY_CORRECTED, 9)) == []
    assert [type(effect) for effect in host.see(sign(SignId.MEMORY_CORRECTED))] == [BeginEvacuation]


def test_a_storm_is_told_once_a_minute_with_its_number() -> None:
    host = Host()
    for _ in range(5000):
        host.see(sign(SignId.LOG_WARNING))
        host.now += 0.01
    assert len(host.state.decisions) == 1
    host.now += QUIET_S
    host.see(sign(SignId.LOG_WARNING))
    assert host.state.decisions[-1].repeated == 4999
    assert host.state.tallies[SignId.LOG_WARNING].times == (host.now,)


def test_the_state_stays_small_whatever_is_seen() -> None:
    host, chance = Host(replace(SHIPPED, afterwards=Afterwards.STAY)), random.Random(1)
    for _ in range(20_000):
        host.now += chance.random() * 100
        seen = Seen(sign(chance.choice(list(SignId)), 1000))
        events: list[Event] = [seen, OUT, LEFT, Tick()]
        host.step(chance.choice(events))
    assert len(host.state.decisions) <= DECISIONS_MAX
    assert all(len(tally.times) <= 10 for tally in host.state.tallies.values())


# The module is loaded in response to a sign


def test_a_sign_loads_the_module_once_and_after_a_failure_not_at_once() -> None:
    host = Host(module=False)
    hung = sign(SignId.LOG_HUNG_TASK)
    assert host.see(hung, hung) == [LoadModule()]
    host.step(LoadingEnded("no such file"))
    assert "no such file" in host.state.load_failure
    assert host.see(hung) == []
    host.now += 301
    assert host.see(hung) == [LoadModule()]
    host.step(LoadingEnded())
    host.step(ModuleIsThere(True))
    assert host.see(hung) == []


def test_a_sign_of_another_preset_does_not_load_it() -> None:
    assert Host(module=False).see(sign(SignId.PRESSURE_MEMORY)) == []


# Let it die


@pytest.mark.parametrize("phase", list(Phase))
def test_let_die_wins_from_every_phase_and_is_for_good(phase: Phase) -> None:
    host = Host(with_rule(SignId.LOG_FILE_SYSTEM, Rule(Meaning.LET_DIE)))
    host.state = replace(host.state, phase=phase, put_off=True, retry_at=host.now)
    effects = host.see(sign(SignId.LOG_FILE_SYSTEM))
    if phase is Phase.LET_DIE:
        assert effects == []
    else:
        assert effects == [TellModule(ModuleCommand.ALLOW), GO]
    assert host.phase() is Phase.LET_DIE
    assert host.see(PANIC) == []
    assert host.step(OUT) == []
    assert host.pass_s(1000) == []


# An orderly shutdown

SHUTDOWN = sign(SignId.HOST_SHUTDOWN)


def test_a_shutdown_waits_for_the_vms_and_for_nothing_else() -> None:
    host = Host()
    (begin,) = host.see(SHUTDOWN)
    assert isinstance(begin, BeginEvacuation)
    assert begin.shutdown
    assert host.step(OUT) == [GO, ReleaseShutdown()]
    assert wake_at(host.state) is None


def test_a_shutdown_never_waits_longer_than_its_bound() -> None:
    host = Host(replace(SHIPPED, hold_s=30.0))
    (begin,) = host.see(SHUTDOWN)
    assert isinstance(begin, BeginEvacuation)
    assert begin.deadline_s == 30.0
    assert host.step(LEFT) == []
    assert host.pass_s(15) != []  # the next attempt
    assert host.pass_s(14.9) == []
    assert host.pass_s(0.1) == [ReleaseShutdown()]
    assert host.state.decisions[-1].action is Action.LETS_SHUT_DOWN


def test_a_shutdown_amid_an_evacuation_waits_for_that() -> None:
    host = Host()
    host.see(PANIC)
    assert host.see(SHUTDOWN) == []
    assert host.step(OUT) == [GO, ReleaseShutdown()]


@pytest.mark.parametrize("meaning", [Meaning.IGNORE, Meaning.WATCH, Meaning.LET_DIE])
def test_a_shutdown_that_means_something_else_does_not_wait(meaning: Meaning) -> None:
    host = Host(with_rule(SignId.HOST_SHUTDOWN, Rule(meaning)), module=False)
    assert host.see(SHUTDOWN) == [ReleaseShutdown()]


def test_a_shutdown_that_is_only_counted_does_not_wait() -> None:
    rule = Rule(Meaning.EVACUATE, at_least=2)
    host = Host(with_rule(SignId.HOST_SHUTDOWN, rule), module=False)
    assert host.see(SHUTDOWN) == [ReleaseShutdown()]
    assert [type(effect) for effect in host.see(SHUTDOWN)] == [BeginEvacuation]


# Simulated


def test_a_simulated_sign_moves_vms_and_tells_the_module_nothing() -> None:
    host = Host()
    simulated = replace(PANIC, simulated=True, broken=())
    assert [type(effect) for effect in host.see(simulated)] == [BeginEvacuation]
    assert host.step(OUT) == []
    assert SignId.MODULE_PANIC not in host.state.tallies or (
        host.state.tallies[SignId.MODULE_PANIC].total == 0
    )


def test_a_real_sign_amid_a_simulated_one_is_real() -> None:
    host = Host()
    host.see(replace(PANIC, simulated=True))
    host.see(PANIC)
    assert host.step(OUT) == [GO]


# False alarms

ORDINARY = (
    (SignId.LOG_WARNING, 40), (SignId.COUNTER_WARNING, 40), (SignId.LOG_OUT_OF_MEMORY, 20),
    (SignId.PRESSURE_MEMORY, 300), (SignId.PRESSURE_IO, 300), (SignId.PRESSURE_CPU, 2000),
    (SignId.LOG_HUNG_TASK, 10), (SignId.LOG_STORAGE_ERROR, 50), (SignId.LOG_THERMAL, 30),
    (SignId.THERMAL_HOT, 5), (SignId.LOG_NMI, 3), (SignId.LOG_MACHINE_CHECK, 4),
    (SignId.MEMORY_CORRECTED, 20), (SignId.LOG_SOFT_LOCKUP, 12), (SignId.LOG_PCI_ERROR, 2),
    (SignId.RASDAEMON_MEMORY, 20), (SignId.STORAGE_SMART, 1), (SignId.TAINT_SOFT_LOCKUP, 1),
    (SignId.LOG_FILE_SYSTEM, 1), (SignId.LOG_RCU_STALL, 6), (SignId.MODULE_WARNING, 40),
)  # fmt: skip
DAY_S = 86400.0


def day() -> list[tuple[float, SignId]]:
    """What a busy, healthy host shows in a day, spread as evenly as such things are."""
    chance = random.Random(14)
    return sorted(
        (DAY_S * (turn + chance.random()) / times, identifier)
        for identifier, times in ORDINARY
        for turn in range(times)
    )


def test_a_day_of_ordinary_signs_evacuates_nothing() -> None:
    host = Host()
    for time, identifier in day():
        host.now = time
        assert host.see(sign(identifier)) == [], identifier
        assert host.pass_s(0) == []
    assert host.phase() is Phase.WATCHING


def test_the_same_day_with_one_fault_in_it_does() -> None:
    for fault in (SignId.LOG_OOPS, SignId.MODULE_SOFT_LOCKUP, SignId.MEMORY_UNCORRECTED):
        host = Host()
        effects = []
        for time, identifier in [*day(), (DAY_S / 2, fault)]:
            host.now = time
            effects += host.see(sign(identifier))
        assert [type(effect) for effect in effects] == [BeginEvacuation]
