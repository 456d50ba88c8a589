"""Is the first VM unavailable, and may the standby take over? Every order of what can be seen.

Histories of observations are compared with an oracle, which looks at the whole history each time
and keeps no state: every history of `DEPTH` observations after each of seven beginnings, and random
longer ones. Two days of a VM that lives, with all that makes others fence healthy hosts, are a
second judge. Mistakes are put into the source of the functions themselves; each of them has to be
found.
"""

from __future__ import annotations

import importlib
import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sempervirt.standby import evidence as real_evidence
from sempervirt.standby import rules as real_rules

DEPTH = int(os.environ.get("SEMPERVIRT_EVIDENCE_DEPTH", "2"))
WALKS = int(os.environ.get("SEMPERVIRT_EVIDENCE_WALKS", "1500"))
DAY_S = 86400


@dataclass(frozen=True)
class Code:
    """The functions that are tried: as they are, or with a mistake."""

    ev: Any
    po: Any


REAL = Code(real_evidence, real_rules)


def eager(code: Code) -> Any:
    """Takes over for everything, soon: so that a few observations suffice."""
    return code.po.Rules(
        guest_watchdog_s=1.0, monitor_silent_s=2.0, service_silent_s=2.0, host_silent_s=2.0
    )


# The oracle


@dataclass(frozen=True)
class Asked:
    """What the oracle is asked: a history, and what is judged at its end."""

    history: tuple[Any, ...]
    now: float
    provable: bool


def oracle(code: Code, rules: Any, asked: Asked) -> bool:
    """Whether the standby may take over, from the whole history."""
    ev, history = code.ev, _without_needless(code.ev, asked.history)
    begun = max((i for i, one in enumerate(history) if isinstance(one, ev.Began)), default=-1)
    life = history[begun + 1 :]
    if any(isinstance(one, ev.Finished) for one in life):
        return False
    if (death := _death(ev, life)) is not None:
        patience_s = rules.after_death_s(death.death)
        may = asked.provable or death.death is ev.Death.OPERATOR
        return (
            may
            and patience_s is not None
            and not _stands(ev, history, ev.Trouble.WORK)
            and asked.now - death.at >= patience_s
        )
    if not asked.provable or _serves(ev, life, asked.now):
        return False
    punctual = _punctual_from(ev, history)
    looks = [one for one in history if isinstance(one, ev.Looked)]
    if punctual is None or not 0 <= asked.now - looks[-1].at <= 1.5:
        return False
    if asked.now - history[punctual].at < 5.0:
        return False
    return any(
        (began := _silent_since(ev, history, sign, punctual)) is not None
        and (patience_s := rules.after_silence_s(sign)) is not None
        and looks[-1].at - began >= patience_s
        for sign in ev.Sign
    )


def _without_needless(ev: Any, history: tuple[Any, ...]) -> tuple[Any, ...]:
    """Without ends of troubles that did not stand."""
    return tuple(
        one
        for place, one in enumerate(history)
        if not isinstance(one, ev.Mended) or _stands(ev, history[:place], one.trouble)
    )


def _death(ev: Any, life: tuple[Any, ...]) -> Any:
    died = [one for one in life if isinstance(one, ev.Died)]
    if certain := [one for one in died if not one.death.of_guest]:
        return certain[0]
    left = None
    for one in life:
        match one:
            case ev.Heard() if one.sign is ev.Sign.SERVICE and left is not None:
                left = left if one.at <= left.at else None
            case ev.Died() if left is None:
                left = one
            case _:
                pass  # it says nothing of a death
    return left


def _serves(ev: Any, life: tuple[Any, ...], now: float) -> bool:
    heard = [one.at for one in life if isinstance(one, ev.Heard) and one.sign is ev.Sign.SERVICE]
    return bool(heard) and 0 <= now - heard[-1] <= 15.0


def _stands(ev: Any, history: tuple[Any, ...], trouble: Any) -> bool:
    told = [
        one
        for one in history
        if isinstance(one, ev.Troubled | ev.Mended) and one.trouble is trouble
    ]
    return bool(told) and isinstance(told[-1], ev.Troubled)


def _punctual_from(ev: Any, history: tuple[Any, ...]) -> int | None:
    """The place of the look from which on none was late."""
    looks = [(place, one) for place, one in enumerate(history) if isinstance(one, ev.Looked)]
    since = looks[0][0] if looks else None
    for (_, before), (place, look) in itertools.pairwise(looks):
        if not 0 <= look.at - look.due <= 0.5 or not 0 <= look.at - before.at <= 1.5:
            since = place
    return since


def _silent_since(ev: Any, history: tuple[Any, ...], sign: Any, punctual: int) -> float | None:
    """Since when that sign has been missing without another cause, all the time until the end."""
    causes = {
        ev.Sign.MONITOR: (ev.Trouble.DISK, ev.Trouble.WORK),
        ev.Sign.SERVICE: (ev.Trouble.DISK, ev.Trouble.PAUSED, ev.Trouble.WORK),
        ev.Sign.HOST: (ev.Trouble.STORE,),
    }[sign]
    if any(_stands(ev, history, cause) for cause in causes):
        return None
    # A question counts that was asked after all of these; an answer to it comes after `wiped`.
    not_before = [history[punctual].at]
    wiped, life = punctual, 0
    for place, one in enumerate(history):
        match one:
            case ev.Began():
                wiped, life = max(wiped, place), place
            case ev.Heard() if one.sign is sign:
                wiped = max(wiped, place)
            case ev.Troubled() | ev.Mended() if one.trouble in causes:
                wiped = max(wiped, place)
    not_before += [one.at for one in history[life : life + 1] if isinstance(one, ev.Began)]
    for cause in causes:
        mended = [one for one in history if isinstance(one, ev.Mended) and one.trouble is cause]
        not_before += [one.at for one in mended[-1:]]
    answers = [one for one in history[life:] if isinstance(one, ev.Heard) and one.sign is sign]
    for one in history[wiped + 1 :]:
        if not isinstance(one, ev.Silent) or one.sign is not sign or one.asked < max(not_before):
            continue
        if not answers or one.asked > answers[-1].at:
            return float(one.at)
    return None


# The histories


@dataclass
class Clock:
    """The time, and the last look."""

    now: float = 1000.0
    looked: float = 1000.0

    def look(self, ev: Any, late_s: float = 0.0) -> Any:
        due = self.looked + 1.0
        self.now = self.looked = max(due, self.now) + late_s
        return ev.Looked(self.now, due)

    def look_back(self, ev: Any) -> Any:
        self.now = self.looked = self.now - 30.0
        return ev.Looked(self.now, self.now)

    def tick(self) -> float:
        self.now = round(self.now + 0.01, 6)
        return self.now


Step = Callable[[Clock], Any]


def alphabet(ev: Any) -> dict[str, Step]:
    """Everything that can be observed."""

    def heard(sign: Any) -> Step:
        return lambda clock: ev.Heard(clock.tick(), sign)

    def silent(sign: Any, since_s: float = 0.005) -> Step:
        return lambda clock: ev.Silent(clock.tick(), sign, clock.now - since_s)

    def about(kind: Any, what: Any) -> Step:
        return lambda clock: kind(clock.tick(), what)

    steps: dict[str, Step] = {
        "look": lambda clock: clock.look(ev),
        "late look": lambda clock: clock.look(ev, late_s=20.0),
        "time goes back": lambda clock: clock.look_back(ev),
        "stale silence": silent(ev.Sign.MONITOR, since_s=12.0),
        "ended on purpose": about(ev.Finished, "on request"),
        "begins anew": lambda clock: ev.Began(clock.tick()),
    }
    for sign in ev.Sign:
        steps |= {f"{sign.value} heard": heard(sign), f"{sign.value} silent": silent(sign)}
    for trouble in ev.Trouble:
        steps[f"{trouble.value} trouble"] = about(ev.Troubled, trouble)
        steps[f"{trouble.value} mended"] = about(ev.Mended, trouble)
    return steps | {death.value: about(ev.Died, death) for death in ev.Death}


BEGINNINGS: dict[str, tuple[str, ...]] = {
    "nothing was seen": (),
    "all is well": ("look", "monitor heard", "service heard", "host heard", *["look"] * 6),
    "a silence that is nearly long enough": (*["look"] * 7, "monitor silent", "look"),
    "everything is silent for long": (
        "service heard", *["look"] * 18, "monitor silent", "service silent", "host silent",
        *["look"] * 3,
    ),
    "late just now": (
        *["look"] * 8, "monitor silent", "look", "look", "late look", *["look"] * 4,
        "monitor silent",
    ),
    "troubles": (*["look"] * 7, "disk trouble", "store trouble", "work trouble"),
    "a question from the time of a trouble that is over": (
        *["look"] * 7, "disk trouble", *["look"] * 12, "disk mended", "stale silence",
        *["look"] * 2,
    ),
}  # fmt: skip


class Wrong(AssertionError):
    """What the functions say is not what the oracle says."""


def run(code: Code, steps: tuple[str, ...], known: dict[str, Step]) -> None:
    """Carries a history out, and compares at its end, at once and a second later."""
    clock, seen, evidence = Clock(), [], code.ev.NOTHING_SEEN
    for step in steps:
        seen.append(known[step](clock))
        evidence = code.ev.note(evidence, seen[-1])
    rules = eager(code)
    for now, provable in ((clock.now, True), (clock.now + 1.0, True), (clock.now, False)):
        fence = code.po.Provable.YES if provable else code.po.Provable.NO
        judged = code.po.decide("web", evidence, rules, fence, now)
        asked = Asked(tuple(seen), now, provable)
        may = isinstance(judged.permission, code.po.GoAhead)
        if may != oracle(code, rules, asked):
            raise Wrong(f"{steps} at {now}, provable={provable}: {judged.permission}")
        _invariants(code, seen, judged)


def _invariants(code: Code, seen: list[Any], judged: Any) -> None:
    ev = code.ev
    match judged.verdict:
        case ev.Dead(proof) if proof not in seen:
            raise Wrong("dead without a proof")
        case ev.Alive(heard) if not 0 <= judged.now - heard <= 15.0:
            raise Wrong("alive by a sign that is old")
        case _:
            pass


def explore(code: Code, depth: int) -> int:
    """Every history of `depth` steps after each beginning, and random ones; how many those were."""
    known = alphabet(code.ev)
    count = 0
    for beginning in BEGINNINGS.values():
        for length in range(depth + 1):
            for steps in itertools.product(known, repeat=length):
                run(code, (*beginning, *steps), known)
                count += 1
    dice = random.Random(7)
    usual = [*["look"] * 40, *known]
    for _ in range(WALKS):
        run(code, tuple(dice.choices(usual, k=dice.randrange(5, 60))), known)
        count += 1
    return count


# Mistakes

MISTAKES: dict[str, tuple[str, str, str]] = {
    "an agent that is late believes its ears": (
        "evidence",
        "if evidence.punctual_since is None or not on_time:",
        "if evidence.punctual_since is None:",
    ),
    "a question from before the lateness counts": (
        "evidence",
        "late = evidence.punctual_since is None or seen.asked < evidence.punctual_since",
        "late = evidence.punctual_since is None",
    ),
    "a silence is believed as soon as the agent is on time again": (
        "evidence",
        "if settled_s < SETTLE_S:",
        "if settled_s < 0:",
    ),
    "a disk that stalls is no cause": (
        "evidence",
        "Sign.SERVICE: frozenset({Trouble.DISK, Trouble.PAUSED, Trouble.WORK})",
        "Sign.SERVICE: frozenset({Trouble.PAUSED, Trouble.WORK})",
    ),
    "a silence from before a trouble goes on": (
        "evidence",
        "return replace(evidence, troubles=standing, silences=unexplained)",
        "return replace(evidence, troubles=standing)",
    ),
    "a question from the time of a trouble counts": (
        "evidence",
        "return replace(evidence, troubles=left, past=(*past, Past(trouble, at)))",
        "return replace(evidence, troubles=left)",
    ),
    "whoever is heard again stays silent": (
        "evidence",
        "silences = tuple(one for one in evidence.silences if one.sign is not sign)",
        "silences = evidence.silences",
    ),
    "a VM that was ended on purpose is dead": (
        "evidence",
        "return replace(evidence, finished=why, death=None)",
        "return evidence",
    ),
    "a restart of QEMU is the end of a VM": (
        "evidence",
        "if busy is not None:",
        "if busy is None and busy is not None:",
    ),
    "a panic counts although the guest serves": (
        "evidence",
        "if death is not None and death.death.of_guest and sign is Sign.SERVICE and at > death.at:",
        "if death is not None and death.at > at:",
    ),
    "the death of the QEMU before counts": (
        "evidence",
        "begun=at,",
        "begun=at, death=evidence.death,",
    ),
    "storage that proves nothing is as good": (
        "rules",
        "if provable is Provable.NO:",
        "if provable is Provable.NO and verdict.serving:",
    ),
    "whose service answers is taken over": (
        "rules",
        "if verdict.serving:",
        "if not verdict.silences:",
    ),
    "nobody waits as long as the rules say": (
        "rules",
        "left_s = patience_s - silence.counted_s",
        "left_s = 0.0",
    ),
}  # fmt: skip


def with_mistake(module: str, old: str, new: str) -> Code:
    """The functions, with one piece of their source replaced."""
    sources = {
        name: Path(str(real.__file__)).read_text()
        for name, real in (("evidence", real_evidence), ("rules", real_rules))
    }
    assert sources[module].count(old) == 1, f"{old!r} is not once in {module}"
    sources[module] = sources[module].replace(old, new)
    made = {}
    for name, text in sources.items():
        changed = text.replace("sempervirt.standby.evidence", "mistaken_evidence")
        fresh = ModuleType(f"mistaken_{name}")
        sys.modules[fresh.__name__] = fresh
        exec(compile(changed, f"<{name} with a mistake>", "exec"), fresh.__dict__)
        made[name] = fresh
    return Code(made["evidence"], made["rules"])


@pytest.fixture(autouse=True)
def _forget_mistakes() -> Iterator[None]:
    yield
    for name in ("mistaken_evidence", "mistaken_rules"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


def test_every_order_of_observations() -> None:
    assert explore(REAL, DEPTH) > 3_000


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake: str) -> None:
    code = with_mistake(*MISTAKES[mistake])
    with pytest.raises(Wrong):
        explore(code, 2)


# Two days of a VM that lives


@dataclass
class Days:
    """What the agent of a healthy VM observes, and what happens to agent, store and disk. It is
    really gone while it is `lost`; its service is asked if it is `probed`.
    """

    seed: int
    lost: tuple[float, float] = (0.0, 0.0)
    probed: bool = True

    def observations(self, ev: Any) -> Iterator[Any]:
        """In order, each at its time; looks once a second, questions every five."""
        dice = random.Random(self.seed)
        starved = self._spans(dice, 12, 120.0)
        stalled = self._spans(dice, 40, 20.0)
        silent = self._spans(dice, 12, 60.0)
        away = self._spans(dice, 2, 3600.0)
        jumps = sorted(dice.uniform(0, 2 * DAY_S) for _ in range(4))
        at, due = 1000.0, 1000.0
        troubled: set[Any] = set()
        while at < 2 * DAY_S:
            # With a twentieth of a processor, what takes 50 ms takes a second, or ten.
            at = due + (dice.uniform(0.3, 20.0) if _within(starved, due) else 0.01)
            if jumps and at > jumps[0]:
                at += 3600.0  # the host slept: the boot clock went on
                jumps.pop(0)
            yield ev.Looked(at, due)
            due = at + ev.LOOK_S
            for trouble, spans in ((ev.Trouble.DISK, stalled), (ev.Trouble.STORE, away)):
                if _within(spans, at) and trouble not in troubled:
                    troubled.add(trouble)
                    yield ev.Troubled(at, trouble)
                elif trouble in troubled and not _within(spans, at):
                    troubled.discard(trouble)
                    yield ev.Mended(at, trouble)
            if int(at) % 5 == 0:
                late = _within(starved, at)
                yield from self._answers(ev, at, dice, late, stalled, silent, away)

    def _answers(
        self, ev: Any, at: float, dice: random.Random, late: bool, *spans: list[Any]
    ) -> Iterator[Any]:
        stalled, silent, away = spans
        quiet = {
            ev.Sign.MONITOR: _within(silent, at) or _within([self.lost], at),
            ev.Sign.SERVICE: _within(stalled, at) or _within([self.lost], at),
            ev.Sign.HOST: _within(away, at),
        }
        if not self.probed:
            del quiet[ev.Sign.SERVICE]
        for sign, is_quiet in quiet.items():
            if is_quiet or (late and dice.random() < 0.7):
                yield ev.Silent(at, sign, at - (25.0 if late else 3.0), "no answer")
            else:
                yield ev.Heard(at, sign)

    def _spans(self, dice: random.Random, count: int, length_s: float) -> list[tuple[float, float]]:
        begins = [dice.uniform(2000, 2 * DAY_S) for _ in range(count)]
        return [(begin, begin + length_s) for begin in begins]


def _within(spans: list[Any], at: float) -> bool:
    return any(begin <= at < end for begin, end in spans)


def take_overs(code: Code, days: Days, *several: Any) -> Iterator[tuple[float, str]]:
    """When the standby would have taken over by any of these rules, and why."""
    evidence, yes = code.ev.NOTHING_SEEN, code.po.Provable.YES
    for seen in days.observations(code.ev):
        evidence = code.ev.note(evidence, seen)
        for rules in several:
            judged = code.po.decide("web", evidence, rules, yes, seen.at)
            if isinstance(judged.permission, code.po.GoAhead):
                yield seen.at, judged.permission.why


def impatient(code: Code) -> Any:
    """As impatient as rules may be that still outlast what happens in these two days."""
    return code.po.Rules(monitor_silent_s=75.0, service_silent_s=8.0, host_silent_s=10.0)


@pytest.mark.parametrize(("seed", "probed"), [(1, True), (2, False)])
def test_two_days_without_a_false_alarm(seed: int, probed: bool) -> None:
    days = Days(seed, probed=probed)
    assert list(take_overs(REAL, days, REAL.po.Rules(), impatient(REAL))) == []


def test_two_days_with_a_real_loss() -> None:
    """The control: what is really gone is taken over, as soon as the rules allow and not before."""
    lost = (100_000.0, 101_000.0)
    found = list(take_overs(REAL, Days(1, lost=lost), impatient(REAL)))
    assert found
    assert lost[0] + 8.0 <= found[0][0] <= lost[0] + 120.0
    assert all(lost[0] <= at < lost[1] + 10.0 for at, _ in found)


@pytest.mark.parametrize(
    ("mistake", "probed"),
    [
        ("an agent that is late believes its ears", True),
        ("a disk that stalls is no cause", True),
        ("whoever is heard again stays silent", False),
        ("nobody waits as long as the rules say", False),
    ],
)
def test_two_days_find_mistakes(mistake: str, probed: bool) -> None:
    code = with_mistake(*MISTAKES[mistake])
    assert next(take_overs(code, Days(1, probed=probed), impatient(code)), None) is not None


# What is logged can be judged again


def test_a_judgement_is_one_line_and_comes_back() -> None:
    ev, po = real_evidence, real_rules
    evidence = ev.NOTHING_SEEN
    history: tuple[ev.Observation, ...] = (
        *(ev.Looked(float(at), float(at)) for at in range(10)),
        ev.Heard(9.1, ev.Sign.HOST),
        ev.Silent(9.5, ev.Sign.MONITOR, 9.2, "no answer in 3 s"),
        ev.Looked(10.0, 10.0),
    )
    for seen in history:
        evidence = ev.note(evidence, seen)
    rules = po.Rules(monitor_silent_s=30.0)
    judged = po.decide("web", evidence, rules, po.Provable.YES, 10.2)
    assert isinstance(judged.verdict, ev.Suspected)
    assert isinstance(judged.permission, po.Stay)
    assert judged.permission.again_s == pytest.approx(29.5)
    line = po.to_json(judged)
    assert "\n" not in line
    again = po.from_json(line)
    assert again == judged
    assert po.decide(again.vm, again.evidence, again.rules, again.provable, again.now) == judged


def test_a_silent_host_is_never_taken_over_without_a_fence() -> None:
    ev, po = real_evidence, real_rules
    silence = ev.Silence(ev.Sign.HOST, 0.0, 3600.0)
    verdict = ev.Suspected(0.0, (silence,))
    assert isinstance(po.permit(verdict, po.Rules(), po.Provable.NO, 3600.0), po.Stay)
    assert isinstance(po.permit(verdict, po.Rules(), po.Provable.YES, 3600.0), po.GoAhead)


def test_a_monitor_that_is_silent_for_an_hour_is_left_alone_by_default() -> None:
    ev, po = real_evidence, real_rules
    verdict = ev.Suspected(0.0, (ev.Silence(ev.Sign.MONITOR, 0.0, 3600.0),))
    assert isinstance(po.permit(verdict, po.Rules(), po.Provable.YES, 3600.0), po.Stay)
