"""What a saved state describes, and what a restore or a clone changes of it.

Restore: the disks' states are checked, the memory is unpacked and verified while backends and QEMU
start, the devices are loaded, and only then the guest runs. The file is only read: it can be
restored again as long as the disks are as it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import ValidationError

from sempervirt.core.errors import InvalidRequest, StateConflict
from sempervirt.host import process
from sempervirt.host.storage_call import call_storage
from sempervirt.qemu.saved import Shown
from sempervirt.qemu.spec import VmSpec
from sempervirt.renewal.save.adapters import VERSION
from sempervirt.store.whole import require_whole

COPY_DEADLINE_S = 3600.0


@dataclass(frozen=True)
class Plan:
    """A VM as a saved state describes it, to be restored. `machine` is the versioned name of the
    guest's machine; `running`: the guest is to run; `images` by the disk's name.
    """

    spec: VmSpec
    accelerator: str
    machine: str
    running: bool
    images: Mapping[str, Path]


@dataclass(frozen=True)
class Changes:
    """What is to be different from the VM that was saved.

    `images` by the disk's name, `taps` by the tap that was used before. With `new_macs` the
    cards have addresses that go with the new name; a guest that runs sees them when its driver
    starts anew, for the address is part of the device's state.
    """

    name: str | None = None
    images: Mapping[str, Path] = field(default_factory=dict)
    taps: Mapping[str, str] = field(default_factory=dict)
    new_macs: bool = False


NO_CHANGES = Changes()


def plan_of(shown: Shown, changes: Changes) -> Plan:
    """The VM to restore.

    Raises InvalidRequest for a description that this release does not understand.
    """
    about = shown.vm
    if about.get("version") != VERSION:
        raise InvalidRequest(
            f"the saved state describes its VM in version {about.get('version')!r}, this program "
            f"knows {VERSION}",
            remedy="use the release that wrote it",
        )
    try:
        spec = VmSpec.model_validate(about["spec"])
        accelerator, machine = str(about["accelerator"]), str(about["machine"])
        running = bool(about["running"])
        changed = _changed(spec, changes)
        spec = VmSpec.model_validate(changed)
    except (KeyError, TypeError, ValidationError) as error:
        raise InvalidRequest(f"the saved state does not describe a VM: {error}") from error
    return Plan(spec, accelerator, machine, running, {d.name: d.image for d in spec.disks})


def _changed(spec: VmSpec, changes: Changes) -> dict[str, Any]:
    known = {disk.name for disk in spec.disks}, {nic.tap for nic in spec.nics}
    for what, given, there in (
        ("disk", changes.images, known[0]),
        ("network on the tap", changes.taps, known[1]),
    ):
        if unknown := set(given) - there:
            raise InvalidRequest(f"the saved VM has no {what} {min(unknown)}")
    changed = spec.model_dump(mode="json") | {"name": changes.name or spec.name}
    for disk in changed["disks"]:
        disk["image"] = str(changes.images.get(disk["name"], disk["image"]))
    for nic in changed["nics"]:
        nic["tap"] = changes.taps.get(nic["tap"], nic["tap"])
        if changes.new_macs:
            nic["mac"] = None
    if spec.generation_id is not None:
        changed["generation_id"] = str(uuid4())  # the guest sees the time since the save again
    return changed


async def copy_images(shown: Shown, directory: Path, name: str) -> dict[str, Path]:
    """Copies of a saved state's images, shared with the original where the storage can do that.

    Raises InvalidRequest when a copy is there already, StateConflict for an image that is not the
    whole disk, CommandFailed; no copy is left then.
    """
    copies: dict[str, Path] = {}
    async with AsyncExitStack() as undo:
        for disk, image in shown.images.items():
            await require_whole(image, "copied")
            copy = directory / f"{name}-{disk}.raw"
            if await call_storage(copy, copy.exists):
                raise InvalidRequest(f"{copy} exists", remedy="choose another name or directory")
            copies[disk] = copy
            unlink = partial(copy.unlink, missing_ok=True)
            undo.push_async_callback(call_storage, copy, unlink)
            argv = ["cp", "--reflink=auto", "--sparse=always", str(image), str(copy)]
            await process.run(argv, timeout_s=COPY_DEADLINE_S)
        undo.pop_all()
    return copies


def check_accelerator(plan: Plan, present: str) -> None:
    """Raises StateConflict: a processor's state means nothing to another accelerator."""
    if plan.accelerator != present:
        raise StateConflict(
            f"the VM was saved under {plan.accelerator}, this host would run it under {present}"
        )
