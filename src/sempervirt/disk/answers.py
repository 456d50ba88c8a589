"""What semper-blkd answers, by command; the Rust side is crates/blkd/src/answers.rs.

Sizes are in bytes, `…_ns` in nanoseconds of CLOCK_MONOTONIC, `time` in seconds since 1970.

A key that a later release adds has to be optional here: after an upgrade of the agent, backends of
the release before still serve, and are only replaced by `semper disk upgrade`.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

from sempervirt.core.queue_map import ThreadMap
from sempervirt.host.answers import Answer


class BackendState(Enum):
    """What a backend is doing for QEMU."""

    SPARE = "spare"
    LISTENING = "listening"  # holds the image or will; QEMU is not connected
    CONNECTED = "connected"
    RUNNING = "running"  # at least one queue runs
    DRAINING = "draining"  # told to end


class Standing(Enum):
    """What a backend is to the image."""

    OPENED = "opened"
    AWAITING_CLAIM = "awaiting-claim"
    INCOMING = "incoming"
    WAITING = "waiting"
    HELD = "held"
    HANDED_OVER = "handed-over"
    REFUSED = "refused"


class ClaimState(Enum):
    """How far a backend has come with its claim."""

    NONE = "none"
    AWAITED = "awaited"
    GIVEN = "given"
    ADMITTED = "admitted"


class Session(Enum):
    """Whether QEMU's connection outlives the process."""

    OFF = "off"  # QEMU connects again
    ALONE = "alone"  # serves; no spare knows the connection
    FOLLOWED = "followed"  # serves; a spare knows the connection
    SEEKING = "seeking"  # a spare that knows no connection
    FOLLOWING = "following"  # a spare that goes on with the connection


class GuestMemory(Enum):
    """How far the guest's memory has come, during a migration to this host."""

    COMPLETE = "complete"
    ADVISED = "advised"
    LISTENING = "listening"
    INHERITED = "inherited"


class ClaimStatus(Answer):
    """The claim that the process has; None where it has none, or awaits it."""

    state: ClaimState
    epoch: int | None
    id: str | None
    holder: str | None


class MapCounts(Answer):
    """What a status says of the page/block map: associations that were noted, and given up."""

    recorded: int
    dropped: int


class Timeline(Answer):
    """When a process reached each step, in ns of CLOCK_MONOTONIC; None where it has not."""

    process_start: int | None
    spare_ready: int | None
    lock_acquired: int | None
    accepted: int | None
    started: int | None
    replayed: int | None
    first_completion: int | None


class Latency(Answer):
    """How long requests took: how many in each power of two of ns, see crates/histogram."""

    sum_ns: int
    octaves: tuple[int, ...]


class Queue(Answer):
    """One virtqueue: `thread` works on it; the rest counts since the process began."""

    index: int
    size: int
    enabled: bool
    thread: int
    reads: int
    writes: int
    flushes: int
    discards: int
    errors: int
    bytes_read: int
    bytes_written: int
    in_flight: int
    waiting: int | None = None  # made available, and not taken yet
    completed: int | None = None  # given back, with whatever status
    replayed: int
    kicks: int
    polls: int
    calls: int
    latency: Latency | None = None


class Counters(Answer):
    """Of the whole process."""

    connections: int
    replayed: int
    protocol_errors: int
    guest_errors: int
    host_errors: int


class LastError(Answer):
    """What failed last on the host's side: a request, or with `op` "name" or "size" the image."""

    op: str
    offset: int
    length: int
    errno: int
    message: str
    time: float


class Walls(Answer):
    """What the process can still ask of the kernel; a process that tells nothing has no walls."""

    no_new_privs: bool = False
    # The one that is left, or empty.
    capabilities: str = ""
    # The version that the kernel has, 0 for none.
    landlock: int = 0
    seccomp: bool = False
    # What could not be had, and why.
    missing: str = ""


class Status(Answer):
    """`status`."""

    version: str
    pid: int
    state: BackendState
    engine: str
    direct: bool
    owns_image: bool
    standing: Standing
    session: Session = Session.OFF
    resumed: bool = False
    claim: ClaimStatus
    memory: GuestMemory
    read_only: bool
    image: str
    size_bytes: int
    block_size: int
    serial: str
    num_queues: int
    threads: int
    poll_us: int
    map: MapCounts | None
    inflight: bool
    write_cache: Literal["write-through", "write-back"]
    flush_failed: bool = False
    walls: Walls = Walls()
    timeline_ns: Timeline
    queues: tuple[Queue, ...]
    counters: Counters
    last_error: LastError | None

    @property
    def thread_map(self) -> ThreadMap:
        """The thread of each queue."""
        return tuple(queue.thread for queue in self.queues)


class MapMemory(Answer):
    """Bytes that the page/block map takes now; `bound`: at most."""

    associations: int
    versions: int
    touched: int
    index: int
    total: int
    bound: int


class Verifying(Answer):
    """A verification that is going on; `step` is "index" or "pages"."""

    step: Literal["index", "pages"]
    done: int
    total: int


class Verification(Answer):
    """What the last verification came to: pages, then blocks."""

    time: float
    seconds: float
    pages: int
    zero: int
    associated: int
    verified_associated: int
    verified_content: int
    verified_zero: int
    indexed: int
    hashed: int
    busy: int
    beyond_limit: int
    unreadable: int


class BlockMap(Answer):
    """`map`: which blocks of the disk stand in which pages of the guest, in numbers."""

    page_size: int
    pages: int
    associated: int
    blocks: int
    touched: int
    recorded: int
    dropped: int
    index_blocks: int
    memory: MapMemory
    running: Verifying | None
    verification: Verification | None


class VerifyStarted(Answer):
    """`map-verify`; False: one was going on."""

    started: bool


class Threads(Answer):
    """`threads`: the thread of each queue from now on."""

    map: tuple[int, ...]


class Resized(Answer):
    """`resize`: the disk's size from now on; whether QEMU was told, or reads it later."""

    size_bytes: int
    told: bool


class LayerState(Enum):
    """What a layer is: the snapshot of its number is what lies below it."""

    OPENED = "opened"  # takes writes; the snapshot is not there yet
    SEALED = "sealed"  # the snapshot can be read
    LAPSED = "lapsed"  # the same, and nobody wants it any more
    MERGING = "merging"  # its blocks are being copied into the image


class Layer(Answer):
    """One layer; `time` is when it was opened, `frozen` whether the guest's file systems were
    frozen then, `writes` whether it takes the guest's writes.
    """

    id: int
    state: LayerState
    epoch: int
    time: float
    frozen: bool
    size_bytes: int
    data_bytes: int
    writes: bool


class Pin(Answer):
    """`reader` reads that snapshot."""

    snapshot: int
    reader: str


class LayerTask(Answer):
    """What goes on in the background: `kind` is "snapshot" or "merge"."""

    kind: Literal["snapshot", "merge"]
    layer: int
    step: str
    done_bytes: int
    total_bytes: int


class Layers(Answer):
    """`layers`, the lowest first; at most `limit`. `kept`: merged, and its files wait for readers;
    `map_bytes`: memory; `last_error`: why the last task ended early.
    """

    layers: tuple[Layer, ...]
    kept: int
    limit: int
    map_bytes: int
    pins: tuple[Pin, ...]
    task: LayerTask | None
    last_error: str | None

    @property
    def newest(self) -> int:
        """The number of the newest layer, 0 when there is none."""
        return self.layers[-1].id if self.layers else 0

    def state_of(self, snapshot: int) -> LayerState | None:
        """The state of the layer above a snapshot; None when there is none of that number."""
        return next((layer.state for layer in self.layers if layer.id == snapshot), None)


class SnapshotTaken(Answer):
    """`snapshot`: its number; for how long no request was taken."""

    snapshot: int
    state: LayerState
    pause_us: int


class Merging(Answer):
    """`merge`: the layers whose blocks go into the image."""

    merging: tuple[int, ...]


class Pins(Answer):
    """`pin` and `unpin`."""

    pins: tuple[Pin, ...]


class Undone(Answer):
    """`undo`; not `taken_back`: the layer has blocks, or a merge goes on below it, and the layer
    stays until it is merged.
    """

    taken_back: bool


class Quiesced(Answer):
    """`quiesce`: no request is taken for so long, or until `resume`."""

    quiesced: bool
    for_ms: int


class QueuesResumed(Answer):
    """`resume`; not `held`: requests were taken before it."""

    held: bool


class Claimed(Answer):
    """`claim`."""

    claim: ClaimStatus


class Armed(Answer):
    """`handover`: whether the image is let go as soon as no queue runs; whether it is held now."""

    armed: bool
    owns_image: bool


class Capabilities(Answer):
    """`semper-blkd --print-capabilities`, as the conventions of vhost-user programs have it."""

    type: str
    features: tuple[str, ...]
