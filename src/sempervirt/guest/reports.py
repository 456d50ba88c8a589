"""Answers of the probe, as types. Times ending in `_ns` are the guest's CLOCK_MONOTONIC.

The other side of each is in `crates/probe/src` (runs.rs, writers.rs, verify.rs, kmsg.rs). Members
that a newer probe adds are ignored.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Mode = Literal["write", "mixed", "read", "overlap"]


class Report(BaseModel):
    """Immutable, and open to members that are not known yet."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Hello(Report):
    """The greeting of a boot. `nonce` is drawn at boot and kept in RAM only."""

    nonce: str
    version: str
    kernel: str
    monotonic_ns: int


class Device(Report):
    """A block device of the guest."""

    name: str
    size_bytes: int
    serial: str
    queues: int
    block_size: int
    read_only: bool
    driver: str
    write_cache: str
    scheduler: str


class Started(Report):
    """Writers run. `continued`: what an earlier run wrote is still being checked."""

    monotonic_ns: int
    continued: bool


class IoError(Report):
    """A request that failed in the guest; errno 0 is a short transfer."""

    op: Literal["read", "write", "flush", "open"]
    block: int
    errno: int
    monotonic_ns: int


class WrongCounts(Report):
    """Blocks with wrong content, each counted once and in one kind.

    lost: an older write than the one acknowledged. torn: parts of different writes, or a bad
    checksum. misplaced: another place's block. foreign: another boot's, or no stamp.
    """

    lost: int
    torn: int
    misplaced: int
    foreign: int

    @property
    def total(self) -> int:
        return self.lost + self.torn + self.misplaced + self.foreign


class WrongBlock(Report):
    """One wrong block: what was expected, and what was found in which of its sectors."""

    kind: Literal["lost", "torn", "misplaced", "foreign"]
    block: int
    offset: int
    writer: int
    acked: int
    attempted: int
    found: str
    monotonic_ns: int


class Latency(Report):
    """Of completed requests, in microseconds."""

    p50: float
    p99: float
    max: float


class KernelError(Report):
    """Lines of the guest kernel's log that contain `pattern`, since boot."""

    pattern: str
    count: int
    last: str


class KernelLine(Report):
    """One line of the guest kernel's log; level 0 is an emergency, 7 is for debugging."""

    seq: int
    level: int
    time_us: int
    text: str


class FinalVerification(Report):
    """Every block of the span read back after the writers stopped."""

    blocks: int
    untouched: int
    unreadable: int
    wrong: int
    complete: bool
    hung: bool
    seconds: float


class Stats(Report):
    """The writers of one device. `hung` requests have not come back, `late` ones did at last."""

    device: str
    running: bool
    monotonic_ns: int
    writes: int
    reads: int
    verified: int
    flushes: int
    late: int
    hung: int
    lanes_active: int
    io_errors: list[IoError]
    io_error_count: int
    wrong: WrongCounts
    wrong_details: list[WrongBlock]
    latency_us: Latency
    kernel_errors: list[KernelError]
    verified_final: FinalVerification | None = None

    @property
    def completions(self) -> int:
        return self.writes + self.reads + self.flushes

    @property
    def is_clean(self) -> bool:
        """No request failed or hung, no block was wrong, and none that was to be read was not."""
        final = self.verified_final
        return (
            self.wrong.total == 0
            and self.io_error_count == 0
            and self.hung == 0
            and (final is None or final.complete)
        )


class Timeline(Report):
    """Completions in each bin from `start_ns` on."""

    bin_ns: int
    start_ns: int
    counts: list[int]


class Gaps(Report):
    """Intervals of more than 2 ms between two consecutive completions over all writers."""

    gaps: list[tuple[int, int]]
    open_since_ns: int | None
    forgotten: int
    monotonic_ns: int

    def longest_ms(self) -> float:
        return max((end - start for start, end in self.gaps), default=0) / 1e6


class Ran(Report):
    """A program that ran in the guest; status None: a signal ended it."""

    status: int | None
    stdout: str
    stderr: str
