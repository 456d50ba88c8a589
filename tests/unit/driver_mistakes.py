"""Mistakes of a driver: an act dropped, done or told twice, told and not done, not on record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Mutation = Callable[[Any], None]


def drops(kind: type) -> Mutation:
    """An effect is not carried out."""

    def mutate(driver: Any) -> None:
        real = driver.carry_out
        driver.carry_out = lambda effect: None if isinstance(effect, kind) else real(effect)

    return mutate


def repeats(kind: type) -> Mutation:
    """An effect is carried out twice."""

    def mutate(driver: Any) -> None:
        real = driver.carry_out

        def carry_out(effect: Any) -> None:
            real(effect)
            if isinstance(effect, kind):
                real(effect)

        driver.carry_out = carry_out

    return mutate


def tells_twice(kind: type) -> Mutation:
    """An event is posted twice."""

    def mutate(driver: Any) -> None:
        real = driver.post

        def post(event: Any) -> None:
            real(event)
            if isinstance(event, kind):
                real(event)

        driver.post = post

    return mutate


def pretends(kind: type, event: Any, by: str = "perform") -> Mutation:
    """An effect is told as done, and is not done. `by` is the driver's function that does it."""

    def mutate(driver: Any) -> None:
        real = getattr(driver, by)

        async def perform(effect: Any) -> Any:
            return event if isinstance(effect, kind) else await real(effect)

        setattr(driver, by, perform)

    return mutate


def swallows(kind: type, event: Any) -> Mutation:
    """An effect is told as done, whatever came of it."""

    def mutate(driver: Any) -> None:
        real = driver.failed
        driver.failed = lambda effect, failure: (
            event if isinstance(effect, kind) else real(effect, failure)
        )

    return mutate


def forgets_record(*steps: Any) -> Mutation:
    """A step is taken that is not on record."""

    def mutate(driver: Any) -> None:
        real = driver.record
        driver.record = lambda before, after: after.step in steps or real(before, after)

    return mutate


def ignores_a_full_disk(driver: Any) -> None:
    """Whether a step is on record is not looked at."""
    real = driver.record
    driver.record = lambda *states: real(*states) or True
