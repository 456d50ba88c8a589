"""How hard QEMU is pushed: carries out what `convergence` decides, and has QEMU reckon with what
the link carries, as the wire has seen it.
"""

from __future__ import annotations

from dataclasses import replace

from sempervirt.migration import stream
from sempervirt.migration.source import convergence
from sempervirt.migration.source.convergence import (
    ConvergencePolicy,
    Decision,
    GiveUp,
    GoPostcopy,
    RaiseLimit,
    Sample,
    Throttle,
    Track,
)

# Between two reports of QEMU.
LOOK_S = 0.1
# QEMU is told of a bandwidth that differs by more than this part.
BANDWIDTH_PART = 0.05


class Steering:
    """Of one migration, from its first pass to its switchover."""

    def __init__(self, policy: ConvergencePolicy | None = None) -> None:
        self.policy = policy or ConvergencePolicy()
        self.track: Track = convergence.begin(self.policy)
        self._bandwidth = stream.UNKNOWN_BANDWIDTH

    def reckoned(self, sample: Sample) -> Sample:
        """What QEMU reports, with the bandwidth of the link."""
        return replace(sample, bandwidth=self._bandwidth)

    async def begin(self, execute: stream.Execute) -> None:
        """What QEMU is told before it sends. Raises as `execute`."""
        await stream.limit_blackout(execute, self.track.limit_s)
        await stream.reckon(execute, self._bandwidth)

    async def steer(self, execute: stream.Execute, sample: Sample, seen: int | None) -> Decision:
        """Acts upon a report of QEMU; gives what was decided. `seen` is what the wire has seen the
        link carry, in bytes per second, None before that is known.

        Postcopy and giving up are left to the caller. Raises as `execute`.
        """
        if seen is not None and abs(seen - self._bandwidth) > self._bandwidth * BANDWIDTH_PART:
            self._bandwidth = float(seen)
            await stream.reckon(execute, self._bandwidth)
        self.track, decision = convergence.decide(self.track, self.reckoned(sample), self.policy)
        match decision:
            case RaiseLimit(blackout_s):
                await stream.limit_blackout(execute, blackout_s)
            case Throttle(percent):
                await stream.throttle(execute, percent)
            case GoPostcopy() | GiveUp() | None:
                pass
        return decision
