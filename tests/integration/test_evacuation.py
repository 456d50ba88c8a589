"""A host is emptied: eleven VMs of different sizes on one host, and another one with little room.

The VMs get no further than their firmware: what is shown here is which VM leaves when, and what is
said of it. That a guest notices nothing of a move is shown by `tests/migration`.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from lab.network import UNLIMITED
from lab.world import DEADLINE_S, POLL_S, QEMU, Host, World
from sempervirt.core.errors import NotFound
from sempervirt.evacuation.values import CONCURRENCY, Fate, Reason
from sempervirt.host.readiness import NICE
from sempervirt.qemu.spec import VmSpec
from sempervirt.store import epoch
from sempervirt.store.records import Custody

pytestmark = [pytest.mark.root, pytest.mark.slow]
CONFLICT, UNAVAILABLE = 5, 6
WIRED = "semper-wired"
MIB = 1 << 20
# Name, memory in MiB, priority. Eight fit into what the other host gives its guests.
GOING = (
    ("e1", 32, 90), ("e2", 48, 90), ("e3", 64, 70), ("e4", 32, 70),
    ("e5", 40, 50), ("e6", 56, 50), ("e7", 32, 10), ("e8", 72, 10),
)  # fmt: skip
ROOM = sum(memory for _, memory, _ in GOING) + 8
LEFT = {
    "nat": Reason.OBSTACLES,  # its network card ends with its QEMU
    "own": Reason.OBSTACLES,  # its disk is served by QEMU itself
    "big": Reason.NO_MEMORY,
}


def spec(world: World, name: str, memory: int, priority: int, **more: Any) -> VmSpec:
    image = world.images / f"{name}.raw"
    image.touch()
    os.truncate(image, 4 * MIB)
    disk = {"name": "root", "image": str(image), **more.pop("disk", {})}
    described = {"name": name, "memory": memory * MIB, "ha": {"priority": priority}}
    return VmSpec.model_validate({**described, "disks": [disk], **more})


@asynccontextmanager
async def world_with(
    specs: Iterable[tuple[str, int, int]], room: int, *, ready: int = 0
) -> AsyncIterator[World]:
    """VMs on host a, which keeps ready what so many moves need; host b gives its guests so many
    MiB.
    """
    async with World.opened(UNLIMITED) as world:
        if ready:
            await world.a.end_agent()
            world.a.options = ("--ready-moves", str(ready))
            await world.a.start_agent()
        await world.b.end_agent()
        world.b.options = ("--guest-memory", f"{room}M")
        await world.b.start_agent()
        await world.wait_members()
        await run_vms(world, specs)
        yield world


async def evacuation(host: Host) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(
        await host.semper("host", "evacuate", "--show", "--output", "json")
    )
    return said


async def states(host: Host) -> dict[str, str]:
    async with host.client() as client:
        return {vm.name: vm.state.value for vm in await client.vms()}


async def over(host: Host) -> dict[str, Any]:
    """What the host says of its evacuation, when that is over."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            said = await evacuation(host)
            if said["over"]:
                return said
            await asyncio.sleep(POLL_S)  # poll interval


async def listed(host: Host, why: str, *, told: bool) -> None:
    """Until `semper host list` says that, or does not say it any more."""
    async with asyncio.timeout(DEADLINE_S):
        while (why in await host.semper("host", "list")) is not told:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)  # poll interval


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)  # poll interval


async def most_at_once(host: Host, asked: asyncio.Task[str]) -> int:
    """How many VMs were on their way together, until the command that asked for it ended."""
    most = 0
    async with host.client() as client:
        while not asked.done():
            with suppress(NotFound):  # it has not begun
                vms = (await client.evacuation()).vms
                most = max(most, sum(one.fate is Fate.MOVES for one in vms))
            await asyncio.sleep(POLL_S)  # poll interval
    return most


async def test_eight_vms_leave_a_host_and_three_are_named() -> None:
    async with world_with(GOING, ROOM) as world:
        a, b = world.hosts
        async with a.client() as client:
            await client.run_vm(spec(world, "nat", 32, 80, nics=[{"type": "user"}]))
            await client.run_vm(spec(world, "own", 32, 80, disk={"backend": "qemu"}))
            await client.run_vm(spec(world, "big", 256, 5))

        planned = json.loads(await dry_run(a))
        assert {one["vm"]: one["reason"] for one in planned["left"]} == {
            vm: reason.value for vm, reason in LEFT.items()
        }
        assert [move["priority"] for move in planned["moves"]] == [90, 90, 70, 70, 50, 50, 10, 10]
        await check_places(a)
        assert await states(b) == {}

        command = a.semper("host", "evacuate", "--why", "a fan is loud", code=UNAVAILABLE)
        asked = asyncio.create_task(command)
        at_once = await most_at_once(a, asked)
        complaint = await asked
        assert at_once == CONCURRENCY
        assert "still here" in complaint
        assert all(vm in complaint for vm in LEFT)
        done = await evacuation(a)
        fates = {one["vm"]: one["fate"] for one in done["vms"]}
        assert fates == {
            **{vm: Fate.MOVED.value for vm, _, _ in GOING},
            **dict.fromkeys(LEFT, Fate.STAYS.value),
        }
        assert done["over"]
        assert not done["emptied"]
        await check_there(world, done)
        await check_out_of_service(world)


async def check_places(a: Host) -> None:
    """Each host is told with its reason, of a VM that fits, and of one that cannot move."""
    found = {}
    for vm in (GOING[0][0], "nat"):
        found[vm] = json.loads(await a.semper("vm", "place", vm, "--output", "json"))
    b, own = found[GOING[0][0]]["hosts"]
    assert (b["host"], b["fits"]) == ("b", True)
    assert (own["host"], own["against"]) == ("a", ["it runs there"])
    assert b["score"] == sum(part["points"] for part in b["points"]) > 0
    assert "user-mode networking" in found["nat"]["hosts"][0]["against"][0]
    assert "of memory left beside it" in await a.semper("vm", "place", GOING[0][0])
    # The largest one has no room beside the others.
    await a.semper("cluster", "capacity", code=CONFLICT)


async def dry_run(host: Host) -> str:
    """The plan as JSON; its exit code says that VMs would stay."""
    process = await asyncio.create_subprocess_exec(
        *host.command("semper", "host", "evacuate", "--dry-run", "--output", "json"),
        stdout=asyncio.subprocess.PIPE,
        env=host.environment,
    )
    async with asyncio.timeout(DEADLINE_S):
        out, _ = await process.communicate()
    assert process.returncode == CONFLICT
    return out.decode()


async def check_there(world: World, done: dict[str, Any]) -> None:
    """What was said is so, and the order and the bound were kept."""
    a, b = world.hosts
    there = await states(b)
    assert there == {vm: "running" for vm, _, _ in GOING}
    for vm, _, _ in GOING:
        owned = await world.ownership(vm)
        assert (owned.owner, owned.custody) == ("b", Custody.OWNED)
    assert len(a.processes(QEMU)) == len(LEFT)
    assert len(b.processes(QEMU)) == len(GOING)
    moved = [one for one in done["vms"] if one["fate"] == "moved"]
    begun = [one["vm"] for one in sorted(moved, key=lambda one: float(one["began_s"]))]
    priorities = {vm: priority for vm, _, priority in GOING}
    assert [priorities[vm] for vm in begun] == sorted(priorities.values(), reverse=True)


async def check_out_of_service(world: World) -> None:
    """Nothing comes to the host, or is started on it, until it is put in again."""
    a, b = world.hosts
    assert "a fan is loud" in await a.semper("host", "show")
    await listed(b, "a fan is loud", told=True)
    refused = await b.semper("vm", "migrate", "e1", "--to", "a", code=CONFLICT)
    assert "a is out of service: a fan is loud" in refused
    async with a.client() as client:
        with pytest.raises(Exception, match="out of service"):
            await client.run_vm(spec(world, "new", 32, 50))
    await a.semper("host", "return")
    await listed(b, "a fan is loud", told=False)
    # The control: now it goes.
    await b.semper("vm", "migrate", "e1", "--to", "a")
    assert (await states(a))["e1"] == "running"


async def test_the_next_agent_goes_on_with_an_evacuation() -> None:
    vms = GOING[:4]
    async with world_with(vms, ROOM) as world:
        a, b = world.hosts
        await a.semper("host", "evacuate", "--concurrency", "1", "--detach")
        await until(lambda: len(b.processes(QEMU)) > 1)
        a.kill_agent()
        assert len(b.processes(QEMU)) < len(vms)  # it was not over yet
        await a.start_agent()
        done = await over(a)
        assert done["emptied"], done
        assert {one["vm"] for one in done["vms"]} == {vm for vm, _, _ in vms}
        assert await states(b) == {vm: "running" for vm, _, _ in vms}
        assert a.processes(QEMU) == []
        await check_bring_back(world, {vm for vm, _, _ in vms})


async def check_bring_back(world: World, vms: set[str]) -> None:
    """An operator whom both hosts know has the VMs come back; one whom none knows has not."""
    a, b = world.hosts
    key = world.images.with_name("operator.pem")
    await a.semper("operator", "add", "ops", "--role", "viewer", "--to", str(key))
    await known(b, key)
    refused = await a.semper("host", "return", "--bring-back", str(key), code=UNAVAILABLE)
    assert "has the role viewer" in refused
    assert b.processes(QEMU) != []
    key.unlink()
    await a.semper("operator", "add", "ops", "--role", "operator", "--to", str(key))
    await known(b, key)
    await a.semper("host", "return", "--bring-back", str(key))
    assert b.processes(QEMU) == []
    assert {vm for vm, state in (await states(a)).items() if state == "running"} == vms


async def known(host: Host, key: Path) -> None:
    """Until the host's agent answers the holder of that key."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                asked = ("--host", f"{host.name}@{host.address}", "--key", str(key))
                await host.semper(*asked, "vm", "list")
            except AssertionError:
                await asyncio.sleep(POLL_S)  # poll interval
            else:
                return


# Hosts on which much does not work any more


@contextmanager
def freezable(directory: Path) -> Iterator[Callable[[str], None]]:
    """A file system of its own for a directory; gives what freezes ("-f") and thaws ("-u") it."""
    image = directory.with_name(f"{directory.name}.img")
    image.touch()
    os.truncate(image, 64 * MIB)
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as undo:
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, directory], check=True)
        undo.callback(lambda: subprocess.run(["umount", "--lazy", directory], check=True))

        def freeze(how: str) -> None:
            subprocess.run(["fsfreeze", how, directory], check=True)

        yield freeze
        with suppress(subprocess.CalledProcessError):
            freeze("-u")


async def run_vms(world: World, vms: Iterable[tuple[str, int, int]]) -> None:
    async with world.a.client() as client:
        for name, memory, priority in vms:
            await client.run_vm(spec(world, name, memory, priority))


def fill(directory: Path) -> Path:
    """Leaves no room in the file system of a directory; gives the file that takes the room."""
    taken = directory / "taken"
    with suppress(OSError), taken.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))
    return taken


async def test_a_host_is_emptied_whose_file_system_is_full_or_frozen() -> None:
    vms = GOING[:2]
    async with World.opened(UNLIMITED) as world:
        a, b = world.hosts
        await a.end_agent()
        kept = a.config.state_dir.with_name("kept")
        a.config.state_dir.rename(kept)
        with freezable(a.config.state_dir) as freeze:
            shutil.copytree(kept, a.config.state_dir, dirs_exist_ok=True)
            a.config.state_dir.chmod(0o700)
            await a.start_agent()
            await world.wait_members()
            await run_vms(world, vms)
            check_ready(a)
            taken = await asyncio.to_thread(fill, a.config.state_dir)
            # The control: what has to be on record is not begun.
            complaint = await a.semper("host", "evacuate", code=UNAVAILABLE)
            assert "cannot be written" in complaint
            assert await states(b) == {}
            # A host that goes down does not wait for room.
            await a.semper("host", "evacuate", "--shutdown")
            assert await states(b) == {vm: "running" for vm, _, _ in vms}
            assert a.processes(QEMU) == []
            taken.unlink()
            await a.semper("host", "return")
            await run_vms(world, GOING[2:3])
            (a.config.state_dir / "evacuation.json").unlink()
            freeze("-f")
            await a.semper("host", "evacuate", "--without-records")
            assert await states(b) == {vm: "running" for vm, _, _ in GOING[:3]}
            assert a.processes(QEMU) == []
            assert not (a.config.state_dir / "evacuation.json").exists()
            freeze("-u")
            # What was in memory gets there now.
            await until(lambda: says_over(a.config.state_dir / "evacuation.json"))
            a.kill_agent()


def check_ready(host: Host) -> None:
    """The agent's memory is locked and it goes before guests, which inherit nothing of that."""
    pid, guest = host.agent_pid, host.processes(QEMU)[0]
    assert locked_kib(pid) > 10_000
    assert os.getpriority(os.PRIO_PROCESS, pid) == NICE
    assert locked_kib(guest) == 0
    assert os.getpriority(os.PRIO_PROCESS, guest) == 0


def locked_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmLck:")[1].split()[0])


def says_over(path: Path) -> bool:
    if not path.exists():
        return False
    return bool(json.loads(path.read_text())["evacuation"]["step"] == "over")


PIDS = Path("/sys/fs/cgroup/pids")


@contextmanager
def no_new_process(pid: int) -> Iterator[None]:
    """The kernel makes no thread and no process any more for this one."""
    group = PIDS / f"sv{os.getpid()}.{pid}"
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(pid))
        (group / "pids.max").write_text((group / "pids.current").read_text())
        yield
    finally:
        (group / "pids.max").write_text("max")
        (PIDS / "cgroup.procs").write_text(str(pid))
        with suppress(OSError):
            group.rmdir()


def no_more_memory(pid: int) -> None:
    """From now on the kernel gives the process no memory beyond what the process has."""
    status = Path(f"/proc/{pid}/status").read_text()
    size = int(status.split("VmSize:")[1].split()[0]) << 10
    resource.prlimit(pid, resource.RLIMIT_AS, (size, size))


@pytest.mark.skipif(not PIDS.exists(), reason="needs the pids controller of cgroups, version 1")
async def test_a_host_is_emptied_that_refuses_to_fork_and_has_no_memory_left() -> None:
    """What the moves need is there beforehand."""
    vms = GOING[:2]
    async with world_with(vms, ROOM, ready=len(vms)) as world:
        a, b = world.hosts
        await until(lambda: len(a.processes(WIRED)) == len(vms))
        with no_new_process(a.agent_pid):
            no_more_memory(a.agent_pid)
            await a.semper("host", "evacuate", "--shutdown", "--deadline", "60s")
        assert await states(b) == {vm: "running" for vm, _, _ in vms}
        assert a.processes(QEMU) == []
        assert "one that waited takes its place" in a.log_tail(1000)


async def test_a_host_that_goes_down_while_the_store_is_away_is_emptied_by_what_was_known() -> None:
    """The images say whose the VMs are, and the store learns of it when it is back."""
    vms = GOING[:2]
    names = {vm for vm, _, _ in vms}
    async with world_with(vms, ROOM) as world:
        a, b = world.hosts
        await until(lambda: "peacetime hosts=2 able=a,b" in a.log_tail(1000))
        before = {vm: await world.ownership(vm) for vm in names}
        await asyncio.to_thread(world.etcd.kill)
        # The control, and what an operator gets: nothing is moved, and the host is in service.
        complaint = await a.semper("host", "evacuate", code=UNAVAILABLE)
        assert "etcd" in complaint
        assert "out of service" not in await a.semper("host", "show")
        assert await states(b) == {}
        await a.semper("host", "evacuate", "--shutdown")
        assert await states(b) == dict.fromkeys(names, "running")
        assert a.processes(QEMU) == []
        on_record = {vm: epoch.read_epoch(world.images / f"{vm}.raw.epoch") for vm in names}
        for vm, record in on_record.items():
            assert record is not None
            assert (record.holder, record.epoch) == ("b", before[vm].epoch + 1)
        await asyncio.to_thread(world.etcd.start)
        async with asyncio.timeout(DEADLINE_S):
            while {(await world.ownership(vm)).owner for vm in names} != {"b"}:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)  # poll interval
        for vm in names:
            owned, record = await world.ownership(vm), on_record[vm]
            assert record is not None
            assert (owned.epoch, owned.claim) == (record.epoch, record.claim)
        # Nothing is left of the way by the images: the VM comes back by the store.
        await a.semper("host", "return")
        await listed(b, "the host goes down", told=False)
        await b.semper("vm", "migrate", "e1", "--to", "a")
        assert (await states(a))["e1"] == "running"
        owned = await world.ownership("e1")
        assert (owned.owner, owned.epoch) == ("a", before["e1"].epoch + 2)
