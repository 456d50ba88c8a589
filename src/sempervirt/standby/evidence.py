"""Is the first VM unavailable? A pure function of evidence and time.

    Observation ──► note ──► Evidence ──► judge(now) ──► Verdict ──► rules.permit: may the
                                                          │            standby take over?
      Alive      a sign of life was heard lately          │
      Suspected  a sign of life is missing, since when    └─ logged as JSON, with the evidence
      Dead       a proof of death
      Over       it was ended on purpose: nothing is to be taken over
      Unknown    what is seen says nothing, and why

**Proof of death** is what this host's kernel or QEMU says (`Death`): QEMU's pidfd, the guest's
panic device, the guest's watchdog; what the other host says, which was started anew; or an
operator. What died with the guest's own death is the guest: its QEMU still has the disks, and is
fenced before anything else happens (`standby.proof`).

**Suspicion** is silence: of QEMU's monitor, of the service, of the lease of another host. Silence
proves nothing, so it counts only while nothing else explains it, and only while whoever listens was
on time:

- A look that comes late (`LATE_S`), or a time that jumps, wipes every silence: who had no processor
  cannot tell that the other one had none. Only questions count that were asked after that, and a
  verdict of suspicion is given only SETTLE_S later.
- A disk that completes nothing explains a silent monitor and a silent service; a store that does
  not answer explains an ended lease; work on the VM, or a pause, explains the rest
  (`EXPLAINED_BY`).
- Whose service answers is never taken over for silence of anything else.

Times are seconds of the boot clock (`store.port.boot_clock_s`), which nobody can set. A time that
goes backwards is treated as a late look. Nothing here reads a clock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Annotated, Literal, assert_never

from pydantic import Field

# Between two looks of the agent.
LOOK_S = 1.0
# A look that is so much later than it should be says that the agent itself had no processor.
LATE_S = 0.5
# After a late look, so long on time before a silence is believed.
SETTLE_S = 5.0
# A sign of life is good for so long.
FRESH_S = 15.0


class Sign(Enum):
    """Of life. The values stand in logs and in the API."""

    MONITOR = "monitor"  # QEMU answers on its monitor
    SERVICE = "service"  # what the guest is there for answers the probe
    HOST = "host"  # the other host's lease in the store is renewed, or its agent answers


class Death(Enum):
    """What proves that the VM is dead. The values stand in logs, in the API and in VM files."""

    QEMU_ENDED = "qemu-ended"  # the kernel says so, by the pidfd
    GUEST_PANICKED = "guest-panicked"  # QEMU's event of the panic device
    GUEST_WATCHDOG = "guest-watchdog"  # QEMU's event of the watchdog that the guest did not feed
    HOST_BOOTED = "host-booted"  # the other host has: its QEMU ended with that host
    OPERATOR = "operator"  # a person says so

    @property
    def of_guest(self) -> bool:
        """Whether only the guest is dead, and not its QEMU."""
        return self in (Death.GUEST_PANICKED, Death.GUEST_WATCHDOG)


class Trouble(Enum):
    """What explains a silence without the VM's death."""

    DISK = "disk"  # a disk of the VM completes nothing
    STORE = "store"  # the store does not answer
    PAUSED = "paused"  # the guest is paused
    WORK = "work"  # work of many steps goes on with the VM


EXPLAINED_BY = {
    Sign.MONITOR: frozenset({Trouble.DISK, Trouble.WORK}),
    Sign.SERVICE: frozenset({Trouble.DISK, Trouble.PAUSED, Trouble.WORK}),
    Sign.HOST: frozenset({Trouble.STORE}),
}


# Observations. `at` is when it was seen.


@dataclass(frozen=True)
class Looked:
    """The agent looked around; it meant to do so at `due`."""

    at: float
    due: float


@dataclass(frozen=True)
class Heard:
    """A sign of life."""

    at: float
    sign: Sign


@dataclass(frozen=True)
class Silent:
    """A sign of life did not come by its deadline; `asked` is when it was asked for."""

    at: float
    sign: Sign
    asked: float
    why: str = ""


@dataclass(frozen=True)
class Troubled:
    """From now on silence has another cause."""

    at: float
    trouble: Trouble
    why: str = ""


@dataclass(frozen=True)
class Mended:
    """That cause is gone."""

    at: float
    trouble: Trouble


@dataclass(frozen=True)
class Died:
    """A proof of death. `detail` is the evidence in words: a signal, a panic's text, a name."""

    at: float
    death: Death
    detail: str = ""


@dataclass(frozen=True)
class Finished:
    """The VM was ended on purpose, by its owner or by its guest."""

    at: float
    why: str


@dataclass(frozen=True)
class Began:
    """The VM begins anew: another QEMU, or a guest that was reset. What was seen before is past."""

    at: float


Observation = Looked | Heard | Silent | Troubled | Mended | Died | Finished | Began


@dataclass(frozen=True)
class Silence:
    """A sign of life that is missing. `counted_s` is how much of it was watched on time."""

    sign: Sign
    since: float
    counted_s: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Standing:
    """A trouble that stands."""

    trouble: Trouble
    since: float
    why: str = ""


@dataclass(frozen=True)
class Past:
    """A trouble that stood until then."""

    trouble: Trouble
    until: float


@dataclass(frozen=True)
class LastHeard:
    """When a sign of life was heard last."""

    sign: Sign
    at: float


@dataclass(frozen=True)
class Evidence:
    """All that is known. `looked` is the agent's last look, and `punctual_since` that from which on
    no look was late; both None before the first. `begun` is when the VM began anew.
    """

    looked: float | None = None
    punctual_since: float | None = None
    begun: float | None = None
    heard: tuple[LastHeard, ...] = ()
    silences: tuple[Silence, ...] = ()
    troubles: tuple[Standing, ...] = ()
    past: tuple[Past, ...] = ()
    death: Died | None = None
    finished: str = ""

    def last_heard(self, sign: Sign) -> float | None:
        """When that sign of life was heard last."""
        return next((one.at for one in self.heard if one.sign is sign), None)

    def explained(self, sign: Sign) -> str:
        """What explains the silence of that sign; "" when nothing does."""
        standing = (one for one in self.troubles if one.trouble in EXPLAINED_BY[sign])
        return next((one.why or one.trouble.value for one in standing), "")


NOTHING_SEEN = Evidence()


def note(evidence: Evidence, seen: Observation) -> Evidence:
    """The evidence with one more observation."""
    match seen:
        case Looked():
            return _looked(evidence, seen)
        case Heard(at, sign):
            return _heard(evidence, at, sign)
        case Silent():
            return _silent(evidence, seen)
        case Troubled(at, trouble, why):
            others = tuple(one for one in evidence.troubles if one.trouble is not trouble)
            standing = (*others, Standing(trouble, at, why))
            unexplained = tuple(
                one for one in evidence.silences if trouble not in EXPLAINED_BY[one.sign]
            )
            return replace(evidence, troubles=standing, silences=unexplained)
        case Mended(at, trouble):
            left = tuple(one for one in evidence.troubles if one.trouble is not trouble)
            if left == evidence.troubles:
                return evidence  # it did not stand
            past = tuple(one for one in evidence.past if one.trouble is not trouble)
            return replace(evidence, troubles=left, past=(*past, Past(trouble, at)))
        case Died():
            return evidence if evidence.finished else _died(evidence, seen)
        case Finished(_, why):
            return replace(evidence, finished=why, death=None)
        case Began(at):
            return Evidence(
                looked=evidence.looked,
                punctual_since=evidence.punctual_since,
                begun=at,
                troubles=evidence.troubles,
                past=evidence.past,
            )
        case _:
            assert_never(seen)


def _looked(evidence: Evidence, look: Looked) -> Evidence:
    gap_s = 0.0 if evidence.looked is None else look.at - evidence.looked
    on_time = 0 <= look.at - look.due <= LATE_S and 0 <= gap_s <= LOOK_S + LATE_S
    if evidence.punctual_since is None or not on_time:
        return replace(evidence, looked=look.at, punctual_since=look.at, silences=())
    longer = tuple(replace(one, counted_s=look.at - one.since) for one in evidence.silences)
    return replace(evidence, looked=look.at, silences=longer)


def _heard(evidence: Evidence, at: float, sign: Sign) -> Evidence:
    others = tuple(one for one in evidence.heard if one.sign is not sign)
    silences = tuple(one for one in evidence.silences if one.sign is not sign)
    death = evidence.death
    if death is not None and death.death.of_guest and sign is Sign.SERVICE and at > death.at:
        death = None  # whoever answers is not dead, whatever QEMU was told
    return replace(evidence, heard=(*others, LastHeard(sign, at)), silences=silences, death=death)


def _silent(evidence: Evidence, seen: Silent) -> Evidence:
    """A question that was asked too early has been left unanswered for another reason."""
    known = any(one.sign is seen.sign for one in evidence.silences)
    late = evidence.punctual_since is None or seen.asked < evidence.punctual_since
    former = evidence.begun is not None and seen.asked < evidence.begun
    explained = evidence.explained(seen.sign) or any(
        seen.asked < one.until for one in evidence.past if one.trouble in EXPLAINED_BY[seen.sign]
    )
    heard = evidence.last_heard(seen.sign)
    answered = heard is not None and heard >= seen.asked
    if known or late or former or explained or answered:
        return evidence
    silence = Silence(seen.sign, seen.at, why=seen.why)
    return replace(evidence, silences=(*evidence.silences, silence))


def _died(evidence: Evidence, seen: Died) -> Evidence:
    """The first proof counts, but the end of QEMU and an operator's word more than the guest's."""
    known = evidence.death
    if known is not None and not (known.death.of_guest and not seen.death.of_guest):
        return evidence
    return replace(evidence, death=seen)


# Verdicts


@dataclass(frozen=True)
class Alive:
    """A sign of life was heard lately, and none is missing."""

    heard: float
    kind: Literal["alive"] = "alive"


@dataclass(frozen=True)
class Suspected:
    """Signs of life are missing; `since` is the earliest. `serving`: its service answers."""

    since: float
    silences: tuple[Silence, ...]
    serving: bool = False
    kind: Literal["suspected"] = "suspected"


@dataclass(frozen=True)
class Dead:
    """A proof of death."""

    proof: Died
    kind: Literal["dead"] = "dead"


@dataclass(frozen=True)
class Over:
    """It was ended on purpose."""

    why: str
    kind: Literal["over"] = "over"


@dataclass(frozen=True)
class Unknown:
    """Nothing can be said, and why."""

    why: str
    kind: Literal["unknown"] = "unknown"


Verdict = Annotated[Alive | Suspected | Dead | Over | Unknown, Field(discriminator="kind")]


def judge(evidence: Evidence, now: float) -> Verdict:
    """What the first VM is, by that evidence, at that time."""
    if evidence.finished:
        return Over(evidence.finished)
    if evidence.death is not None:
        busy = next((one for one in evidence.troubles if one.trouble is Trouble.WORK), None)
        if busy is not None:  # a restart or a move ends a QEMU on purpose, and says what it became
            return Unknown(f"{busy.why or 'work'} goes on with it, which settles what it is")
        return Dead(evidence.death)
    late = _agent_is_late(evidence, now)
    fresh = [one.at for one in evidence.heard if 0 <= now - one.at <= FRESH_S]
    if evidence.silences and not late:
        served = evidence.last_heard(Sign.SERVICE)
        serving = served is not None and 0 <= now - served <= FRESH_S
        since = min(one.since for one in evidence.silences)
        return Suspected(since, evidence.silences, serving)
    if fresh and not evidence.silences:
        return Alive(max(fresh))
    if late:
        return Unknown(late)
    if evidence.troubles:
        cause = evidence.troubles[0].why or evidence.troubles[0].trouble.value
        return Unknown(f"nothing is heard of it, which has a cause: {cause}")
    return Unknown("nothing was heard of it yet, and nothing was asked in vain")


def _agent_is_late(evidence: Evidence, now: float) -> str:
    """Why the agent's own lateness forbids a suspicion; "" when it was on time."""
    if evidence.looked is None or evidence.punctual_since is None:
        return "the agent has not looked yet"
    gap_s = now - evidence.looked
    if not 0 <= gap_s <= LOOK_S + LATE_S:
        return f"the agent itself was late: its last look was {gap_s:.1f} s ago"
    settled_s = now - evidence.punctual_since
    if settled_s < SETTLE_S:
        return f"the agent itself was late, and has been on time again for {settled_s:.1f} s only"
    return ""
