"""The story that `semper demo` tells: what happens, in which order."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Act:
    """Something that was done to the guest. `at_ns` is CLOCK_MONOTONIC."""

    kind: str
    at_ns: int
    stall_ms: float | None


async def play(trial: Trial, story: Story, done: Callable[[Act], None]) -> list[Act]:
    """Carries the story out in random order; `done` is told after each act."""
    chance = random.Random(story.seed)
    kinds = ["kill"] * story.kills + ["pause"] * story.pauses + ["upgrade"] * story.upgrades
    chance.shuffle(kinds)
    acts: list[Act] = []
    await asyncio.sleep(0.5)
    for kind in kinds:
        await asyncio.sleep(chance.uniform(0.1, 0.6))
        acts.append(await _perform(trial, kind))
        done(acts[-1])
    await asyncio.sleep(0.5)
    return acts


async def _perform(trial: Trial, kind: str) -> Act:
    if kind == "pause":
        paused_ns = await trial.stop_and_continue(pause_s=0.1)
        return Act(kind, paused_ns, None)
    stall = await (trial.kill_backend() if kind == "kill" else trial.upgrade())
    return Act(kind, stall.at_ns, stall.ms)
