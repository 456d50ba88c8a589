"""The work on a whole VM that takes many steps: at most one at a time, and always on record.

    none ── begin ──► Restarting, Saving, Restoring, Rescuing, Departing, Arriving ── end ──► none
                          ▲        │
                          └────────┘ advance; each of the three is on record when it returns

An agent that begins anew reads the record, and what kind of work it was says how it goes on:

- `Restarting`: two QEMUs may be there; `switched` says which of them is the VM.
- `Saving`: the guest was paused for a save, and goes on; once `saved`, QEMU is ended.
- `Restoring`: the memory is not there and never will be: QEMU is ended; once `loaded`, the guest
  goes on.
- `Rescuing`: the guest was paused for a copy of a disk, and goes on.
- `Snapshotting`: the guest's file systems may be frozen, and are thawed; disks that have a snapshot
  more than before give it up, for others may have none.
- `Standing`: QEMU waits, and the VM is no VM yet but a standby; it goes on waiting.
- `MergingLayers`: the VM has ended, and its disks' layers go into the images.
- `Departing`, `Arriving`: the machines of the migration go on from the phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, assert_never

from pydantic import Field

from sempervirt.host.procfs import ProcessId
from sempervirt.vm.phases import Arrival, Mode, Phase

_RUNS_ON = "it runs on "


def has_left(reason: str) -> bool:
    """Whether a QEMU that ended for that reason ended because its VM has moved (`farewell`)."""
    return reason.startswith(_RUNS_ON)


@dataclass(frozen=True)
class Restarting:
    """Another QEMU takes over. `number` counts the QEMUs of the VM; `resume`: the guest runs on.

    Once `switched` the new QEMU, `qemu`, is the VM, and the one before has to be dead before the
    guest runs on.
    """

    number: int
    resume: bool
    switched: bool = False
    qemu: ProcessId | None = None
    kind: Literal["restarting"] = "restarting"


@dataclass(frozen=True)
class Saving:
    """The guest is paused for a save. `resume`: it ran, and runs on if the save fails.

    Once `saved` the file is durable, and the VM ends.
    """

    resume: bool
    saved: bool = False
    kind: Literal["saving"] = "saving"


@dataclass(frozen=True)
class Restoring:
    """The guest's memory is being unpacked; QEMU waits for it.

    Once `loaded` QEMU has the guest, which is to run on if it ran (`resume`).
    """

    loaded: bool = False
    resume: bool = False
    kind: Literal["restoring"] = "restoring"


@dataclass(frozen=True)
class Rescuing:
    """The guest is paused for a copy of its disk `disk`. `resume`: it ran, and runs on."""

    disk: str
    resume: bool
    kind: Literal["rescuing"] = "rescuing"


@dataclass(frozen=True)
class Snapshotting:
    """A snapshot of the disks is being taken. `frozen`: the guest's file systems may be frozen;
    `newest`: the newest layer of each disk before, 0 where there was none.
    """

    frozen: bool = False
    newest: Mapping[str, int] = field(default_factory=dict)
    kind: Literal["snapshotting"] = "snapshotting"


@dataclass(frozen=True)
class Standing:
    """QEMU waits to take the place of another one, which runs the VM. Disks that both have await a
    claim of `holder`, the name of this host.
    """

    holder: str
    kind: Literal["standing"] = "standing"


@dataclass(frozen=True)
class MergingLayers:
    """The VM has ended, and the layers of its disks are being merged into the images."""

    kind: Literal["merging-layers"] = "merging-layers"


@dataclass(frozen=True)
class Departing:
    """A migration away, in `phase`. `address` is that of the destination's
    agent, "HOST:PORT"; `running`: the guest was not paused. `by_images`: the store was away, and
    the epoch records of the images say whose the VM is.
    """

    id: str
    destination: str
    address: str
    running: bool
    phase: Phase = Phase.PREPARE
    mode: Mode = Mode.PRECOPY
    by_images: bool = False
    kind: Literal["departing"] = "departing"

    @property
    def farewell(self) -> str:
        """Why the QEMU here ends when the VM has moved; "" while it has not."""
        return f"{_RUNS_ON}{self.destination} now" if self.phase is Phase.DONE else ""


@dataclass(frozen=True)
class Arriving:
    """A migration to this host, in `phase`. `epoch` is that of the source's
    claim, `images` are the ids of what it covers; `running`: the guest is to run. `by_images` as of
    `Departing`.
    """

    id: str
    source: str
    running: bool
    epoch: int
    images: tuple[str, ...]
    phase: Arrival = Arrival.PREPARING
    by_images: bool = False
    kind: Literal["arriving"] = "arriving"


Work = Annotated[
    Restarting
    | Saving
    | Restoring
    | Rescuing
    | Snapshotting
    | Standing
    | MergingLayers
    | Departing
    | Arriving,
    Field(discriminator="kind"),
]


def in_words(work: Work) -> str:
    """What goes on, for people: "a restart of QEMU"."""
    match work:
        case Restarting():
            return "a restart of QEMU"
        case Saving():
            return "a save"
        case Restoring():
            return "its restoration"
        case Rescuing():
            return f"a copy of its disk {work.disk}"
        case Snapshotting():
            return "a snapshot of its disks"
        case Standing():
            return "its wait as a standby"
        case MergingLayers():
            return "the merge of its disks' layers"
        case Departing():
            return f"its migration to {work.destination}"
        case Arriving():
            return f"its migration from {work.source}"
        case _:
            assert_never(work)
