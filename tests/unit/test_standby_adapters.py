"""The files of standbys: what is theirs is removed, and nothing else."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sempervirt.core.errors import StateConflict, Unavailable
from sempervirt.disk.answers import LayerState
from sempervirt.disk.backend import ImageTitle
from sempervirt.host import tap as taps
from sempervirt.host.places import Places
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.standby import adapters, disks, network
from sempervirt.standby.adapters import LiveGenerations
from sempervirt.standby.disks import DisksHere
from sempervirt.standby.first import WatchedFirst
from sempervirt.standby.record import Guest, write_guest
from sempervirt.standby.service import ask_tcp
from sempervirt.standby.values import Tier
from sempervirt.store import epoch
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.vm import Vm


async def nothing(*_: object) -> Any:
    """Nobody asks for it."""
    raise AssertionError


class Merging:
    """A disk of the first VM: as much of `Disk` as gives a snapshot up."""

    def __init__(self, *snapshots: int) -> None:
        self.name = "web/root"
        self.snapshots = list(snapshots)

    def active(self) -> Any:
        """Its backend."""
        return self

    async def layers(self) -> Any:
        """One for each snapshot."""
        sealed = [SimpleNamespace(id=one, state=LayerState.SEALED) for one in self.snapshots]
        return SimpleNamespace(layers=sealed)

    async def merge(self, through: int, _rate: int | None) -> None:
        """Gives up all snapshots up to that one."""
        self.snapshots = [one for one in self.snapshots if one > through]


def spec(image: Path) -> VmSpec:
    """A VM with one disk that is copied."""
    return VmSpec.model_validate({"name": "web", "disks": [{"name": "root", "image": str(image)}]})


def generations(place: Path, current: Any) -> LiveGenerations:
    """Those of a VM `current`."""
    config = AgentConfig(place / "s", place / "r")
    current_vm = cast("Vm | None", current)
    first = SimpleNamespace(
        spec=None if current is None else current.spec,
        fenced=(None, ""),
        left=None,
        disks=lambda: DisksHere(cast("Vm", current), nothing),
        let_go=lambda: None,
    )
    return LiveGenerations(config, "web", lambda: current_vm, nothing, nothing, "here", first)


def running(image: Path, *snapshots: int) -> Any:
    """The VM that runs from `image`."""
    described = spec(image)
    disks = {"root": Merging(*snapshots)}
    return SimpleNamespace(spec=described, pinned_spec=described, disks=disks)


def exporting(write: Callable[[Path], None]) -> Any:
    """In place of `disk.export`: the copy is what `write` makes of it."""

    async def export(_disk: Any, _snapshot: int, target: Path, *_: object) -> None:
        write(target)

    return export


async def test_a_standby_whose_copy_would_have_the_name_of_the_vms_own_image_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is when a standby took over, was forgotten as one, and standbys are begun anew."""
    image = tmp_path / "web.raw.standby-3"
    image.write_text("all that the VM has")
    monkeypatch.setattr(disks, "export", exporting(lambda target: target.touch()))
    made = generations(tmp_path, running(image, 7))
    with pytest.raises(StateConflict, match="is there already"):
        await made.copy(3, (("root", 7),), (("root", 7),))
    await made.remove(3)
    assert image.read_text() == "all that the VM has"
    # The control: another number has a copy, which goes with it.
    await made.copy(4, (("root", 8),), (("root", 8),))
    copy = tmp_path / "web.raw.standby-4"
    assert copy.exists()
    await made.remove(4)
    assert not copy.exists()
    assert image.exists()


async def test_the_image_of_the_vm_is_not_removed_whatever_a_record_says(tmp_path: Path) -> None:
    image = tmp_path / "web.raw.standby-3"
    image.touch()
    directory = tmp_path / "s/standby/web/3"
    directory.mkdir(parents=True)
    write_guest(directory, Guest(spec(image), {}))
    await generations(tmp_path, running(image)).remove(3)
    assert image.exists()
    directory.mkdir(parents=True)
    write_guest(directory, Guest(spec(image), {}))
    await generations(tmp_path, running(tmp_path / "web.raw")).remove(3)
    assert not image.exists()


async def test_a_copy_that_fails_leaves_no_snapshot_to_the_first_vm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(_target: Path) -> None:
        raise Unavailable("no space left")

    vm = running(tmp_path / "web.raw", 7)
    made = generations(tmp_path, vm)
    monkeypatch.setattr(disks, "export", exporting(fill))
    with pytest.raises(Unavailable, match="no space left"):
        await made.copy(1, (("root", 7),), (("root", 7),))
    assert vm.disks["root"].snapshots == []


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize(("free_bytes", "fits"), [(1 << 20, False), (4 << 20, True)])
async def test_a_copy_that_would_fill_the_file_system_is_not_begun(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free_bytes: int,
    *,
    layer: bool,
    fits: bool,
) -> None:
    """The disk of the VM that runs would have no room for what its guest writes."""
    image = tmp_path / "web.raw"
    file = tmp_path / "web.raw.layers/1" if layer else image
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x" * (1 << 20))
    room = SimpleNamespace(f_bavail=free_bytes // 4096, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _path: room)
    monkeypatch.setattr(disks, "export", exporting(lambda target: target.touch()))
    vm = running(image, 7)
    made = generations(tmp_path, vm)
    if fits:
        await made.copy(1, (("root", 7),), (("root", 7),))
    else:
        with pytest.raises(Unavailable, match="room"):
            await made.copy(1, (("root", 7),), (("root", 7),))
    assert (tmp_path / "web.raw.standby-1").exists() is fits
    assert vm.disks["root"].snapshots == []


@pytest.mark.parametrize("more", [-1, 0])
async def test_no_second_guest_is_booted_where_the_first_one_would_have_to_go_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    directory = tmp_path / "s/standby/web/1"
    directory.mkdir(parents=True)
    guest = spec(tmp_path / "web.raw.standby-1")
    write_guest(directory, Guest(guest, {}))
    monkeypatch.setattr(adapters, "memory_available", lambda: guest.memory + more)
    with pytest.raises(Unavailable if more < 0 else AssertionError):  # which goes on to the start
        await generations(tmp_path, None).boot(1)


async def test_a_vm_that_was_started_with_other_disks_meanwhile_is_not_copied(
    tmp_path: Path,
) -> None:
    made = generations(tmp_path, running(tmp_path / "web.raw"))
    with pytest.raises(Unavailable, match="anew"):
        await made.copy(1, (("other", 7),), ())


async def test_of_a_link_in_the_place_of_an_image_only_the_link_goes(tmp_path: Path) -> None:
    other, image = tmp_path / "other.raw", tmp_path / "web.raw.standby-1"
    for path in (other, epoch.record_path(other), tmp_path / "web.raw.standby-1.epoch"):
        path.touch()
    image.symlink_to(other)
    directory = tmp_path / "s/standby/web/1"
    directory.mkdir(parents=True)
    write_guest(directory, Guest(spec(image), {}))
    await generations(tmp_path, None).remove(1)
    assert other.exists()
    assert epoch.record_path(other).exists()
    assert not image.is_symlink()
    assert not (tmp_path / "web.raw.standby-1.epoch").exists()


async def test_what_the_storage_does_not_let_go_stays_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "web.raw.standby-1"
    directory = tmp_path / "s/standby/web/1"
    directory.mkdir(parents=True)
    write_guest(directory, Guest(spec(image), {}))
    made = generations(tmp_path, None)

    async def silent(*_: object) -> None:
        raise Unavailable("the storage has not answered")

    with monkeypatch.context() as patched:
        patched.setattr(adapters, "call_storage", silent)
        with pytest.raises(Unavailable):
            await made.remove(1)
    assert (directory / "guest.json").exists()
    await made.remove(1)
    assert not directory.exists()


def test_a_tap_of_another_name_is_its_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    removed = []

    class Remover:
        def __init__(self, name: str) -> None:
            removed.append(name)

        def remove(self) -> None:
            """Notes nothing more."""

    monkeypatch.setattr(taps, "Remover", Remover)
    ours = network.tap_of("web", 3, 1)
    nics = [{"type": "tap", "tap": tap} for tap in ("sbr0-web", "sb0", ours)]
    network.remove(VmSpec.model_validate({"name": "web", "nics": nics}))
    assert removed == [ours]


async def test_a_service_that_is_no_address_is_silent_and_ends_nobody() -> None:
    for service in ("a..b:80", f"{'x' * 70}:80", "\0:80", "127.0.0.1:99999"):
        async with asyncio.timeout(90):
            assert service in await ask_tcp(service)


async def test_a_claim_that_came_to_nothing_does_not_keep_the_first_vm_from_its_disk(
    tmp_path: Path,
) -> None:
    record = epoch.record_path(tmp_path / "data.raw")

    async def refuses(_title: ImageTitle) -> None:
        raise StateConflict("the backend has ended")

    async def killed(_why: str) -> None:
        """It is."""

    async def detached() -> None:
        """It is."""

    title = ImageTitle(record, "here", None, None)
    disk = SimpleNamespace(
        setup=SimpleNamespace(title=title, options=SimpleNamespace(image=tmp_path / "data.raw")),
        claim=refuses,
    )
    data = {"name": "data", "image": str(tmp_path / "data.raw"), "keep": "latest"}
    waits: Any = SimpleNamespace(
        spec=VmSpec.model_validate({"name": "web", "disks": [data]}),
        run=Runstate.PAUSED,
        disks={"data": disk},
        kill=killed,
        detach=detached,
    )
    made = generations(tmp_path, None)
    made.vms[1] = waits
    with pytest.raises(StateConflict, match="backend has ended"):
        await made.claim(1)
    claimed = epoch.read_epoch(record)
    assert claimed is not None
    assert (claimed.holder, claimed.released) == ("here", False)
    await made.remove(1)
    released = epoch.read_epoch(record)
    assert released is not None
    assert (released.epoch, released.released) == (claimed.epoch, True)


@pytest.mark.parametrize("tier", list(Tier))
async def test_what_has_loaded_its_state_gives_way_to_one_that_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: Tier
) -> None:
    said: list[object] = []
    kept = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def opened(pid: int) -> int:
        said.append(f"memory of {pid}")
        return kept

    async def killed(why: str) -> None:
        said.append(why)

    async def detached() -> None:
        """It is."""

    async def starts(number: int, beginning: Any, machine: str) -> None:
        said.append((number, beginning.memory_fd == kept, machine))

    made = generations(tmp_path, None)
    loaded: Any = SimpleNamespace(pid=4711, kill=killed, detach=detached)
    made.vms[1] = loaded
    monkeypatch.setattr("sempervirt.qemu.memory.open_of", opened)
    monkeypatch.setattr(made, "_start", starts)
    await made.stand_again(1, "pc-q35-10.0", tier)
    called_off = "its take-over was called off"
    if tier is Tier.READY:  # its memory outlives it
        assert said == ["memory of 4711", called_off, (1, True, "pc-q35-10.0")]
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(kept)
        # The control: of one that has ended by itself nothing can wait.
        loaded.pid = None
        made.vms[1] = loaded
        with pytest.raises(Unavailable, match="its memory with it"):
            await made.stand_again(1, "pc-q35-10.0", tier)
    else:
        os.close(kept)
        assert said == [called_off]
        assert not made.vms


async def test_a_standby_in_a_file_has_its_taps_also_after_a_reboot_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "s/standby/web/1"
    directory.mkdir(parents=True)
    nics = [{"type": "tap", "tap": network.tap_of("web", 1, 0)}]
    guest = VmSpec.model_validate({"name": "web", "nics": nics})
    write_guest(directory, Guest(guest, {}))
    said: list[object] = []

    async def starts(*_: object, **__: object) -> Vm:
        said.append("QEMU")
        raise Unavailable("enough was seen")

    made = generations(tmp_path, None)
    monkeypatch.setattr(network, "prepare", said.append)
    monkeypatch.setattr(made, "_start", starts)
    with pytest.raises(Unavailable, match="enough"):
        await made.load(1, "pc-q35-10.0", Tier.FILE)
    assert said == [guest, "QEMU"]


async def test_a_take_over_from_a_vm_that_nobody_knows_any_more_is_given_up() -> None:
    """It would wait for ever, and keep the VM from being started."""
    first = WatchedFirst("web", lambda: None, nothing, lambda _vm: Places(Path(), Path()), 1.0)
    with pytest.raises(StateConflict, match="not on the list"):
        await first.fence(kill=True)
