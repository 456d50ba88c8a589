"""What the API says, as types; the command line prints the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sempervirt.cluster.standing import Standing
from sempervirt.core.events import EventKind
from sempervirt.core.names import NAME_MAX
from sempervirt.core.queue_map import DeviceType, Engine
from sempervirt.disk.answers import LayerState
from sempervirt.disk.image import ImageState
from sempervirt.disk.image_format import ImageFormat
from sempervirt.disk.rescue import How
from sempervirt.disk.state import Condition
from sempervirt.migration.messages import MigrationView, MovePolicy
from sempervirt.passthrough.answers import MediatorState, SpareState
from sempervirt.qemu.accel import AcceleratorKind
from sempervirt.qemu.spec import AUTO_QUEUES_MAX, DEVICES_MAX, QUEUES_MAX, VmSpec, few
from sempervirt.qemu.state import Runstate
from sempervirt.renewal.snapshot import Consistency, Freezing
from sempervirt.standby.state import First, Life, Step
from sempervirt.standby.values import (
    EVERY_MAX_S,
    EVERY_MIN_S,
    KEEP_MAX,
    TEST_MAX_S,
    TEST_MIN_S,
    Tier,
)

API_VERSION = 1


class EventView(BaseModel):
    """Something that happened. `time` is in seconds since the epoch."""

    time: float
    kind: EventKind
    message: str


class AgentView(BaseModel):
    """The agent itself."""

    api: int = API_VERSION
    version: str
    pid: int
    started: float
    state_dir: Path
    run_dir: Path


class HostView(BaseModel):
    """What the host offers to VMs."""

    accelerator: AcceleratorKind
    accelerator_reason: str
    qemu: str
    qemu_version: str
    machines: list[str]
    networks: list[str]
    thread_maps: list[str] = Field(description="whose queues QEMU itself can bind to threads")
    reconnect: str = Field(description="how QEMU connects to a disk again")
    sandbox: bool
    missing_walls: list[str] = Field(
        description="what this kernel lacks to hold the processes of VMs back, or the agent to use"
    )
    certificate: Standing | None = Field(
        default=None, description="what the host shows to the others; null outside of a cluster"
    )
    out_of_service: str = Field(
        default="", description='why no VM may start here or come here; "": VMs may'
    )


class QueuesView(BaseModel):
    """How the queues of a device are served, and who decided it.

    A source is the VM file, a preset, a built-in default with its reason, or a command. The
    queues of a network card come in pairs, and are counted so.
    """

    device: DeviceType
    queues: int
    threads: int
    map: list[int] = Field(description="the thread of each queue")
    map_source: str
    engine: Engine
    engine_source: str
    poll_us: int | None = Field(description="null: the device's own default")
    poll_source: str
    summary: str


class EndView(BaseModel):
    """How a VM ended."""

    reason: str
    exit_code: int | None
    signal: int | None
    log: list[str] = Field(description="the last lines that QEMU wrote")


class WorkView(BaseModel):
    """Work on the whole VM that takes long: bytes of memory that are done, of how many."""

    what: str
    done: int
    total: int


class VmView(BaseModel):
    """A VM. Of one whose record cannot be read, less is known: the state is "unknown", `why` says
    what is wrong with the record, and null stands for what only the record could tell.
    """

    name: str
    state: Runstate
    why: str
    remedy: str = Field(default="", description="what can be done about an unknown VM")
    pid: int | None
    accelerator: AcceleratorKind | None
    memory: int | None
    vcpus: int | None
    started: float | None
    resets: int
    disks: list[str]
    queues: dict[str, QueuesView] = Field(description="of each device, by QEMU's id")
    channels: dict[str, Path]
    console: Path
    end: EndView | None
    work: WorkView | None = Field(default=None, description="a save or a restore under way")
    migration: MigrationView | None = Field(default=None, description="the last one from this host")
    events: list[EventView]
    spec: VmSpec | None


class RestartView(BaseModel):
    """One change of a disk's active backend.

    `milestones_ms` counts from when the agent saw the end of the old process; a negative
    number means that the successor was there before the agent woke.
    """

    time: float
    generation: int
    reason: str
    planned: bool
    successor: int | None
    successor_pid: int | None
    replayed: int | None
    kept_connection: bool | None = Field(
        default=None, description="QEMU's connection went on; false: QEMU had to connect again"
    )
    milestones_ms: dict[str, float | None]


class DiskView(BaseModel):
    """A disk of a running VM. `backend` is the active backend's own status, if it answers.

    For a disk that QEMU itself serves the condition is "qemu", `active_pid` is QEMU's, and
    there is no spare.
    """

    name: str
    condition: Condition
    reason: str = Field(description="why the disk waits, or why the last backend ended")
    image: Path
    image_state: ImageState = Field(description="what has become of the image under its VM")
    image_finding: str = Field(description='the cause and a remedy; "" while it is in its place')
    size_bytes: int | None
    read_only: bool
    binary: str
    upgrade_available: bool = Field(description="the installed program is another one")
    active_pid: int | None
    spare_pid: int | None
    spare_ready: bool
    generation: int
    restart_count: int
    upgrade_count: int
    socket: Path | None = Field(
        default=None, description="of a disk of another manager's VM: where its QEMU connects"
    )
    queues: QueuesView | None = Field(description="as they are to be served")
    restarts: list[RestartView]
    last_error: dict[str, Any] | None
    backend: dict[str, Any] | None
    silence: str = Field(
        default="", description='why the backend did not say how it is; "": it did'
    )
    events: list[EventView]


class GuardRequest(BaseModel):
    """Serve an image to the QEMU of another manager. `socket` is where QEMU connects, by default a
    place of the agent's; owner and group by name, or as a number.
    """

    model_config = ConfigDict(extra="forbid")

    image: Path
    format: Literal["raw"] | None = None
    read_only: bool = False
    queues: int = Field(default=AUTO_QUEUES_MAX, ge=1, le=QUEUES_MAX)
    queues_per_thread: int | None = Field(default=None, ge=1, le=QUEUES_MAX)
    engine: Engine = "auto"
    direct: bool = False
    block_size: Literal[512, 4096] | None = None
    serial: str = Field(default="", max_length=20, pattern=r"^[\x21-\x7e]*$")
    socket: Path | None = None
    owner: str | None = Field(default=None, max_length=64)
    group: str | None = Field(default=None, max_length=64)
    mode: int = Field(default=0o660, ge=0, le=0o777)


class DeviceView(BaseModel):
    """A passed-through device of a running VM. `mediator` is its mediator's own status, if that
    answers.
    """

    name: str
    kind: Literal["nvme", "pci"]
    image: Path | None = Field(description="of a device that we are; null for one of the host")
    pci: str | None = Field(default=None, description="the address of a PCI device on the host")
    read_only: bool
    slot: int = Field(description="on the guest's PCI bus 0")
    pid: int | None = Field(description="of the mediator, while it lives")
    state: MediatorState | None
    spare: SpareState | None = Field(
        default=None, description="who goes on when the mediator dies; null: it does not say"
    )
    takeovers: int = Field(
        default=0, description="deaths of mediators that a spare survived, since the agent began"
    )
    ailment: str = Field(description='why the device is gone; "" while it is not')
    failing: str = Field(
        default="", description='what is wrong with the data of the device; "" while nothing is'
    )
    obstacles: list[str] = Field(
        description="what keeps it from being moved, as far as this host knows by itself"
    )
    mediator: dict[str, Any] | None
    silence: str = Field(
        default="", description='why the mediator did not say how it is; "": it did'
    )


class MapMemoryView(BaseModel):
    """Bytes of memory that a disk's map takes now; `bound`: at most."""

    associations: int
    versions: int
    touched: int
    index: int
    total: int
    bound: int


class MapProgressView(BaseModel):
    """A verification that is going on: first the blocks of the index, then the pages."""

    step: str
    done: int
    total: int


class MapVerificationView(BaseModel):
    """What came of comparing every page in memory with the disk. Counts pages, then blocks."""

    time: float
    seconds: float
    pages: int
    zero: int
    associated: int = Field(description="pages that the data path had associated with a block")
    verified_associated: int = Field(description="of these, equal to their block")
    verified_content: int = Field(description="equal to a block that was found by content")
    verified_zero: int = Field(description="of all that equal a block, full of zeros")
    indexed: int
    hashed: int
    busy: int
    beyond_limit: int
    unreadable: int


class MapView(BaseModel):
    """Which blocks of a disk stand in which pages of its guest's memory, in numbers."""

    disk: str
    page_size: int
    pages: int = Field(description="of the guest's memory")
    associated: int = Field(description="pages known to hold a block, unless the guest changed it")
    blocks: int = Field(description="of the disk")
    touched: int = Field(description="blocks that were ever read or written")
    recorded: int
    dropped: int
    index_blocks: int
    memory: MapMemoryView
    running: MapProgressView | None
    verification: MapVerificationView | None


class LogView(BaseModel):
    """The last lines of a log file, the newest last."""

    path: Path
    lines: list[str]


class StopRequest(BaseModel):
    """How long the guest may take to power off."""

    grace_s: float = Field(default=60.0, ge=0, le=3600)


class RestartQemuRequest(BaseModel):
    """The QEMU to move to; by default the installed one."""

    qemu: Path | None = None


class QemuRestartView(BaseModel):
    """A VM that has moved to another QEMU process."""

    vm: str
    qemu: Path
    version: str
    pid: int
    machine: str = Field(description="the type of machine, which stays what it was")
    blackout_ms: float = Field(description="how long the guest stood still")
    total_ms: float


class SaveRequest(BaseModel):
    """The file to save to, on the agent's host; without one the agent keeps the state, and the next
    start of the VM goes on from there.
    """

    file: Path | None = None


class SavedView(BaseModel):
    """A VM that was saved, and has ended. Counts bytes, and pages of 4 KiB."""

    vm: str
    file: Path
    memory: int
    size: int = Field(description="of the file")
    zero_pages: int
    block_pages: int = Field(description="named as blocks of the VM's disks, and not held")
    data_pages: int
    paused_ms: float


class RestoreRequest(BaseModel):
    """The saved state; with `copy_disks_to` the VM gets copies of the disks there."""

    file: Path
    name: str | None = Field(default=None, description="by default the name that it had")
    images: Annotated[dict[str, Path], few(DEVICES_MAX)] = Field(
        default={}, max_length=DEVICES_MAX, description="other images, by the disk's name"
    )
    taps: Annotated[dict[str, str], few(DEVICES_MAX)] = Field(
        default={}, max_length=DEVICES_MAX, description="other taps, by those that it had"
    )
    new_macs: bool = Field(
        default=False, description="network addresses that go with the name, after a reboot"
    )
    copy_disks_to: Path | None = None

    @model_validator(mode="after")
    def _copies_have_a_name(self) -> Self:
        if self.copy_disks_to is not None and (self.name is None or self.images):
            raise ValueError("a clone needs a name, and has no other images than its copies")
        return self


class UpgradeRequest(BaseModel):
    """The binary to serve from; by default the installed one."""

    binary: Path | None = None


class ResizeRequest(BaseModel):
    """The size that a disk is to have, not less than it has."""

    size_bytes: int = Field(gt=0, lt=1 << 63)


class ResizedView(BaseModel):
    """A disk that is larger now. `told`: QEMU has told the guest; otherwise QEMU reads the size
    when it connects to the disk the next time.
    """

    disk: str
    size_bytes: int
    told: bool


class RescueRequest(BaseModel):
    """Where the image, or a copy of it, is to be, on the agent's host."""

    to: Path


class RescuedView(BaseModel):
    """An image that is at `path`. `paused_ms`: how long the guest stood still; null: it did not."""

    disk: str
    path: Path
    how: How
    size_bytes: int
    copied_bytes: int
    paused_ms: float | None


class SnapshotRequest(BaseModel):
    """Take a snapshot of disks of a VM."""

    disks: list[str] = Field(
        default=[], max_length=64, description="names within the VM; none: all that are writable"
    )
    freezing: Freezing = Freezing.AUTO


class DiskSnapshotView(BaseModel):
    """The snapshot of a disk, VM/DISK, which took no request for `pause_ms`."""

    disk: str
    snapshot: int
    pause_ms: float


class SnapshotView(BaseModel):
    """What was taken. `reason`: why the guest's file systems were not frozen."""

    vm: str
    consistency: Consistency
    reason: str
    frozen_ms: float | None
    disks: list[DiskSnapshotView]


class MergeRequest(BaseModel):
    """Give snapshots up, and merge the layers that nobody needs then."""

    through: int | None = Field(
        default=None, ge=1, le=2**63 - 1, description="the newest that goes; none: the unwanted"
    )
    rate_bytes: int | None = Field(default=None, ge=1 << 20, le=2**63 - 1, description="a second")


class MergingView(BaseModel):
    """The layers of a disk, VM/DISK, that are being merged now, one after the other. `done`: the
    VM has ended, and they are in the image.
    """

    disk: str
    merging: list[int]
    done: bool = False


class ExportRequest(BaseModel):
    """Write a snapshot to a file of this host, where nothing may be."""

    snapshot: int = Field(ge=1, le=2**63 - 1)
    to: Path
    format: ImageFormat = ImageFormat.RAW


class ExportedView(BaseModel):
    """The image that was made; `data_bytes` are not zeros."""

    disk: str
    snapshot: int
    path: Path
    format: ImageFormat
    size_bytes: int
    data_bytes: int


class UnpinRequest(BaseModel):
    """Say that a reader does not read a snapshot any more."""

    snapshot: int = Field(ge=1, le=2**63 - 1)
    reader: str = Field(min_length=1, max_length=40)


class LayerView(BaseModel):
    """One layer; see `disk.answers.Layer`."""

    id: int
    state: LayerState
    epoch: int
    time: float
    frozen: bool
    size_bytes: int
    data_bytes: int
    writes: bool


class PinView(BaseModel):
    """`reader` reads that snapshot."""

    snapshot: int
    reader: str


class LayerTaskView(BaseModel):
    """What goes on in the background; `kind` is "snapshot" or "merge"."""

    kind: Literal["snapshot", "merge"]
    layer: int
    step: str
    done_bytes: int
    total_bytes: int


class LayersView(BaseModel):
    """The layers of a disk, VM/DISK, the lowest first; the snapshot of a layer's number is what
    lies below the layer.
    """

    disk: str
    layers: list[LayerView]
    kept: int
    limit: int
    map_bytes: int
    pins: list[PinView]
    task: LayerTaskView | None
    last_error: str | None


class ThreadsRequest(BaseModel):
    """Either a map, or how many queues each thread is to have."""

    map: list[int] | None = Field(default=None, max_length=64)
    queues_per_thread: int | None = Field(default=None, ge=1, le=64)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.map is None) == (self.queues_per_thread is None):
            raise ValueError("give either map or queues_per_thread")
        return self


class ObstacleView(BaseModel):
    """A reason that would stop a migration, and what can be done about it."""

    what: str
    remedy: str


class ImageSeenView(BaseModel):
    """What a host sees where an image should be."""

    id: str
    block_device: bool
    problem: str


class HostSideView(BaseModel):
    """What a host is, has and sees of a VM that may come there. `memory_available` in bytes."""

    name: str
    accelerator: AcceleratorKind
    qemu_version: str
    cpu_model: str
    cpu_flags: list[str]
    memory_available: int
    processors: int
    vm_state: Runstate | None = Field(description="of a VM of that name there, if there is one")
    images: dict[str, ImageSeenView]
    missing: list[str]
    passes_through: bool = Field(description="its QEMU can take passed-through devices")


class MigrateRequest(BaseModel):
    """Move a VM to another host."""

    to: str
    policy: MovePolicy = MovePolicy()


class ResolveRequest(BaseModel):
    """Say who owns a VM of which the whereabouts are unknown."""

    owner: str
    evidence: str = Field(description="how it is known that it runs nowhere else; it is kept")


class ResolvedView(BaseModel):
    """A VM whose owner was settled by an operator."""

    vm: str
    owner: str
    message: str


class EnableStandbyRequest(BaseModel):
    """How the standbys of a VM are kept."""

    every_s: float = Field(default=600, ge=EVERY_MIN_S, le=EVERY_MAX_S, allow_inf_nan=False)
    keep: int = Field(default=1, ge=1, le=KEEP_MAX, description="so many that are ready")
    tier: Tier = Tier.READY
    on: str = Field(default="", max_length=NAME_MAX, description='on that host; "": on this one')
    test_every_s: float | None = Field(
        default=None,
        ge=TEST_MIN_S,
        le=TEST_MAX_S,
        allow_inf_nan=False,
        description="rehearse a take-over so often; null: when somebody asks",
    )


class FailoverRequest(BaseModel):
    """Have a standby take over."""

    force: bool = Field(default=False, description="also while the VM runs, which is ended then")
    fresh: bool = Field(default=False, description="by a standby that is made for it, if it runs")
    i_know: str = Field(
        default="",
        max_length=300,
        description="how it is known that the VM has ended, where nothing can prove that",
    )


class GenerationView(BaseModel):
    """One standby. `taken`: when its snapshot was, in seconds since 1970; 0 before that."""

    number: int
    life: Life
    tier: Tier
    taken: float
    consistency: str
    memory_bytes: int
    boot_s: float
    notes: list[str]


class StandbyWindowView(BaseModel):
    """What of a disk would be lost now: what was written in the last `window_s`; null where no
    standby is ready.
    """

    disk: str
    window_s: float | None


class StepView(BaseModel):
    """A step of a take-over, and when it ended, counted from its beginning."""

    name: str
    after_ms: float


class RehearsalView(BaseModel):
    """A rehearsal with standby `number`. `failure`: why it did not get to its end; "" if it did."""

    number: int
    time: float
    steps: list[StepView]
    notes: list[str]
    failure: str


class TakeOverView(BaseModel):
    """A take-over by standby `number`; it began at `time`."""

    number: int
    cause: str
    time: float
    step: Step
    steps: list[StepView]
    trouble: str
    notes: list[str]


class StandbyView(BaseModel):
    """The standbys of a VM. `trouble`: why the last one was not made, or did not take over;
    `images`: what the VM has on its disks now, of which a standby has copies.
    """

    vm: str
    every_s: float
    keep: int
    tier: Tier
    first: First
    why: str
    closing: bool
    generations: list[GenerationView]
    windows: list[StandbyWindowView]
    images: list[str]
    trouble: str
    take_over: TakeOverView | None
    last_take_over: TakeOverView | None
    last_rehearsal: RehearsalView | None = None
    judged: str = Field(description="what the VM is by what is seen of it, and what follows")
    fence: str = Field(description="how it is proved, before a take-over, that the VM has ended")
    fences: dict[str, str] = Field(
        default={}, description="the same by disk, where the VM is on another host"
    )
    host: str = Field(default="", description='the host that keeps them; "": no cluster')
    test_every_s: float | None = None


class LostDiskView(BaseModel):
    """A disk as the VM before a take-over has left it. `there`: its image is still there."""

    disk: str
    image: Path
    there: bool


class LossView(BaseModel):
    """What a take-over by standby `standby` has lost: what was written from `since` to `ended`, in
    seconds since 1970. Images that standbys have made are kept until `kept_until`.
    """

    standby: int
    since: float
    ended: float
    kept_until: float
    disks: list[LostDiskView]
