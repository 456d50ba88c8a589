"""Steps a real driver from any state, with ports whose outcomes a test chooses.

A driver (`host.owner.Owner`) keeps nothing but its state, and the work of an effect depends on the
effect alone. So work that waits for a port can be taken up in another world: it is run anew, the
outcomes that it has had are given to it again, and then the next one. Coroutines need no copy.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from sempervirt.core.errors import OutcomeUnknown, SempervirtError, Unavailable
from sempervirt.store.registry import StaleClaim

ERRORS: dict[str, type[SempervirtError]] = {
    "failed": Unavailable,
    "unknown": OutcomeUnknown,
    "stale": StaleClaim,
}


@dataclass(frozen=True)
class Outcome:
    """Of one call of a port: a value, or the kind of error that the call raises."""

    value: Any = None
    error: str = ""


@dataclass(frozen=True)
class Pending:
    """Work that waits for the port's call `waits`, after the outcomes that it has had."""

    effect: Any
    waits: str
    had: tuple[Outcome, ...] = ()


class Waiting(BaseException):
    """A port is called, and its outcome was not chosen yet."""

    def __init__(self, call: str) -> None:
        super().__init__(call)
        self.call = call


class Script:
    """The outcomes that ports give, in order; then whoever calls has to wait."""

    def __init__(self, outcomes: Sequence[Outcome] = ()) -> None:
        self._left = list(outcomes)

    def answer(self, call: str) -> Any:
        """The next outcome. Raises Waiting when there is none."""
        if not self._left:
            raise Waiting(call)
        outcome = self._left.pop(0)
        if outcome.error:
            raise ERRORS[outcome.error](outcome.error)
        return outcome.value


class Stopped:
    """A clock that stands at `time`."""

    def __init__(self, time: float = 0.0) -> None:
        self.time = time

    def now(self) -> float:
        """The time."""
        return self.time

    def call_at(self, _when: float, _call: object) -> Stopped:
        """Time passes only as an event."""
        return self

    def cancel(self) -> None:
        """Nothing would come."""

    async def sleep(self, _seconds: float) -> None:
        """No time passes."""


def run_until_it_waits(work: Coroutine[Any, Any, None]) -> str:
    """Runs work; gives the call that it waits for, "" when it has ended."""
    try:
        work.send(None)
    except StopIteration:
        return ""
    except Waiting as waiting:
        return waiting.call
    raise AssertionError("work waits for something that is no port")
