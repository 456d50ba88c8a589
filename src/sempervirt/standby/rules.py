"""May the standby take over? A pure function of a verdict, the VM's rules, and what can be proved.

    evidence ──► evidence.judge ──► verdict ──► permit ──► GoAhead   next comes the fence (`proof`)
                                                       └─► Stay       why, and when to ask again

All that a decision stands on is one value, `Judgement`, which is logged as one line of JSON and can
be judged again from that line.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Literal, assert_never

from pydantic import Field, TypeAdapter

from sempervirt.qemu.spec import StandbySpec, TakeOverSpec, Wait
from sempervirt.standby.evidence import (
    Alive,
    Dead,
    Death,
    Died,
    Evidence,
    Over,
    Sign,
    Suspected,
    Unknown,
    Verdict,
    judge,
)


class Provable(Enum):
    """Whether it can be proved that the first VM writes no more (`proof.storage_can`)."""

    YES = "yes"
    NO = "no"  # the storage can nothing: a person has to say so


@dataclass(frozen=True)
class Rules:
    """How long from a proof or a suspicion to the take-over, in seconds; None: never.

    That of a silent host counts only where the fence is provable: a lease that has ended says that
    the host was not heard of, and it may run on (docs/design/ownership.md). It also counts from
    when a host that was started anew says so: in that time the host may start the VM again.
    """

    qemu_ended_s: float | None = 0.0
    guest_panicked_s: float | None = 0.0
    guest_watchdog_s: float | None = 0.0
    monitor_silent_s: float | None = None
    service_silent_s: float | None = None
    host_silent_s: float | None = 60.0

    def after_death_s(self, death: Death) -> float | None:
        """How long after a proof of death."""
        match death:
            case Death.QEMU_ENDED:
                return self.qemu_ended_s
            case Death.GUEST_PANICKED:
                return self.guest_panicked_s
            case Death.GUEST_WATCHDOG:
                return self.guest_watchdog_s
            case Death.HOST_BOOTED:
                return self.host_silent_s
            case Death.OPERATOR:
                return 0.0
            case _:
                assert_never(death)

    def after_silence_s(self, sign: Sign) -> float | None:
        """How much silence that counts."""
        match sign:
            case Sign.MONITOR:
                return self.monitor_silent_s
            case Sign.SERVICE:
                return self.service_silent_s
            case Sign.HOST:
                return self.host_silent_s
            case _:
                assert_never(sign)


@dataclass(frozen=True)
class GoAhead:
    """The standby may take over: next comes the fence, and its proof."""

    why: str
    kind: Literal["go-ahead"] = "go-ahead"


@dataclass(frozen=True)
class Stay:
    """Nothing is done. `again_s`: in so long it may be another answer; None: not by time alone."""

    why: str
    again_s: float | None = None
    kind: Literal["stay"] = "stay"


Permission = Annotated[GoAhead | Stay, Field(discriminator="kind")]


def permit(verdict: Verdict, rules: Rules, provable: Provable, now: float) -> Permission:
    """Whether the standby may take over."""
    match verdict:
        case Alive():
            return Stay("it lives")
        case Over(why):
            return Stay(f"it was ended on purpose: {why}")
        case Unknown(why):
            return Stay(why)
        case Dead(proof):
            return _after_death(proof, rules, provable, now)
        case Suspected():
            return _after_silence(verdict, rules, provable)
        case _:
            assert_never(verdict)


def _after_death(proof: Died, rules: Rules, provable: Provable, now: float) -> Permission:
    what = proof.death.value + (f": {proof.detail}" if proof.detail else "")
    patience_s = rules.after_death_s(proof.death)
    if patience_s is None:
        return Stay(f"{what}; its rules leave that to an operator")
    if provable is Provable.NO and proof.death is not Death.OPERATOR:
        return Stay(f"{what}; its storage can prove nothing, so an operator decides")
    left_s = proof.at + patience_s - now
    return GoAhead(what) if left_s <= 0 else Stay(f"{what}; its rules wait", left_s)


def _after_silence(verdict: Suspected, rules: Rules, provable: Provable) -> Permission:
    if verdict.serving:
        return Stay("its service answers")
    if provable is Provable.NO:
        return Stay("it is silent, and its storage can prove nothing, so an operator decides")
    waits: list[float] = []
    for silence in verdict.silences:
        patience_s = rules.after_silence_s(silence.sign)
        if patience_s is None:
            continue
        left_s = patience_s - silence.counted_s
        if left_s <= 0:
            heard = f": {silence.why}" if silence.why else ""
            return GoAhead(f"{silence.sign.value} silent for more than {patience_s:g} s{heard}")
        waits.append(left_s)
    signs = ", ".join(silence.sign.value for silence in verdict.silences)
    if not waits:
        return Stay(f"{signs} silent; its rules take nothing over for that")
    return Stay(f"{signs} silent; its rules wait", min(waits))


def rules_of(spec: StandbySpec | None) -> Rules:
    """Those of a VM file."""
    told = spec.take_over if spec is not None else TakeOverSpec()
    return Rules(
        qemu_ended_s=_seconds(told.qemu_ended),
        guest_panicked_s=_seconds(told.guest_panicked),
        guest_watchdog_s=_seconds(told.guest_watchdog),
        monitor_silent_s=_seconds(told.monitor_silent),
        service_silent_s=_seconds(told.service_silent),
        host_silent_s=_seconds(told.host_silent),
    )


def _seconds(told: Wait) -> float | None:
    return None if told == "never" else told


# For the log, and for whoever wants to judge again what was judged


@dataclass(frozen=True)
class Judgement:
    """A decision with all that it stands on. `now` is on the boot clock."""

    vm: str
    now: float
    evidence: Evidence
    rules: Rules
    provable: Provable
    verdict: Verdict
    permission: Permission


_JUDGEMENT = TypeAdapter(Judgement)


def decide(vm: str, evidence: Evidence, rules: Rules, provable: Provable, now: float) -> Judgement:
    """Judges, and says what may follow."""
    verdict = judge(evidence, now)
    permission = permit(verdict, rules, provable, now)
    return Judgement(vm, now, evidence, rules, provable, verdict, permission)


def to_json(judgement: Judgement) -> str:
    """One line, for the log."""
    return _JUDGEMENT.dump_json(judgement).decode()


def from_json(line: str | bytes) -> Judgement:
    """What `to_json` gave. Raises ValueError."""
    return _JUDGEMENT.validate_json(line)
