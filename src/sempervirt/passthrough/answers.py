"""What semper-vfiod answers, typed (`host.answers`); crates/control/golden has examples.

What goes on to another host is as long here as a message between hosts may be: a mediator that a
guest has taken over may say anything, and whatever is too long has to be an error of that mediator.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from sempervirt.host.answers import Answer

# What one mediator gives another, in characters at most; a mediator's own bound is lower.
STATE_MAX = 64 << 10

# Offset in the configuration space, size in bytes, value.
ConfigWrite = tuple[
    Annotated[int, Field(ge=0, lt=256)],
    Literal[1, 2, 4],
    Annotated[int, Field(ge=0, lt=1 << 32)],
]
ConfigWrites = Annotated[list[ConfigWrite], Field(max_length=64)]
ConfigHex = Annotated[str, Field(max_length=8192, pattern=r"^([0-9a-f]{2})*$")]
TableHex = Annotated[str, Field(max_length=STATE_MAX, pattern=r"^([0-9a-f]{2})*$")]
StateText = Annotated[str, Field(max_length=STATE_MAX)]


class MediatorState(StrEnum):
    """What a mediator does."""

    WAITING = "waiting"
    RUNNING = "running"
    CAPTURED = "captured"
    QUIESCED = "quiesced"
    INCOMING = "incoming"


class SpareState(StrEnum):
    """Who goes on when a mediator dies: nobody ever, nobody now, one that is not ready yet, one
    that is.
    """

    OFF = "off"
    ALONE = "alone"
    FOLLOWING = "following"
    READY = "ready"


class Counters(Answer):
    """Since the mediator began. Requests of the guest, bytes, and how its doorbells came."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    reads: int
    writes: int
    flushes: int
    others: int
    errors: int
    bytes_read: int
    bytes_written: int
    in_flight: int
    doorbells_direct: int
    doorbells_captured: int
    doorbells_trapped: int
    interrupts: int
    dma_refused: int
    dirty_pages: int
    mediated_bytes: int

    @property
    def requests_done(self) -> int:
        """How many requests of the guest were answered."""
        return self.reads + self.writes + self.flushes + self.others


class MediatorStatus(Answer):
    """How a mediator is. `connected`: QEMU's connection is there. `flush_failed`: a flush of the
    image has failed, and every further one fails.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    version: str
    pid: int
    kind: str
    state: MediatorState
    connected: bool
    owns_image: bool
    size_bytes: int | None = None
    spare: SpareState = SpareState.OFF
    flush_failed: bool = False
    counters: Counters


class Table(Answer):
    """The MSI-X table, which QEMU keeps by itself: `address` in the guest's memory, `table` its
    bytes as hex. Both are None while the guest has not placed it.
    """

    bar: int
    offset: int
    vectors: int
    address: int | None = None
    table: TableHex | None = None


class Configured(Answer):
    """A device's configuration, as the guest has set it: what has to be written where QEMU begins
    anew, in this order: `before`, the table, `after`. Each is [offset, size, value].
    """

    config: ConfigHex
    before: ConfigWrites
    after: ConfigWrites
    msix_table: Table


class TableWritten(Answer):
    """How many bytes of the MSI-X table were written."""

    written: int


class Captured(Answer):
    """Whether register writes are captured, and the page of the guest's memory where the doorbells
    are; None while the guest has not placed them.
    """

    on: bool
    page: int | None = None


class Round(Answer):
    """Register writes since the last round: `writes` is for the destination's mediator alone."""

    writes: StateText
    count: int


class Replayed(Answer):
    """How many register writes were set."""

    replayed: int


class Drained(Answer):
    """How many requests were finished before the device stood still."""

    drained: int


class Touched(Answer):
    """How many pages were marked as written, so that QEMU sends them."""

    pages: int


class Exported(Answer):
    """All that the destination's mediator needs; nobody else looks into `state`."""

    state: StateText
    bytes: int


class Imported(Answer):
    """How many vectors were set, and how many registers were others than rounds had told."""

    vectors: int
    differing: int = 0


class Released(Answer):
    """Whether the process has the image now."""

    owns_image: bool


class MediatorClaim(Answer):
    """By what right a mediator writes its image, in its own word for it."""

    state: str
    epoch: int | None = None


class MediatorClaimed(Answer):
    """The claim was taken."""

    claim: MediatorClaim


class Resumed(Answer):
    """How many interrupts were raised for completions that the guest has yet to see."""

    kicked: int
