"""The guest's heartbeat, as both hosts hear it: how long it stood still.

Two measures. The *gap* is between the last beat that the one host heard and the first of the
other. The *jump* is by how much the guest's own clock lags behind afterwards: exactly the
time for which its processor was stopped, as the guest could see it if it had another clock to look
at. The gap is longer: an emulator that has just begun to run a guest translates its code anew.

An emulated guest measures the rate of its time stamp counter once, while it boots, and holds it for
reliable (`tsc=reliable`, without which its clock is measured all the time). On a busy host that may
be mistaken by far: at a load average of 20 on two processors guests took 2,596 MHz for 240 and for
113, and their clocks went 11 and 23 times too fast. So the jump is judged by the beats next to the
move, and by the pace that the clock had before.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.migration.waiting import until
from sempervirt.core.errors import Unavailable
from sempervirt.guest import ProbeClient

BEAT_MS = 5
# Of the beats so close to the move the quickest counts.
NEAR_NS = 10**9
# A clock whose pace is known no better than this, or for less long, is held for a true one.
PACE_KNOWN, PACE_NS = 0.02, 2 * 10**9
LISTEN_S = 600.0


@dataclass(frozen=True, order=True)
class Beat:
    """One, in nanoseconds of the host's and of the guest's monotonic clock."""

    host_ns: int
    guest_ns: int

    def lag(self, pace: float) -> float:
        """How far the guest's clock, of that pace, is behind, and how long the beat was on its way.
        In nanoseconds of the host.
        """
        return self.host_ns - self.guest_ns / pace


def gap_ms(before: Iterable[Beat], after: Iterable[Beat]) -> float:
    """From the last beat on the one host to the first on the other."""
    return (min(after).host_ns - max(before).host_ns) / 1e6


def jump_ms(before: Sequence[Beat], after: Sequence[Beat]) -> float:
    """By how much the clock lags more; the quickest beat of each side counts."""
    pace, last, first = pace_of(before), max(before).host_ns, min(after).host_ns
    earlier = min(beat.lag(pace) for beat in before if beat.host_ns > last - NEAR_NS)
    later = min(beat.lag(pace) for beat in after if beat.host_ns < first + NEAR_NS)
    return (later - earlier) / 1e6


def pace_of(beats: Sequence[Beat]) -> float:
    """How fast the guest's clock goes, seen from the host: between the quickest beats of the first
    and the last quarter of them. 1.0 for one that is not seen to be wrong.
    """
    quarter = len(beats) // 4
    if not quarter:
        return 1.0
    ordered = sorted(beats)
    parts = (ordered[:quarter], ordered[-quarter:])
    first, last = (min(part, key=lambda beat: beat.lag(1.0)) for part in parts)
    passed_ns = last.host_ns - first.host_ns
    if passed_ns < PACE_NS:
        return 1.0
    pace = (last.guest_ns - first.guest_ns) / passed_ns
    return pace if abs(pace - 1.0) > PACE_KNOWN else 1.0


@dataclass
class Instants:
    """When a monitor told of an event; for `Monitor.follow`."""

    name: str
    seen_ns: list[int] = field(default_factory=list)

    def __call__(self, name: str, _data: Mapping[str, Any]) -> None:
        if name == self.name:
            self.seen_ns.append(time.monotonic_ns())


def steps_ms(
    before: Iterable[Beat], stops_ns: list[int], runs_ns: list[int], after: Iterable[Beat]
) -> dict[str, float]:
    """Of what a gap consists, as far as the monitors told of it."""
    if not stops_ns or not runs_ns:
        return {}
    instants = (max(before).host_ns, stops_ns[-1], runs_ns[-1], min(after).host_ns)
    names = ("beat to stop", "stop to run", "run to beat")
    pairs = zip(names, itertools.pairwise(instants), strict=True)
    return {name: (until - since) / 1e6 for name, (since, until) in pairs}


@dataclass
class Pulse:
    """The beats that one host has heard."""

    beats: list[Beat] = field(default_factory=list)
    probe: ProbeClient | None = None

    @classmethod
    @asynccontextmanager
    async def felt(cls, path: Path) -> AsyncIterator["Pulse"]:
        """Listen at the host's end of a channel from when it appears, until the block is left."""
        pulse = cls()
        task = asyncio.create_task(pulse._listen(path))
        try:
            yield pulse
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if pulse.probe is not None:
                await pulse.probe.close()

    async def _listen(self, path: Path) -> None:
        try:
            self.probe = await ProbeClient.connect(path, deadline_s=LISTEN_S)
        except Unavailable:
            return
        async for event in self.probe.events():
            if event.name == "beat":
                self.beats.append(Beat(event.received_ns, int(event.members["monotonic_ns"])))

    async def beating(self, count: int, deadline_s: float) -> ProbeClient:
        """The probe, once so many beats more were heard. Raises MoveError."""
        wanted = len(self.beats) + count
        await until(lambda: len(self.beats) >= wanted, f"{count} heartbeats", deadline_s)
        return await self.connected(deadline_s)

    async def connected(self, deadline_s: float) -> ProbeClient:
        """The probe, once its channel is there. Raises MoveError."""
        await until(lambda: self.probe is not None, "the probe's channel", deadline_s)
        assert self.probe is not None
        return self.probe
