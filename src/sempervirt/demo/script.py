"""The story that `semper demo` tells: what happens, in which order."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from sempervirt.demo.trial import Trial


@dataclass(frozen=True)
class Story:
    """How often each thing happens."""

    kills: int = 20
    pauses: int = 5
    upgrades: int = 1
    seed: int | None = None

    @property
    def length(self) -> int:
        """Number of acts."""
        return self.kills + self.pauses + self.upgrades


class Deed(Enum):
    """What can be done to the guest."""

    KILL = "kill"
    PAUSE = "pause"
    UPGRADE = "upgrade"


@dataclass(frozen=True)
class Act:
    """Something that was done to the guest. `at_ns` is CLOCK_MONOTONIC; `stall_ms` None: no stall
    was measured.
    """

    deed: Deed
    at_ns: int
    stall_ms: float | None


async def play(trial: Trial, story: Story, done: Callable[[Act], None]) -> list[Act]:
    """Carries the story out in random order; `done` is told after each act."""
    chance = random.Random(story.seed)
    deeds = (
        [Deed.KILL] * story.kills + [Deed.PAUSE] * story.pauses + [Deed.UPGRADE] * story.upgrades
    )
    chance.shuffle(deeds)
    acts: list[Act] = []
    await asyncio.sleep(0.5)
    for deed in deeds:
        await asyncio.sleep(pauses_s(chance))
        acts.append(await _perform(trial, deed))
        done(acts[-1])
    await asyncio.sleep(0.5)
    return acts


def pauses_s(chance: random.Random) -> float:
    """How long the load goes on undisturbed before the next act."""
    return chance.uniform(0.1, 0.6)


async def _perform(trial: Trial, deed: Deed) -> Act:
    match deed:
        case Deed.PAUSE:
            return Act(deed, await trial.stop_and_continue(pause_s=0.1), None)
        case Deed.KILL:
            stall = await trial.kill_backend()
        case Deed.UPGRADE:
            stall = await trial.upgrade()
        case _:
            assert_never(deed)
    return Act(deed, stall.at_ns, stall.ms)
