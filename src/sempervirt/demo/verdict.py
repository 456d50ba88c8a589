"""What a trial showed, and whether anything was lost: pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sempervirt.demo.stall import Cause, Spread, Stall, step_spreads
from sempervirt.guest.reports import Stats

# What a Linux guest logs when its disk lost or mixed up a request.
FATAL_LINES = ("is not a head", "I/O error", "blocked for more than")


@dataclass
class Verdict:
    """Counts over one trial. `clean` is the whole point."""

    kills: int = 0
    hangs: int = 0
    upgrades: int = 0
    pauses: int = 0
    reboots: int = 0
    resets: int = 0
    rebindings: int = 0
    writes: int = 0
    reads: int = 0
    verified: int = 0
    guest_errors: int = 0
    hung: int = 0
    wrong: int = 0
    unverified: int = 0
    kernel_lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Nothing lost, nothing hung, nothing wrong, and enough done to be able to tell."""
        return not (
            self.guest_errors
            or self.hung
            or self.wrong
            or self.unverified
            or self.kernel_lines
            or self.problems
        ) and (self.verified > 0)

    @property
    def lost(self) -> bool:
        """The guest saw a request fail, hang or go wrong; a trial that broke off proves nothing."""
        return bool(self.guest_errors or self.hung or self.wrong or self.kernel_lines)

    @property
    def stall(self) -> Spread:
        """Of the kills whose stall is known, in milliseconds."""
        return self.stall_of(Cause.KILL)

    def stall_of(self, cause: Cause) -> Spread:
        """Of the take-overs for this reason whose stall is known, in milliseconds."""
        return Spread.of([s.ms for s in self.stalls if s.cause is cause and s.ms is not None])

    @property
    def back(self) -> Spread:
        """Milliseconds from a kill until nine tenths of the throughput were back; of those that
        were seen.
        """
        kills = [s.back_ms for s in self.stalls if s.cause is Cause.KILL]
        return Spread.of([ms for ms in kills if ms is not None])

    @property
    def steps(self) -> dict[str, Spread]:
        """Milliseconds from a kill to each step of the take-over."""
        return step_spreads([s for s in self.stalls if s.cause is Cause.KILL])

    @property
    def kept(self) -> int:
        """Take-overs by which QEMU's connection went on."""
        return sum(stall.kept for stall in self.stalls)

    @property
    def replayed(self) -> int:
        """Requests that were done again."""
        return sum(stall.replayed for stall in self.stalls)

    @property
    def kills_in_flight(self) -> int:
        """Kills that fell on requests in flight, so that some were done again."""
        return sum(s.replayed > 0 for s in self.stalls if s.cause is Cause.KILL)

    def add(self, stats: Stats) -> None:
        """Takes a stopped run of the writers into account."""
        self.writes += stats.writes
        self.reads += stats.reads
        self.verified += stats.verified
        self.guest_errors += stats.io_error_count
        self.hung += stats.hung
        self.wrong += stats.wrong.total
        final = stats.verified_final
        if final is None or not final.complete:
            self.unverified += 1
        else:
            self.verified += final.blocks
        self.kernel_lines += [
            f"{error.count}× {error.last}"
            for error in stats.kernel_errors
            if any(line in error.pattern or line in error.last for line in FATAL_LINES)
        ]
        self.problems += [
            f"{w.kind} block {w.block} at {w.offset}: acknowledged {w.acked}, found {w.found}"
            for w in stats.wrong_details
        ]
        self.problems += [
            f"{error.op} of block {error.block} failed with errno {error.errno}"
            for error in stats.io_errors
        ]

    def merge(self, other: Verdict) -> None:
        """Adds another trial's counts."""
        for name in ("kills", "hangs", "upgrades", "pauses", "reboots", "resets", "rebindings"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("writes", "reads", "verified", "guest_errors", "hung", "wrong", "unverified"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.kernel_lines += other.kernel_lines
        self.problems += other.problems
        self.stalls += other.stalls

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all counts, the spreads, and each stall."""
        plain = asdict(self)
        plain["stalls"] = [asdict(stall) | {"cause": stall.cause.value} for stall in self.stalls]
        plain["clean"] = self.clean
        plain["replayed"] = self.replayed
        plain["kept"] = self.kept
        plain["kills_in_flight"] = self.kills_in_flight
        plain["stall_ms"] = asdict(self.stall)
        plain["hang_ms"] = asdict(self.stall_of(Cause.HANG))
        plain["back_ms"] = asdict(self.back)
        plain["steps_ms"] = {step: asdict(spread) for step, spread in self.steps.items()}
        return plain
