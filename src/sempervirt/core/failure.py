"""Why something was not done, as a value: kept in a state, and told to a caller."""

from __future__ import annotations

from dataclasses import dataclass

from sempervirt.core.errors import (
    KINDS,
    Kind,
    OutcomeUnknown,
    SempervirtError,
    Unavailable,
    from_wire,
    kind_of,
)


@dataclass(frozen=True)
class Failure:
    """An error without its traceback. `kind` is a row of `core.errors.KINDS`."""

    kind: Kind
    message: str
    remedy: str = ""

    @classmethod
    def of(cls, error: SempervirtError) -> Failure:
        """What `error` says."""
        return cls(kind_of(error), error.message, error.remedy)

    @classmethod
    def named(cls, error: type[SempervirtError], message: str, remedy: str = "") -> Failure:
        """A failure of that kind, which must have a row in `KINDS`."""
        kind = next(kind for kind in KINDS if kind.error is error)
        return cls(kind, message, remedy)

    @property
    def unknown(self) -> bool:
        """Whether what failed may have been done all the same."""
        return issubclass(self.kind.error, OutcomeUnknown)

    @property
    def again(self) -> bool:
        """Whether the same request may have success later: it was not done, or nobody knows."""
        return issubclass(self.kind.error, Unavailable | OutcomeUnknown)

    def error(self) -> SempervirtError:
        """The error to raise."""
        return from_wire(self.kind.name, self.message, self.remedy)
