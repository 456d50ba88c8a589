"""Messages between the agents of both hosts of a migration, and the view of a migration."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from sempervirt.passthrough.answers import (
    ConfigHex,
    Configured,
    ConfigWrites,
    StateText,
    Table,
    TableHex,
)
from sempervirt.passthrough.leaving import Moved
from sempervirt.qemu.accel import AcceleratorKind
from sempervirt.qemu.spec import DEVICES_MAX, PASSTHROUGH_MAX, VmSpec, few
from sempervirt.vm.phases import Arrival, Mode, Phase


class DeviceConfiguration(BaseModel):
    """The configuration of a passed-through device, as the guest has set it: what is to be written,
    in this order. `table` is the MSI-X table as hex, at `table_address` of the guest's memory; both
    are None while the guest has not placed it.
    """

    before: ConfigWrites
    after: ConfigWrites
    config: ConfigHex
    table_bar: int
    table_offset: int
    vectors: int
    table_address: int | None = None
    table: TableHex | None = None

    @classmethod
    def of(cls, configured: Configured) -> DeviceConfiguration:
        """What a mediator has said."""
        table = configured.msix_table
        return cls(
            before=configured.before,
            after=configured.after,
            config=configured.config,
            table_bar=table.bar,
            table_offset=table.offset,
            vectors=table.vectors,
            table_address=table.address,
            table=table.table,
        )

    def configured(self) -> Configured:
        """The inverse of `of`."""
        return Configured(
            before=self.before,
            after=self.after,
            config=self.config,
            msix_table=Table(
                bar=self.table_bar,
                offset=self.table_offset,
                vectors=self.vectors,
                address=self.table_address,
                table=self.table,
            ),
        )


class DeviceState(BaseModel):
    """The last configuration and state of a device that stands still at the source. `writes` and
    `state` are the mediators' own.
    """

    configuration: DeviceConfiguration
    writes: StateText
    state: StateText

    @classmethod
    def of(cls, moved: Moved) -> DeviceState:
        """What the source has."""
        configuration = DeviceConfiguration.of(moved.configuration)
        return cls(configuration=configuration, writes=moved.writes, state=moved.state)

    def moved(self) -> Moved:
        """The inverse of `of`."""
        return Moved(self.configuration.configured(), self.writes, self.state)


class DeviceRounds(BaseModel):
    """Register writes of the guest since the last round, by device."""

    writes: dict[str, StateText] = Field(max_length=PASSTHROUGH_MAX)


class DeviceStates(BaseModel):
    """The state of every passed-through device of a VM, by device."""

    states: dict[str, DeviceState] = Field(max_length=PASSTHROUGH_MAX)


class ArrivalRequest(BaseModel):
    """Asks a host to prepare for a VM. `images` are the ids of the writable images, by disk.
    `by_images`: the store does not answer at the source, and the epoch records say whose the VM is.
    """

    id: str = Field(pattern=r"^[0-9a-f]{32}$", description="of this migration, random")
    source: str = Field(description="the host that the VM leaves")
    epoch: int = Field(description="of the source's claim")
    spec: VmSpec
    machine: str = Field(description='its versioned name, "pc-q35-10.0"')
    accelerator: AcceleratorKind
    running: bool = Field(description="whether the guest is to run on; otherwise it is paused")
    postcopy: bool = False
    by_images: bool = False
    images: Annotated[dict[str, str], few(DEVICES_MAX)] = Field(max_length=DEVICES_MAX)
    devices: Annotated[dict[str, DeviceConfiguration], few(PASSTHROUGH_MAX)] = Field(
        default_factory=dict,
        max_length=PASSTHROUGH_MAX,
        description="configurations of the passed-through devices, by name",
    )


class ArrivalAnswer(BaseModel):
    """How far the destination is. `address` is where its end of the wire listens."""

    id: str
    phase: Arrival
    why: str = ""
    address: str = ""
    drained: bool = False


class RunRequest(BaseModel):
    """Tells the destination that the VM was handed over. `epoch` and `claim` are of its claim."""

    epoch: int
    claim: str = Field(pattern=r"^[0-9a-f]{32}$")


class MovePolicy(BaseModel):
    """What the owner of a VM allows for a migration. Times in seconds."""

    blackout_s: float = Field(default=0.3, gt=0, le=60, description="meant for the guest")
    blackout_max_s: float = Field(default=2.0, gt=0, le=600, description="it is never longer")
    deadline_s: float = Field(default=600.0, gt=0, description="until the guest is stopped")
    throttle_max: int = Field(
        default=80, ge=0, le=99, description="percent of the guest's processor time; 0: never"
    )
    postcopy: bool = Field(default=False, description="if it does not converge otherwise")


class WireView(BaseModel):
    """What the source's end of the wire has carried."""

    stream_bytes: int = Field(description="what QEMU has sent")
    wire_bytes: int = Field(description="what went over the network for it")
    pages: int
    zero_pages: int
    references: int
    mismatches: int = Field(description="references of which the block had changed")


class MigrationView(BaseModel):
    """A migration, while it goes on and afterwards. Sizes in bytes."""

    id: str
    vm: str
    source: str
    destination: str
    phase: Phase
    over: bool
    mode: Mode
    why: str
    may_cancel: bool
    started: float
    elapsed_s: float
    memory: int
    remaining: int
    passes: int
    dirtied: float = Field(description="bytes/s that the guest writes")
    expected_blackout_ms: float | None
    limit_ms: float = Field(description="what the guest's blackout is meant to be")
    throttle: int = Field(description="percent of the guest's processor time")
    blackout_ms: float | None = Field(description="from its stop to the word that it runs again")
    timeline_ms: dict[str, float] = Field(description="after the guest's stop, what it waited for")
    wire: WireView | None
