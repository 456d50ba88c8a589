"""Errors, each named by its remedy.

    SempervirtError
    ├── InvalidRequest         the request is wrong: change it
    │   └── SpecError          … a key of a VM file: file, line and key are given
    ├── NotAllowed             the one who asks may not do that: ask as one who may
    ├── NotFound               nothing has that name: list, then choose
    ├── StateConflict          a right request at the wrong moment: change the state first
    │   └── ImageLocked        … another program holds the image: the holder is named
    ├── Unavailable            known *not* done: safe to try again
    │   ├── AgentUnavailable   … no agent answers: start one
    │   └── CommandFailed      … a subprocess failed: command, exit code, last lines of output
    ├── OutcomeUnknown         perhaps done: ask again, or fence; never repeat blindly
    ├── RollbackFailed         undoing failed too: the state that is left is described
    └── StateLost              something is gone for good: begin again from what is left

A caller that only looks at the branches knows what may be done next. `KINDS` is the one table
from an error to its name on the wire, its exit code and its HTTP status. Exit codes: 0 done;
128 + N ended by signal N; 3 is left to `semper-blkd`, which says by it that an image is in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class SempervirtError(Exception):
    """An operation did not end as asked.

    `message` says what happened and why; `remedy` what the reader can do, as an imperative.
    """

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


def reason(error: Exception) -> str:
    """What `error` says, in words also where one of Python's own says nothing."""
    if said := str(error):
        return said
    return "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__


class InvalidRequest(SempervirtError):
    """The request can never succeed. Nothing was done."""

    @classmethod
    def of(cls, error: ValueError, what: str = "") -> InvalidRequest:
        """For a value that was refused; what stands behind the last ";" of that is the remedy."""
        message, _, remedy = str(error).rpartition("; ")
        return cls(f"{what}{message or remedy}", remedy=remedy if message else "")


class SpecError(InvalidRequest):
    """A key of a VM file is wrong. `line` is 1-based, 0 when it cannot be told."""

    def __init__(
        self, message: str, *, file: Path, line: int = 0, key: str = "", remedy: str = ""
    ) -> None:
        place = f"{file}:{line}" if line else f"{file}"
        super().__init__(
            f"{place}: {key}: {message}" if key else f"{place}: {message}", remedy=remedy
        )
        self.file = file
        self.line = line
        self.key = key


class NotAllowed(SempervirtError):
    """The one who asks may not do that. Nothing was done."""


class NotFound(SempervirtError):
    """Nothing has that name."""


class StateConflict(SempervirtError):
    """The request is right, and the present state forbids it. Nothing was done."""


class ImageLocked(StateConflict):
    """Another program holds the image's lock; the message names it. Nothing was done."""


class Unavailable(SempervirtError):
    """Known not done. The same request may be sent again."""


class AgentUnavailable(Unavailable):
    """No agent answers on the socket of this user."""


class CommandFailed(Unavailable):
    """A subprocess ended with an error, or did not end by the deadline (`exit_code` None).

    `command` can be pasted into a shell; `tail` are the last lines of its output.
    """

    def __init__(
        self, command: str, exit_code: int | None, tail: list[str], *, remedy: str = ""
    ) -> None:
        how = "did not end by its deadline" if exit_code is None else f"exit code {exit_code}"
        last = f": {tail[-1]}" if tail else ""
        super().__init__(f"`{command}`: {how}{last}", remedy=remedy)
        self.command = command
        self.exit_code = exit_code
        self.tail = tail


class OutcomeUnknown(SempervirtError):
    """The request may or may not have been carried out. Ask again, or fence."""


class RollbackFailed(SempervirtError):
    """The request failed and could not be undone; `message` says what is left."""


class StateLost(SempervirtError):
    """Something is gone and cannot be had back: nobody can have it back, and nothing of it runs.

    `message` says what is gone, `remedy` how to begin again from what is left.
    """


@dataclass(frozen=True)
class Kind:
    """The name of an error on the wire, and the numbers by which the error leaves a process."""

    error: type[SempervirtError]
    name: str
    exit_code: int
    http_status: int


# The most derived class first: the first match in this order is the kind of an error.
KINDS: tuple[Kind, ...] = (
    Kind(SpecError, "spec", 2, 422),
    Kind(InvalidRequest, "invalid", 2, 422),
    Kind(NotAllowed, "not-allowed", 9, 403),
    Kind(NotFound, "not-found", 4, 404),
    Kind(ImageLocked, "image-locked", 5, 423),
    Kind(StateConflict, "conflict", 5, 409),
    Kind(AgentUnavailable, "no-agent", 6, 503),
    Kind(CommandFailed, "command-failed", 6, 503),
    Kind(Unavailable, "unavailable", 6, 503),
    Kind(OutcomeUnknown, "outcome-unknown", 7, 504),
    Kind(RollbackFailed, "rollback-failed", 8, 500),
    Kind(StateLost, "lost", 10, 410),
    Kind(SempervirtError, "failed", 1, 500),
)


def kind_of(error: SempervirtError) -> Kind:
    """The row of `KINDS` that fits `error` best."""
    return next(kind for kind in KINDS if isinstance(error, kind.error))


def from_wire(name: str, message: str, remedy: str) -> SempervirtError:
    """The error that a peer named; an unknown name gives the root of the tree.

    `SpecError` and `CommandFailed` come back as their parents: what they add has already
    been put into the message.
    """
    error = next((kind.error for kind in KINDS if kind.name == name), SempervirtError)
    if error is SpecError:
        error = InvalidRequest
    elif error is CommandFailed:
        error = Unavailable
    return error(message, remedy=remedy)
