"""Disks of other people's VMs: backends supervised as our own, for a QEMU that is not ours.

    STATE_DIR/guarded/VM/DISK.json        what was asked for, `GuardedDisk`
    STATE_DIR/guarded/VM/disk-DISK.json   its processes, as of every disk (`disk.record`)
    RUN_DIR/guarded/VM/                   sockets and logs of the processes, for the agent alone
    RUN_DIR/disks/VM/DISK.sock            what QEMU connects to, for whom it was opened

Such a disk is called VM/DISK as well; the VM is one of another manager, and no VM of this host has
that name meanwhile. It is served until it is unguarded: by the next agent, and after a boot of the
host. One that cannot be served at that time is tried again until it can.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import stat
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from sempervirt.core.errors import (
    InvalidRequest,
    NotFound,
    SempervirtError,
    StateConflict,
    Unavailable,
)
from sempervirt.core.names import check_name, is_name, suggest
from sempervirt.core.queue_map import DevicePlan, check_map
from sempervirt.disk.driver import Disk
from sempervirt.disk.lifecycle import adopt_disk, start_disk
from sempervirt.disk.merging import has_layers
from sempervirt.disk.running import DiskFiles
from sempervirt.disk.setup import DiskSetup, supervised
from sempervirt.disk.takeover import is_connected
from sempervirt.disk.volume import Volume
from sempervirt.host import background
from sempervirt.host.records import (
    RecordDamaged,
    make_directory,
    read_record,
    remove_record,
    write_record,
)
from sempervirt.host.sockets import Access, check_socket_path
from sempervirt.host.storage_call import call_storage
from sempervirt.qemu.command_line import Features, disk_id
from sempervirt.qemu.spec import AUTO_QUEUES_MAX, DiskSpec, VmSpec
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.planning import offer_of, plan_devices
from sempervirt.vm.setup import inspect_images, served_as

log = logging.getLogger(__name__)

VERSION = 1
AGAIN_S = 5.0
# So long an agent that begins waits for its guarded disks; what storage that hangs delays comes
# after, for our own VMs wait for the agent. So many are begun with at a time.
OPEN_S = 20.0
AT_ONCE = 8
PLAN = TypeAdapter(DevicePlan)


class GuardedDisk(BaseModel):
    """What was asked for. `socket` is where QEMU connects, if not where the agent would have it;
    owner and group by name, or as a number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    vm: str = Field(description="the VM of another manager")
    disk: DiskSpec
    socket: Path | None = None
    owner: str | None = None
    group: str | None = None
    mode: int = Field(default=0o660, ge=0, le=0o777)

    @property
    def name(self) -> str:
        """VM/DISK."""
        return f"{self.vm}/{self.disk.name}"

    @property
    def spec(self) -> VmSpec:
        """A VM with this disk alone, as far as presets and images are concerned."""
        return VmSpec(name=self.vm, vcpus=AUTO_QUEUES_MAX, disks=(self.disk,))


class Guarded:
    """Those of one agent. `disks` are served; `waiting` are not yet, each with the cause."""

    def __init__(self, config: AgentConfig) -> None:
        self.disks: dict[str, Disk] = {}
        self.wanted: dict[str, GuardedDisk] = {}
        self.waiting: dict[str, SempervirtError] = {}
        self._config = config
        self._guarding: dict[str, GuardedDisk] = {}
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._places = asyncio.Semaphore(AT_ONCE)
        self._trying: asyncio.Task[None] | None = None

    async def open(self, features: Callable[[], Any]) -> None:
        """Takes over what an earlier agent served, and serves what the boot of the host has ended;
        `features` gives QEMU's, for those. What takes longer than `OPEN_S` goes on by itself.
        """
        for wanted in await asyncio.to_thread(self._on_record):
            self.wanted[wanted.name] = wanted
            cause = Unavailable(f"disk {wanted.name} is being looked at", remedy="in a moment")
            self.waiting[wanted.name] = cause
        tried = asyncio.Event()
        self._trying = background.start(self._keep_trying(features, tried), "guarded disks")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OPEN_S):
                await tried.wait()

    async def close(self, *, keep: bool) -> None:
        """Leaves the backends running, or ends them."""
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.wait([self._trying])
        for disk in [*self.disks.values()]:
            with contextlib.suppress(SempervirtError):
                await (disk.detach() if keep else disk.stop())

    def require_no_vm(self, name: str) -> None:
        """Raises StateConflict when disks of another manager's VM have that name."""
        asked = {**self.wanted, **self._guarding}
        if taken := [disk for disk, wanted in asked.items() if wanted.vm == name]:
            raise StateConflict(
                f"{', '.join(taken)} is guarded for a VM of another manager",
                remedy=f"choose another name; or give it up: semper disk unguard {taken[0]}",
            )

    def require_served(self, name: str) -> None:
        """Raises the cause for a disk that is guarded, and cannot be served now."""
        if name in self.waiting:
            raise self.waiting[name]

    def of(self, vm: str) -> list[Disk]:
        """The disks of a VM of another manager."""
        return [disk for name, disk in self.disks.items() if name.partition("/")[0] == vm]

    async def guard(self, wanted: GuardedDisk, features: Features) -> Disk:
        """Serves an image to whoever may connect to its socket, until `unguard`.

        Raises StateConflict, InvalidRequest, ImageLocked or Unavailable: nothing is served then.
        """
        name = wanted.name
        try:
            check_name(wanted.vm)
        except ValueError as error:
            raise InvalidRequest.of(error) from error
        if name in self.wanted or name in self._guarding:
            raise StateConflict(
                f"disk {name} is guarded already", remedy=f"look at it: semper disk show {name}"
            )
        if wanted.disk.backend != "blkd":
            raise InvalidRequest("QEMU itself guards no disk")
        self._guarding[name] = wanted
        try:
            plan = (await self._plan(wanted, features))[1]
            await asyncio.to_thread(self._write, wanted, plan)
            try:
                self.disks[name] = await self._start(wanted, features)
            except SempervirtError:
                await asyncio.to_thread(self._remove, wanted)
                raise
            self.wanted[name] = wanted
        finally:
            self._guarding.pop(name, None)
        log.info("guard disk=%s image=%s socket=%s", name, wanted.disk.image, self.socket(wanted))
        return self.disks[name]

    async def unguard(self, name: str, *, force: bool = False) -> None:
        """Ends the backends and forgets the disk; the image is free then.

        Raises NotFound, OutcomeUnknown when a process does not end, and unless with `force`
        StateConflict while a QEMU is connected or the image has layers, Unavailable when that
        cannot be told.
        """
        self._wanted(name)
        async with self._turns[name]:  # while it is tried to serve the disk
            await self._unguard(self._wanted(name), force=force)

    def _wanted(self, name: str) -> GuardedDisk:
        if name not in self.wanted:
            hint = suggest(name, self.wanted) or "list them: semper disk list"
            raise NotFound(f"no disk {name} is guarded for another manager", remedy=hint)
        return self.wanted[name]

    async def _unguard(self, wanted: GuardedDisk, *, force: bool) -> None:
        name = wanted.name
        disk = self.disks.get(name)
        if disk is not None and not force and await _has_front_end(disk):
            raise StateConflict(
                f"a QEMU is connected to disk {name}, and its guest would wait for it",
                remedy="stop that VM, or detach the disk from it; or: --force",
            )
        if not force:
            await _require_plain(wanted, disk)
        if disk is not None:
            await disk.stop()
            self.disks.pop(name, None)
        self.wanted.pop(name, None)
        self.waiting.pop(name, None)
        await asyncio.to_thread(self._remove, wanted)
        log.info("unguard disk=%s", name)

    def socket(self, wanted: GuardedDisk) -> Path:
        """Where QEMU connects."""
        own = self._config.run_dir / "disks" / wanted.vm / f"{wanted.disk.name}.sock"
        return wanted.socket or own

    async def _keep_trying(self, features: Callable[[], Any], tried: asyncio.Event) -> None:
        while True:
            await asyncio.gather(*(self._try(name, features) for name in [*self.waiting]))
            tried.set()
            await asyncio.to_thread(self._renew_ways)
            await asyncio.sleep(AGAIN_S)

    def _renew_ways(self) -> None:
        """Makes directories again that somebody has removed; the sockets in them are the disks'."""
        for name in [*self.disks]:
            wanted = self.wanted.get(name)
            if wanted is None:
                continue
            directory, way = self._files(wanted).directory, self.socket(wanted).parent
            if not (directory.is_dir() and way.is_dir()):
                log.warning("guard disk=%s %s or %s was removed", name, directory, way)
                with contextlib.suppress(SempervirtError):  # it is tried again
                    self._make_way(wanted)

    async def _try(self, name: str, features: Callable[[], Any]) -> None:
        async with self._places, self._turns[name]:
            if (wanted := self.wanted.get(name)) is not None:  # it may have been given up
                await self._serve(wanted, features)

    async def _serve(self, wanted: GuardedDisk, features: Callable[[], Any]) -> None:
        name = wanted.name
        try:
            if await asyncio.to_thread(_has_run, self._files(wanted)):
                setup = self._setup(wanted, await asyncio.to_thread(self._read_plan, wanted), None)
                await asyncio.to_thread(self._make_way, wanted)
                self.disks[name] = await adopt_disk(setup)
            else:  # the host was booted since
                self.disks[name] = await self._start(wanted, (await features()).features)
        except SempervirtError as error:
            self._wait(name, error)
        except OSError as error:
            self._wait(name, Unavailable(f"disk {name} cannot be served: {error}"))
        else:
            self.waiting.pop(name, None)

    def _wait(self, name: str, cause: SempervirtError) -> None:
        if str(self.waiting.get(name)) != str(cause):
            log.error("guard disk=%s is not served: %s", name, cause)
        self.waiting[name] = cause

    async def _start(self, wanted: GuardedDisk, features: Features) -> Disk:
        volume, plan = await self._plan(wanted, features)
        setup = self._setup(wanted, plan, volume)
        await asyncio.to_thread(self._make_way, wanted)
        return await start_disk(setup)

    async def _plan(self, wanted: GuardedDisk, features: Features) -> tuple[Volume, DevicePlan]:
        volumes = await inspect_images(wanted.spec, used=False)
        offer = await offer_of(self._config, wanted.spec, features)
        return volumes[wanted.disk.name], plan_devices(wanted.spec, offer)[disk_id(wanted.disk)]

    def _setup(self, wanted: GuardedDisk, plan: DevicePlan, volume: Volume | None) -> DiskSetup:
        disk, files = wanted.disk, self._files(wanted)
        check_socket_path(files.control(10**9))
        return DiskSetup(
            name=wanted.name,
            volume=volume,
            plan=plan,
            options=served_as(disk, plan),
            command=self._config.backend,
            policy=supervised(self._config.policy, self._config.backend, read_only=disk.read_only),
            files=files,
            record=self._state_dir(wanted.vm) / f"disk-{disk.name}.json",
            access=Access(wanted.owner, wanted.group, wanted.mode),
        )

    def _files(self, wanted: GuardedDisk) -> DiskFiles:
        directory = self._config.run_dir / "guarded" / wanted.vm
        return DiskFiles(directory, wanted.disk.name, self.socket(wanted))

    def _make_way(self, wanted: GuardedDisk) -> None:
        """Makes the directories; to the socket others can get, and see nothing on the way.

        Raises Unavailable; StateConflict when something else stands where the socket is to be.
        """
        self._require_place(wanted)
        run_dir = self._config.run_dir
        try:
            make_directory(self._files(wanted).directory, 0o700)
            if wanted.socket is not None:
                return
            make_directory(run_dir / "disks" / wanted.vm, 0o711)
            for directory in (run_dir, run_dir / "disks", run_dir / "disks" / wanted.vm):
                directory.chmod(stat.S_IMODE(directory.stat().st_mode) | 0o111)
        except OSError as error:
            raise _unwritten(Path(error.filename or run_dir), error) from error

    def _require_place(self, wanted: GuardedDisk) -> None:
        """Raises StateConflict for a place that is a file's or another disk's: whoever listens
        there anew removes what is there.
        """
        place = self.socket(wanted)
        others = {**self.wanted, **self._guarding}.values()
        taken = [one for one in others if one.name != wanted.name and self.socket(one) == place]
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(place.lstat().st_mode):
                raise StateConflict(
                    f"{place} is there, and is no socket", remedy="name another place: --socket"
                )
        if taken:
            raise StateConflict(
                f"{place} is the socket of disk {taken[0].name}",
                remedy="name another place: --socket",
            )

    def _state_dir(self, vm: str) -> Path:
        return self._config.state_dir / "guarded" / vm

    def _record(self, wanted: GuardedDisk) -> Path:
        return self._state_dir(wanted.vm) / f"{wanted.disk.name}.json"

    def _write(self, wanted: GuardedDisk, plan: DevicePlan) -> None:
        content = {"disk": wanted.model_dump(mode="json"), "plan": PLAN.dump_python(plan)}
        try:
            make_directory(self._state_dir(wanted.vm), 0o700)
            write_record(self._record(wanted), VERSION, content, durable=True)
        except OSError as error:
            raise _unwritten(self._record(wanted), error) from error

    def _remove(self, wanted: GuardedDisk) -> None:
        remove_record(self._record(wanted))
        others = [*self.wanted.values(), *self._guarding.values()]
        if not [one for one in others if one.vm == wanted.vm and one.name != wanted.name]:
            shutil.rmtree(self._files(wanted).directory, ignore_errors=True)
            # Not the directory of a socket that somebody has named: it is whose it is.
            for directory in (
                self._state_dir(wanted.vm),
                self._config.run_dir / "disks" / wanted.vm,
            ):
                with contextlib.suppress(OSError):
                    directory.rmdir()  # if nothing else is in it

    def _on_record(self) -> list[GuardedDisk]:
        found = []
        try:
            paths = sorted(self._state_dir("x").parent.glob("*/*.json"))
        except OSError as error:
            log.error("guard records cannot be listed: %s", error)  # noqa: TRY400
            return []
        for path in paths:
            if path.name.startswith("disk-") or not is_name(path.parent.name):
                continue
            try:
                found.append(_read(path)[0])
            except RecordDamaged as error:
                log.error("guard %s", error)  # noqa: TRY400
        return found

    def _read_plan(self, wanted: GuardedDisk) -> DevicePlan:
        return _read(self._record(wanted))[1]


def _read(path: Path) -> tuple[GuardedDisk, DevicePlan]:
    """Raises RecordDamaged."""
    content: Mapping[str, Any] = read_record(path, VERSION) or {}
    try:
        wanted = GuardedDisk.model_validate(content["disk"])
        plan = PLAN.validate_python(content["plan"])
        check_map(plan.binding.map)
        if (wanted.vm, wanted.disk.name) != (path.parent.name, path.stem):
            raise ValueError(f"it tells of {wanted.name}")
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RecordDamaged(
            f"{path} does not tell of a guarded disk: {str(error)[:200]}",
            remedy="move the file away, and guard the disk again",
        ) from error
    return wanted, plan


def _has_run(files: DiskFiles) -> bool:
    """Whether the disk was served since the host was booted: then the image is the one of then.
    What is on record of an earlier boot says nothing of it, for devices have other numbers now.
    """
    return bool(files.logs() or files.find_identities())


def _unwritten(path: Path, error: OSError) -> Unavailable:
    return Unavailable(f"{path} cannot be written: {error.strerror}", remedy="make room there")


async def _has_front_end(disk: Disk) -> bool:
    """Whether a QEMU is connected; one that nobody can tell of is taken to be, also where no
    backend lives now and one had a QEMU before.
    """
    try:
        return is_connected(await disk.status())
    except SempervirtError:
        return disk.active_pid is not None or disk.connection_expected


async def _require_plain(wanted: GuardedDisk, disk: Disk | None) -> None:
    """Raises StateConflict when the image alone is not the disk, for who has the image then does
    not know; Unavailable when that cannot be told.
    """
    image = wanted.disk.image
    if wanted.disk.read_only:
        return
    try:
        layered = await _is_layered(image, disk)
    except OSError as error:
        raise Unavailable(
            f"whether {image} has snapshots cannot be told: {error.strerror}", remedy="or: --force"
        ) from error
    if layered:
        raise StateConflict(
            f"disk {wanted.name} has snapshots: what its guest wrote since stands in "
            f"{image}.layers, and other programs would take an old state for the disk",
            remedy=f"semper disk unguard {wanted.name} --force, and then, before anything else "
            f"opens the image: semper-blkd --blk-file {image} --merge all "
            f"--layer-map /dev/shm/{image.name}",
        )


async def _is_layered(image: Path, disk: Disk | None) -> bool:
    """Whether there are layers above an image; where no backend can tell, whether there ever were.
    Raises OSError, Unavailable.
    """
    if disk is not None:
        with contextlib.suppress(SempervirtError):
            return bool((await disk.active().layers()).layers)
    return await call_storage(image, partial(has_layers, image))
