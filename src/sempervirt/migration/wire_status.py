"""What semper-wired answers to `status`; the Rust side is crates/wired/src/answers.rs.

What an end does not know is 0, empty or None. A key that a later release adds has to be optional
here, as in `disk.answers`.
"""

from __future__ import annotations

from enum import Enum

from sempervirt.host.answers import Answer


class End(Enum):
    """At which host the process is."""

    SOURCE = "source"
    DESTINATION = "destination"


class WireState(Enum):
    """How far an end of the wire has come."""

    CONNECTING = "connecting"
    INDEXING = "indexing"
    READY = "ready"
    STREAMING = "streaming"
    DRAINING = "draining"
    DONE = "done"
    FAILED = "failed"


class WireStatus(Answer):
    """`status`, of either end.

    `seconds` since the process began; `address` is where a destination listens, "HOST:PORT";
    `peer` the program at the other end; `switchover_bandwidth` what the link carries of the stream,
    in bytes per second; `passes_through` why the source does not understand the stream any more;
    `error` why the end has failed.
    """

    version: str
    pid: int
    end: End
    state: WireState
    seconds: float
    address: str | None
    peer: str
    indexed_blocks: int
    stream_bytes: int
    wire_bytes_sent: int
    wire_bytes_received: int
    backlog_bytes: int
    switchover_bandwidth: int | None
    zero_pages: int
    pages: int
    references: int
    mismatches: int
    repaired: int
    other_bytes: int
    passes_through: str | None
    error: str | None
