"""How hard to push a migration, and when to give up: pure.

QEMU sends memory in passes; each pass sends what the guest dirtied during the one before. The
guest's blackout would last for what remains, divided by the bandwidth: its *expected blackout*.
While that falls, there is nothing to decide. QEMU stops the guest as soon as the rest fits into
its limit, although one more short pass would often leave next to nothing. So the limit begins as a
part of what the policy allows (`HOPE`), and is the whole of it once `HOPE_PASSES` passes brought no
progress. A migration is *stalled* when then, for `stall_passes` passes, the best expected blackout
has not fallen by a tenth. Then, in this order:

1. the limit on the blackout is raised to what is expected, if the policy's bound allows that;
2. the guest's processors are throttled, in steps (auto-converge), if the policy allows it;
3. postcopy, if the policy allows it;
4. it goes on to the deadline, and the VM stays where it is.

At the deadline 1 and 3 are tried once more before it is given up: neither needs any more time.
The bound on the blackout is never exceeded by a decision made here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# What counts as progress of the expected blackout.
PROGRESS = 0.9
HOPE = 0.25
HOPE_PASSES = 2


@dataclass(frozen=True)
class ConvergencePolicy:
    """What the VM's owner allows. Times in seconds, throttling in percent of a processor."""

    blackout_s: float = 0.3
    blackout_max_s: float = 2.0
    deadline_s: float = 600.0
    stall_passes: int = 3
    throttle_max: int = 80
    throttle_first: int = 20
    throttle_step: int = 15
    postcopy: bool = False


@dataclass(frozen=True)
class Sample:
    """What QEMU reports (query-migrate). `passes` counts from 1; `elapsed_s` since the start."""

    elapsed_s: float
    passes: int
    remaining_bytes: int
    bandwidth: float  # bytes/s, on the wire's side of what it saves
    dirtied: float  # bytes/s


@dataclass(frozen=True)
class Track:
    """What is remembered between samples."""

    limit_s: float
    best_s: float = float("inf")
    best_pass: int = 0
    throttle: int = 0
    stalled: bool = False


@dataclass(frozen=True)
class RaiseLimit:
    """Let the guest's blackout last so long."""

    blackout_s: float


@dataclass(frozen=True)
class Throttle:
    """Take that part of the time from the guest's processors."""

    percent: int


@dataclass(frozen=True)
class GoPostcopy:
    """Let the guest run there before its memory is."""


@dataclass(frozen=True)
class GiveUp:
    """The VM stays where it is."""

    reason: str


Decision = RaiseLimit | Throttle | GoPostcopy | GiveUp | None


def begin(policy: ConvergencePolicy) -> Track:
    """Nothing was seen yet."""
    return Track(limit_s=_whole(policy) * HOPE)


def _whole(policy: ConvergencePolicy) -> float:
    """What is meant for the guest, within the bound."""
    return min(policy.blackout_s, policy.blackout_max_s)


def expected_blackout_s(sample: Sample) -> float:
    """How long the guest would stand still if it were stopped now."""
    if sample.bandwidth <= 0:
        return 0.0 if sample.remaining_bytes == 0 else float("inf")
    return sample.remaining_bytes / sample.bandwidth


def decide(track: Track, sample: Sample, policy: ConvergencePolicy) -> tuple[Track, Decision]:
    """What a sample leads to; None: QEMU goes on as it is."""
    expected_s = expected_blackout_s(sample)
    if expected_s <= track.limit_s:
        return track, None  # QEMU stops the guest by itself
    late = sample.elapsed_s >= policy.deadline_s
    whole_s = _whole(policy)
    hopes = track.limit_s < whole_s
    track = _observe(track, sample, expected_s, HOPE_PASSES if hopes else policy.stall_passes)
    if hopes and (expected_s <= whole_s if late else track.stalled):
        return replace(_anew(track, sample), limit_s=whole_s), RaiseLimit(whole_s)
    if not track.stalled and not late:
        return track, None
    # A pass ends some time after this sample: a little more than expected.
    wanted_s = expected_s * 1.2
    if wanted_s <= policy.blackout_max_s:
        return replace(_anew(track, sample), limit_s=wanted_s), RaiseLimit(wanted_s)
    if not late and policy.throttle_max and track.throttle < policy.throttle_max:
        step = policy.throttle_step if track.throttle else policy.throttle_first
        percent = min(track.throttle + step, policy.throttle_max)
        return replace(_anew(track, sample), throttle=percent), Throttle(percent)
    if policy.postcopy:
        return _anew(track, sample), GoPostcopy()
    if late:
        return track, GiveUp(
            f"it did not converge in {policy.deadline_s:g} s: the guest dirties "
            f"{sample.dirtied / 1e6:.0f} MB/s, and {sample.bandwidth / 1e6:.0f} MB/s are sent"
        )
    return track, None


def _observe(track: Track, sample: Sample, expected_s: float, patience: int) -> Track:
    if expected_s < track.best_s * PROGRESS:
        return replace(track, best_s=expected_s, best_pass=sample.passes, stalled=False)
    return replace(track, stalled=sample.passes - track.best_pass >= patience)


def _anew(track: Track, sample: Sample) -> Track:
    """A decision is given as many passes to work as a migration has before it is stalled."""
    return replace(track, best_pass=sample.passes, stalled=False)
