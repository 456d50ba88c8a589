"""What an agent leaves for the next one about the standbys of a VM: STATE/standby/NAME.json.

    {"version": 1, "state": {…}}                      all of `state.Standby`

What one generation needs stands in a directory of its own, STATE/standby/NAME/N: the records of the
VM that waits or serves (`vm.record`, as of any VM), and `guest.json`, the VM's description.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sempervirt.core.names import is_name
from sempervirt.host.places import Places
from sempervirt.host.records import (
    RecordDamaged,
    make_directory,
    read_record,
    remove_record,
    write_record,
)
from sempervirt.qemu.spec import VmSpec
from sempervirt.standby.state import Standby

VERSION = 1
# Of the number of a generation; a name with more is none of ours.
DIGITS = 10
# From here on numbers are of rehearsals (`rehearsal`), and of no generation.
REHEARSALS = 900_000_000
_STATE = TypeAdapter(Standby)


@dataclass(frozen=True)
class StandbyRecord:
    """The record of one VM's standbys at `path`."""

    path: Path

    def write(self, state: Standby) -> None:
        """Replaces it. Raises OSError. Outside of a take-over the record is on the medium then:
        which disks are the VM's has to outlive the host.
        """
        make_directory(self.path.parent, 0o700)
        content = {"state": _STATE.dump_python(state, mode="json")}
        write_record(self.path, VERSION, content, durable=state.take_over is None)

    def read(self) -> Standby | None:
        """None when there is none. Raises RecordDamaged."""
        content = read_record(self.path, VERSION)
        if content is None:
            return None
        try:
            state = _STATE.validate_python(content["state"])
        except (KeyError, ValidationError, RecursionError) as error:
            raise RecordDamaged(
                f"{self.path} is not the record of standbys: {error}"[:300],
                remedy="move the file away: a standby that has taken over runs on as the VM, and "
                "those that wait are ended",
            ) from error
        if state.vm != self.path.stem:
            raise RecordDamaged(f"{self.path} is the record of the standbys of VM {state.vm}")
        return state

    def remove(self) -> None:
        """There are no standbys any more."""
        remove_record(self.path)


def standby_dir(state_dir: Path) -> Path:
    """Where records of standbys are."""
    return state_dir / "standby"


def record_of(state_dir: Path, vm: str) -> StandbyRecord:
    """The record of the standbys of a VM."""
    return StandbyRecord(standby_dir(state_dir) / f"{vm}.json")


def on_record(state_dir: Path) -> list[str]:
    """The VMs of which there are standbys on record, or directories of standbys."""
    try:
        entries = [*standby_dir(state_dir).iterdir()]
    except OSError:
        return []
    names = {entry.stem if entry.suffix == ".json" else entry.name for entry in entries}
    return sorted(name for name in names if is_name(name))


def places_of(places: Places) -> list[tuple[str, int, Places]]:
    """Where the generations of all standbys have their files: VM, number, places. Those of a host
    whose agent has `places`.
    """
    found: set[tuple[str, int]] = set()
    for base in (places.state_dir, places.run_dir):
        for directory in standby_dir(base).glob("*/*"):
            if directory.name.isdecimal() and len(directory.name) < DIGITS:
                found.add((directory.parent.name, int(directory.name)))
    return [(vm, number, generation_places(places, vm, number)) for vm, number in sorted(found)]


def numbers_of(places: Places, vm: str) -> list[int]:
    """The generations and rehearsals of a VM of which there is a directory."""
    found: set[int] = set()
    for base in (places.state_dir, places.run_dir):
        with contextlib.suppress(OSError):
            entries = (standby_dir(base) / vm).iterdir()
            found |= {int(entry.name) for entry in entries if entry.name.isdecimal()}
    return sorted(found)


def generation_places(places: Places, vm: str, number: int) -> Places:
    """Where one generation has its files."""
    below = below_of(vm, number)
    return Places(places.state_dir / below, places.run_dir / below)


def below_of(vm: str, number: int) -> Path:
    """The same, below the directories of the host."""
    return standby_dir(Path()) / vm / str(number)


@dataclass(frozen=True)
class Guest:
    """The VM that a generation is, and the bridges that its taps are led to, by tap."""

    spec: VmSpec
    bridges: Mapping[str, str]


_BRIDGES = TypeAdapter(dict[str, str])


def write_guest(directory: Path, guest: Guest) -> None:
    """Notes the VM that a generation is. Raises OSError."""
    content = {"spec": guest.spec.model_dump(mode="json"), "bridges": dict(guest.bridges)}
    write_record(directory / "guest.json", VERSION, content)


def read_guest(directory: Path) -> Guest:
    """What `write_guest` has noted. Raises RecordDamaged, also when there is none."""
    path = directory / "guest.json"
    content = read_record(path, VERSION)
    try:
        found = content or {}
        spec = VmSpec.model_validate(found["spec"])
        return Guest(spec, _BRIDGES.validate_python(found["bridges"]))
    except (KeyError, ValidationError) as error:
        raise RecordDamaged(f"{path} does not describe a VM: {error}"[:300]) from error


def write_first(state_dir: Path, spec: VmSpec) -> None:
    """Notes what a VM of another host has, of which standbys are kept here. Raises OSError."""
    directory = standby_dir(state_dir) / spec.name
    make_directory(directory, 0o700)
    content = {"spec": spec.model_dump(mode="json")}
    write_record(directory / "first.json", VERSION, content, durable=True)


def read_first(state_dir: Path, name: str) -> VmSpec | None:
    """What `write_first` has noted; None when there is nothing, or nothing that can be read: the
    VM's host tells it again.
    """
    try:
        found = read_record(standby_dir(state_dir) / name / "first.json", VERSION)
        return None if found is None else VmSpec.model_validate(found["spec"])
    except (RecordDamaged, KeyError, ValidationError):
        return None


def write_taken(state_dir: Path, name: str, numbers: Mapping[str, int]) -> None:
    """Notes the last snapshots that were taken for a standby of a VM, by disk. What cannot be noted
    is told by `semper disk snapshots`.
    """
    with contextlib.suppress(OSError):
        directory = standby_dir(state_dir) / name
        make_directory(directory, 0o700)
        write_record(directory / "taken.json", VERSION, {"numbers": dict(numbers)})


def read_taken(state_dir: Path, name: str) -> tuple[tuple[str, int], ...]:
    """What `write_taken` has noted; nothing where that cannot be read."""
    try:
        found = read_record(standby_dir(state_dir) / name / "taken.json", VERSION)
        numbers = TypeAdapter(dict[str, int]).validate_python((found or {}).get("numbers", {}))
    except (RecordDamaged, ValidationError):
        return ()
    return tuple(sorted(numbers.items()))
