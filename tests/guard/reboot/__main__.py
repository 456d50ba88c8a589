"""A host with systemd is rebooted in order, and its VM is elsewhere before it goes down.

    python -m tests.guard.reboot [--way out|nowhere|control]

Host a of the lab runs Debian's systemd as PID 1 of its own namespaces (`host.sh`), with our units
as they are packaged: `semperd.service`, `sempervirt-guests.service`. `systemctl reboot` there is
the end of PID 1, and with that of all that is left on the host. Three ways:

out       the VM runs on host b before host a goes down
nowhere   host b is out of service: the bound is kept, and the operator is told what is left
control   without sempervirt-guests.service the VM is lost
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from lab.namespaces import within
from lab.network import UNLIMITED
from lab.world import DEADLINE_S, GUESTS, POLL_S, SERVES, Host, World, program
from sempervirt.core.errors import SempervirtError
from sempervirt.vm.config import IMAGE_ROOTS
from tests.guard.machine import ROOT
from tests.integration.test_evacuation import listed, spec, states

SCRIPT = Path(__file__).with_name("host.sh")
DISK = ROOT / ".cache/debian/packages.raw"
EVACUATE = "sempervirt-guests.service"
# Of the second way; stopping what else runs takes its time.
BOUND_S = 8.0
SLACK_S = 60.0
DOWN_S = 90.0
# What reboot(2) does to PID 1 of a namespace.
REBOOTED = -1

AGENT = """[Service]
ExecStart=
ExecStart={semperd}
Environment=SEMPERVIRT_STATE_DIR={state} SEMPERVIRT_RUN_DIR={run} SEMPERVIRT_IMAGE_ROOTS={roots}
StandardError=append:{log}
"""
UNIT = """[Service]
Environment=SEMPERVIRT_STATE_DIR={state} SEMPERVIRT_RUN_DIR={run}
StandardOutput=append:{told}
StandardError=append:{told}
ExecStart=
ExecStart=-{semper} host return --after-shutdown
ExecStop=
ExecStop=-{semper} host down --deadline {bound:g}s --grace 5s
"""


class Systemd:
    """Host a with systemd; made by `booted`."""

    def __init__(self, host: Host, place: Path, process: subprocess.Popen[bytes]) -> None:
        self.host = host
        self.told = place / "told.log"
        self.process = process

    async def systemctl(self, *words: str) -> str:
        """What it says; nothing when it fails."""
        pid = await asyncio.to_thread(_first_child, self.process.pid)
        command = ["nsenter", "-t", str(pid), "-m", "-p", "-r", "-w", "systemctl", *words]
        asked = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        said, _ = await asked.communicate()
        return said.decode().strip() if asked.returncode == 0 else ""

    async def reboot(self, within_s: float) -> float:
        """Reboots it; how long it took. Raises TimeoutError."""
        asked = time.monotonic()
        await self.systemctl("reboot")
        code = await asyncio.to_thread(self.process.wait, within_s)
        assert code == REBOOTED or code == 128 - REBOOTED, f"it went down otherwise: {code}"
        return time.monotonic() - asked


def _first_child(pid: int) -> int:
    """PID 1 of the namespaces, as this machine numbers it."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found[0]) if found else pid


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


@asynccontextmanager
async def booted(world: World, *, evacuates: bool = True, bound_s: float) -> AsyncIterator[Systemd]:
    """Host a, when its agent serves and its units have started."""
    host, place = world.a, world.images.parent
    parts = place / f"systemd-{time.monotonic_ns()}"
    units = parts / "units"
    _write_units(host, units, parts / "told.log", evacuates=evacuates, bound_s=bound_s)
    inside = ["unshare", "--fork", "--kill-child=KILL", "--pid", "--mount", "--uts", "--ipc"]
    inside += ["--cgroup", "sh", str(SCRIPT), str(DISK), str(parts / "mounts"), str(units)]
    command = within(host.namespace, *inside, str(place))
    seen = host.log.stat().st_size
    process = await asyncio.to_thread(_start, command, parts / "systemd.log")
    try:
        found = Systemd(host, parts, process)
        async with asyncio.timeout(DEADLINE_S):
            while SERVES not in host.log.read_bytes()[seen:].decode():
                assert process.poll() is None, (parts / "systemd.log").read_text()
                await asyncio.sleep(POLL_S)  # poll interval
            while evacuates and await found.systemctl("is-active", EVACUATE) != "active":  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)  # poll interval
        yield found
    finally:
        process.kill()
        process.wait()


def _write_units(host: Host, units: Path, told: Path, *, evacuates: bool, bound_s: float) -> None:
    """As packaged, with what says where this host's files and programs are."""
    roots = ":".join(map(str, (host.place, GUESTS, *IMAGE_ROOTS)))
    named = {
        "state": host.config.state_dir, "run": host.config.run_dir, "roots": roots,
        "semperd": program("semperd"), "semper": program("semper"),
        "log": host.log, "told": told, "bound": bound_s,
    }  # fmt: skip
    wanted = units / "multi-user.target.wants"
    wanted.mkdir(parents=True)
    further = {"semperd.service": AGENT} | ({EVACUATE: UNIT} if evacuates else {})
    for name, text in further.items():
        (units / name).write_bytes((ROOT / "packaging" / name).read_bytes())
        (units / f"{name}.d").mkdir()
        (units / f"{name}.d/trial.conf").write_text(text.format(**named))
        (wanted / name).symlink_to(f"/etc/systemd/system/{name}")


async def out(world: World) -> str:
    """What is wrong with a reboot of a host whose VM can go elsewhere."""
    async with booted(world, bound_s=60.0) as systemd:
        await run_vm(world, "out")
        took_s = await systemd.reboot(DOWN_S)
        sys.stdout.write(f"  down after {took_s:.1f} s: {systemd.told.read_text()}")
    found = (await states(world.b)).get("out"), (await world.ownership("out")).owner
    async with world.b.client() as client:
        await client.kill_vm("out")
    return "" if found == ("running", "b") else f"on b: {found}"


async def nowhere(world: World) -> str:
    """What is wrong with a reboot of a host whose VM has nowhere to go."""
    await world.b.semper("host", "evacuate", "--why", "its disk is changed")
    async with booted(world, bound_s=BOUND_S) as systemd:
        await listed(world.a, "its disk is changed", told=True)
        await run_vm(world, "nowhere")
        took_s = await systemd.reboot(BOUND_S + SLACK_S)
        told = systemd.told.read_text()
        sys.stdout.write(f"  down after {took_s:.1f} s, with a bound of {BOUND_S:g} s: {told}")
    await world.b.semper("host", "return")
    said = " ".join(told.split())  # lines of a table
    why = "nowhere stays: no host can take VMs; b: b is out of service: its disk is changed"
    if why not in said or "nowhere is stopped" not in said:
        return f"the operator is not told what is left, and why: {told}"
    return "it runs on b all the same" if "nowhere" in await states(world.b) else ""


async def control(world: World) -> str:
    """What is wrong with a reboot that nothing holds: the VM has to be lost."""
    async with booted(world, evacuates=False, bound_s=BOUND_S) as systemd:
        await world.a.semper("host", "return")
        await run_vm(world, "control")
        await systemd.reboot(DOWN_S)
    return "it runs on b all the same" if "control" in await states(world.b) else ""


WAYS: dict[str, Callable[[World], Awaitable[str]]] = {
    "out": out,
    "nowhere": nowhere,
    "control": control,
}


async def run_vm(world: World, name: str) -> None:
    """A VM on host a that moves; it gets no further than its firmware."""
    async with world.a.client() as client:
        await client.run_vm(spec(world, name, 32, 50))
    async with asyncio.timeout(DEADLINE_S):
        while (await states(world.a)).get(name) != "running":  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)  # poll interval


async def run(ways: list[str]) -> list[str]:
    """What is wrong, by way."""
    wrong = []
    async with World.opened(UNLIMITED) as world:
        await world.a.end_agent()
        for name in ways:
            before = time.monotonic()
            try:
                found = await WAYS[name](world)
            except (
                TimeoutError,
                subprocess.TimeoutExpired,
                AssertionError,
                SempervirtError,
            ) as error:
                found = f"{type(error).__name__}: {error}; {world.a.log_tail()}"
            took_s = time.monotonic() - before
            sys.stdout.write(f"{name:8} {took_s:6.1f} s {f'FAILED: {found}' if found else 'ok'}\n")
            sys.stdout.flush()
            wrong += [f"{name}: {found}"] if found else []
    return wrong


def main() -> int:
    """Runs the ways; the status is 1 when anything is not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m tests.guard.reboot", description=__doc__)
    parser.add_argument("--way", action="append", choices=WAYS, default=[], help="by default all")
    options = parser.parse_args()
    return 1 if asyncio.run(run(options.way or list(WAYS))) else 0


if __name__ == "__main__":
    sys.exit(main())
