"""Installs, upgrades, removes and purges the packages on a fresh Debian, with VMs under load.

    python -m tests.packages [--suite bookworm|trixie] [--vms 5] [--keep] [--built OLD NEW]

The root is made by mmdebstrap, and has Debian's systemd as PID 1 of its own namespaces (`host.sh`).
Two versions are built by `scripts/deb`, each twice: the bytes have to be the same. Then

install   semperd runs, `semper` and its manual page are there, a VM starts
upgrade   with VMs whose guests write and verify: no error, the same QEMUs, another agent, and each
          disk on the new program after `semper disk upgrade --all`
remove    is refused while VMs run or a disk is guarded; then it leaves no unit and no program
purge     leaves images, and no other file that was not there before

Needs root and mmdebstrap.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sempervirt.guest import ProbeClient
from sempervirt.guest.location import CMDLINE, image
from tests.unharmed import assert_unharmed

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("host.sh")
CGROUPS = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
PACKAGES = ("sempervirt-blkd", "sempervirt", "sempervirt-doc")
OLD, NEW = "0.1.0~trial1", "0.1.0~trial2"
# What packages of Debian and systemd write while ours come and go.
OTHERS = (
    *("/var/lib/dpkg", "/var/lib/apt", "/var/cache", "/var/log", "/var/lib/systemd"),
    *("/proc", "/sys", "/dev", "/run", "/tmp", "/root", "/etc/group-", "/etc/gshadow-"),
    *("/var/tmp/systemd-private-", "/var/backups"),
)
IMAGES = "/srv/vms"
MIB = 1 << 20
BOOT_S = 240.0
INSTALL_S = 600.0
DEADLINE_S = 120.0
POLL_S = 0.2


class Failed(Exception):
    """Something is not as it must be."""


def require(condition: object, what: str) -> None:
    """Raises Failed where something is not as it must be."""
    if not condition:
        raise Failed(what)


def build(place: Path, version: str) -> Path:
    """The packages of a version, and that they are the same bytes when they are built again."""
    made = []
    for turn in ("first", "second"):
        output = place / f"{version}-{turn}"
        subprocess.run(
            ["scripts/deb", "--output", output, "--version", version], cwd=ROOT, check=True
        )
        made.append({path.name: path.read_bytes() for path in sorted(output.iterdir())})
    require(len(made[0]) == 4, f"there are {len(made[0])} packages")
    require(made[0] == made[1], f"{version} differs when it is built twice")
    return place / f"{version}-first"


def make_root(suite: str, root: Path) -> None:
    """A Debian with what our packages need, QEMU of the release itself, and none of ours."""
    script = """
        set -euo pipefail
        . scripts/toolchain; . scripts/apt-machine
        sources=$(machine_sources "$1")
        mapfile -t options < <(machine_options)
        names=systemd,systemd-sysv,dbus,python3,man-db,qemu-system-x86,qemu-utils
        options+=(--quiet --variant=minbase --include="$names")
        mmdebstrap "${options[@]}" "$1" "$2" - <<<"$sources"
    """
    subprocess.run(["bash", "-c", script, "bash", suite, str(root)], cwd=ROOT, check=True)


@contextmanager
def cgroup(name: str) -> Iterator[Path]:
    """A cgroup (version 2) of its own."""
    top = next((one for one in CGROUPS if (one / "cgroup.procs").exists()), None)
    if top is None:
        raise Failed(f"there is no cgroup2 in {', '.join(map(str, CGROUPS))}")
    place = top / name
    place.mkdir()
    try:
        yield place
    finally:
        give_up = time.monotonic() + DEADLINE_S
        while place.exists() and time.monotonic() < give_up:
            inside = sorted((one for one in place.rglob("*") if one.is_dir()), reverse=True)
            with suppress(OSError):  # what was killed is on its way
                for path in (*inside, place):
                    path.rmdir()
            time.sleep(POLL_S)  # poll interval


@dataclass
class Machine:
    """A fresh Debian whose systemd runs."""

    root: Path
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        """Its PID 1, as this machine numbers it."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(found.split()[0])

    async def ask(self, *words: str, deadline_s: float = DEADLINE_S) -> tuple[int, str]:
        """Exit code and output of a command there."""
        where = ["nsenter", "-t", str(self.pid), "-m", "-p", "-i", "-u", "-r", "-w"]
        clean = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]
        clean += ["DEBIAN_FRONTEND=noninteractive", "HOME=/root"]
        command = [*where, *clean, *words]
        started = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        async with asyncio.timeout(deadline_s):
            said, _ = await started.communicate()
        return started.returncode or 0, said.decode()

    async def tell(self, *words: str, deadline_s: float = DEADLINE_S) -> str:
        """What a command says. Raises Failed when it fails."""
        code, said = await self.ask(*words, deadline_s=deadline_s)
        require(code == 0, f"{' '.join(words)}: exit code {code}: {said}")
        return said

    async def install(self, folder: Path) -> str:
        """Installs the packages of a folder, as apt does."""
        place = self.root / "srv/packages"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder, place)
        files = [f"/srv/packages/{path.name}" for path in sorted(place.iterdir())]
        wanted = [name for name in files if Path(name).name.split("_")[0] in PACKAGES]
        options = ["-y", "--no-install-recommends", "-o", "Dpkg::Use-Pty=0"]
        return await self.tell("apt-get", "install", *options, *wanted, deadline_s=INSTALL_S)

    async def wait(self, expected: str, *words: str) -> None:
        """Waits until a command says that. Raises Failed."""
        give_up = time.monotonic() + DEADLINE_S
        while (said := (await self.ask(*words))[1].strip()) != expected:
            require(time.monotonic() < give_up, f"{' '.join(words)}: {said}, and not {expected}")
            await asyncio.sleep(POLL_S)  # poll interval

    def files(self) -> set[str]:
        """Every file and folder that somebody's package, or nobody, has put there."""
        found = set()
        for path in self.root.rglob("*"):
            name = f"/{path.relative_to(self.root)}"
            if not name.startswith(OTHERS) and "__pycache__" not in name:
                found.add(name)
        return found


def _start(root: Path, group: Path, log: Path) -> subprocess.Popen[bytes]:
    inside = ["unshare", "--fork", "--kill-child=KILL", "--pid", "--mount", "--uts", "--ipc"]
    command = [*inside, "sh", str(SCRIPT), str(root), str(group)]
    with log.open("wb") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def _tail(log: Path) -> str:
    return log.read_text()[-2000:]


@asynccontextmanager
async def booted(root: Path, group: Path, log: Path) -> AsyncIterator[Machine]:
    """The machine, when its systemd has started everything."""
    process = _start(root, group, log)
    machine = Machine(root, process)
    try:
        give_up = time.monotonic() + DEADLINE_S
        while True:
            require(process.poll() is None and time.monotonic() < give_up, _tail(log))
            try:
                _, state = await machine.ask("systemctl", "is-system-running")
            except (OSError, IndexError):
                state = ""
            if state.strip() in ("running", "degraded"):
                break
            await asyncio.sleep(POLL_S)  # poll interval
        yield machine
    finally:
        process.kill()
        process.wait()


async def installed(machine: Machine) -> None:
    """What an installation has to leave."""
    await machine.wait("active", "systemctl", "is-active", "semperd.service")
    for unit in ("semperd.service", "sempervirt-guests.service"):
        await machine.wait("enabled", "systemctl", "is-enabled", unit)
        await machine.wait("active", "systemctl", "is-active", unit)
    require("semper 0.1.0" in await machine.tell("semper", "--version"), "semper has no version")
    require(
        "semper-blkd 0.1.0" in await machine.tell("semper-blkd", "--version"), "nor semper-blkd"
    )
    require(
        "qemu" in (await machine.tell("semper", "host", "show")), "semper host show has no QEMU"
    )
    for page in ("semper", "semper-vm-run", "semperd", "semper-blkd"):
        require("SYNOPSIS" in await machine.tell("man", page), f"there is no manual page {page}")
    require("sempervirt" in await machine.tell("getent", "group", "sempervirt"), "no group")
    group = await machine.tell("stat", "-c", "%G %a", "/run/sempervirt/agent.sock")
    require(group.split()[0] == "sempervirt", f"the socket is of {group}")


def vm_file(machine: Machine, name: str) -> str:
    """A VM with a guest that writes and verifies; its path in the machine."""
    guest = image()
    folder = machine.root / IMAGES.strip("/")
    folder.mkdir(exist_ok=True, parents=True)
    for file in (guest.kernel, guest.initrd):
        if not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)
    with (folder / f"{name}.raw").open("wb") as disk:
        disk.truncate(64 * MIB)
    (folder / f"{name}.toml").write_text(f"""
name = "{name}"
memory = "128M"
kernel = "{guest.kernel.name}"
initrd = "{guest.initrd.name}"
cmdline = "{CMDLINE}"
[[disks]]
name = "root"
image = "{name}.raw"
serial = "loaded"
[[channels]]
name = "org.sempervirt.probe"
""")
    return f"{IMAGES}/{name}.toml"


@asynccontextmanager
async def loaded(machine: Machine, name: str) -> AsyncIterator[ProbeClient]:
    """The probe of a running VM whose guest writes."""
    await machine.tell("semper", "vm", "run", vm_file(machine, name), "--detach")
    socket = Path(f"/proc/{machine.pid}/root/run/sempervirt/vm/{name}/probe.sock")
    async with await ProbeClient.connect(socket, deadline_s=BOOT_S) as client:
        await client.wait_hello(deadline_s=BOOT_S)
        await client.write_start("serial:loaded", writers=4, span_bytes=8 * MIB)
        await more(client)
        yield client


async def more(client: ProbeClient) -> None:
    """Waits until a guest has done some more requests."""
    before = (await client.stats()).completions
    await client.wait_stats(lambda stats: stats.completions >= before + 50, deadline_s=DEADLINE_S)


async def qemus(machine: Machine) -> dict[str, int]:
    """The QEMU of each VM."""
    told = json.loads(await machine.tell("semper", "vm", "list", "--output", "json"))
    return {view["name"]: view["pid"] for view in told if view["state"] == "running"}


async def upgraded(machine: Machine, folder: Path, count: int) -> None:
    """An upgrade under VMs that write; then the refused removal, and the end of the VMs."""
    async with AsyncExitStack() as stack:
        names = [f"web{number}" for number in range(count)]
        probes = [await stack.enter_async_context(loaded(machine, name)) for name in names]
        before = await qemus(machine)
        require(sorted(before) == names, f"these run: {before}")
        agent = await machine.tell("systemctl", "show", "-P", "MainPID", "semperd.service")
        said = await machine.install(folder)
        sys.stdout.write("".join(f"    {line}\n" for line in said.splitlines()[-12:]))
        await machine.wait("active", "systemctl", "is-active", "semperd.service")
        await machine.wait("active", "systemctl", "is-active", "sempervirt-guests.service")
        now = await machine.tell("systemctl", "show", "-P", "MainPID", "semperd.service")
        require(now != agent, "the agent was not restarted")
        require(await qemus(machine) == before, "there are other QEMUs")
        told = json.loads(await machine.tell("semper", "disk", "list", "--output", "json"))
        require(all(view["upgrade_available"] for view in told), "the disks have the new program")
        await asyncio.gather(*map(more, probes))
        await machine.tell("semper", "disk", "upgrade", "--all", deadline_s=300)
        told = json.loads(await machine.tell("semper", "disk", "list", "--output", "json"))
        stale = [view["name"] for view in told if view["upgrade_available"]]
        require(not stale, f"not on the new program: {stale}")
        await asyncio.gather(*map(more, probes))
        code, said = await machine.ask("apt-get", "remove", "-y", "sempervirt")
        require(
            code != 0 and "virtual machines run on this host" in said, f"it was removed: {said}"
        )
        await machine.wait("active", "systemctl", "is-active", "semperd.service")
        blocks = 0
        for client in probes:
            stats = await client.write_stop()
            assert_unharmed(stats)
            blocks += stats.completions
        sys.stdout.write(f"    {count} guests, {blocks} requests, no error\n")
    for name in names:
        await machine.tell("semper", "vm", "kill", name)


async def guarded(machine: Machine) -> None:
    """A disk of another manager's VM stands in the way as well, wherever its socket is."""
    image, name = f"{IMAGES}/theirs.raw", "theirs/vda"
    with (machine.root / image.strip("/")).open("wb") as disk:
        disk.truncate(MIB)
    words = ("semper", "disk", "guard", image, "--name", name, "--socket", "/run/theirs.sock")
    await machine.tell(*words)
    code, said = await machine.ask("apt-get", "remove", "-y", "sempervirt")
    require(code != 0 and "disks of some are served" in said, f"it was removed: {said}")
    require(name in await machine.tell("semper", "disk", "list"), "the disk is gone")
    await machine.tell("semper", "disk", "unguard", name)


async def removed(machine: Machine) -> None:
    """Without VMs the packages go; what was configured stays."""
    await machine.tell("apt-get", "remove", "-y", *PACKAGES)
    code, _ = await machine.ask("test", "-e", "/usr/bin/semper")
    require(code != 0, "semper is still there")
    code, _ = await machine.ask("systemctl", "is-active", "semperd.service")
    require(code != 0, "semperd still runs")
    await machine.tell("test", "-d", "/var/lib/sempervirt")
    require(not (machine.root / "usr/lib/sempervirt").exists(), "compiled files were left")


async def purged(machine: Machine, before: set[str]) -> None:
    """Images, and nothing else of ours."""
    await machine.tell("apt-get", "purge", "-y", *PACKAGES)
    kept = {"/srv/packages", IMAGES}
    left = {name for name in machine.files() - before if not name.startswith(tuple(kept))}
    require(not left, f"left behind: {sorted(left)}")
    require(not before - machine.files(), f"taken along: {sorted(before - machine.files())}")
    require((machine.root / IMAGES.strip("/") / "web0.raw").stat().st_size == 64 * MIB, "no image")
    code, _ = await machine.ask("getent", "group", "sempervirt")
    require(code != 0, "the group is left")
    code, _ = await machine.ask("test", "-e", "/run/sempervirt")
    require(code != 0, "/run/sempervirt is left")


async def trial(suite: str, place: Path, count: int, built: list[Path]) -> None:
    """All of it, each part with its time."""
    root = place / "root"
    start = time.monotonic()

    def told(what: str) -> None:
        nonlocal start
        sys.stdout.write(f"  {what:9} {time.monotonic() - start:6.1f} s ok\n")
        sys.stdout.flush()
        start = time.monotonic()

    old, new = built or [build(place, OLD), build(place, NEW)]
    told("build")
    await asyncio.to_thread(make_root, suite, root)
    told("root")
    with cgroup(f"semper-packages-{suite}") as group:
        async with booted(root, group, place / "systemd.log") as machine:
            told("boot")
            before = machine.files()
            await machine.install(old)
            await installed(machine)
            told("install")
            await upgraded(machine, new, count)
            told("upgrade")
            await guarded(machine)
            await removed(machine)
            told("remove")
            await purged(machine, before)
            told("purge")


def main() -> int:
    """Runs it; the status is 1 when anything is not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m tests.packages", description=__doc__)
    parser.add_argument("--suite", choices=("bookworm", "trixie"), default="bookworm")
    parser.add_argument("--vms", type=int, default=5)
    parser.add_argument("--built", type=Path, nargs=2, default=[], metavar="DIRECTORY",
        help="folders with two versions, instead of building them")  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="keep the root, to look at it")
    options = parser.parse_args()
    place = Path(f"/var/tmp/sempervirt-packages/{options.suite}")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    sys.stdout.write(f"{options.suite}:\n")
    try:
        asyncio.run(trial(options.suite, place, options.vms, options.built))
    except (Failed, AssertionError) as error:
        sys.stdout.write(f"  FAILED: {error}\n")
        return 1
    finally:
        if not options.keep:
            shutil.rmtree(place, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
