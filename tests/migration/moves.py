"""There and back: moves of a live guest, one after the other, with their figures.

`python -m tests.migration.moves` (`make moves`) makes 50 on each link and prints a table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lab.client import EchoClient
from lab.guest import FIRMWARE_VARS, VM, Guest
from lab.network import FAR, GIGABIT, UNLIMITED, Link
from lab.world import POLL_S, QEMU, Host, World
from sempervirt.cluster.cluster import read_credentials
from sempervirt.disk.answers import LayerState
from sempervirt.vm.firmware import vars_path
from tests.migration.judge import faults_of

LINKS = (UNLIMITED, GIGABIT, FAR)
PROGRAMS = (QEMU, "semper-blkd", "semper-wired")
END_S = 60.0
MIB = 1 << 20


@dataclass(frozen=True)
class Move:
    """One of them. `link_bytes` went over the link in both directions, with all headers."""

    total_s: float
    inside_ms: float
    outside_ms: float
    link_bytes: int


@dataclass
class Report:
    """All moves on a link, and what was wrong."""

    link: Link
    moves: list[Move] = field(default_factory=list)
    writes: int = 0
    problems: list[str] = field(default_factory=list)


async def there_and_back(
    link: Link,
    count: int,
    done: Callable[[], None],
    *,
    uefi: bool = False,
    guarded: bool = False,
    snapshot: bool = False,
) -> Report:
    """Moves a guest `count` times, alternately, with verified I/O and a TCP client attached.

    With `uefi` the variables of the guest's firmware have to come along; with `guarded` no host can
    write what is the other's in the store; with `snapshot` the disk has one, which stays as it is.
    """
    report = Report(link)
    async with (
        World.opened(link, guarded=guarded) as world,
        Guest.booted(world, world.a, uefi=uefi) as guest,
        guest.outside() as client,
    ):
        here, there = world.hosts
        kept = await _snapshot(guest, here) if snapshot else b""
        for _ in range(count):
            variables = _variables(here) if uefi else b""
            if variables == FIRMWARE_VARS.read_bytes():
                report.problems.append("the firmware has written no variable: nothing is proven")
            async with telling_no_secret(world.hosts, report.problems):
                report.moves.append(await _move(guest, client, here, there))
            report.problems += await _problems(guest, client, here, there)
            if uefi and variables != _variables(there):
                report.problems.append(f"the firmware's variables did not come to {there}")
            if snapshot and await _exported(guest, there) != kept:
                report.problems.append(f"the snapshot is another one on {there}")
            here, there = there, here
            done()
        stats = await guest.judged(here)
        report.writes = stats.writes
        report.problems += faults_of(stats)
    return report


async def _snapshot(guest: Guest, host: Host) -> bytes:
    """What it has."""
    await host.semper("disk", "snapshot", VM)
    return await _exported(guest, host)


async def _exported(guest: Guest, host: Host) -> bytes:
    """The first snapshot of the disk, as a host reads it."""
    async with host.client() as client:
        layers = await client.layers(f"{VM}/root")
    wanted = [layer.id for layer in layers.layers if layer.state is LayerState.SEALED]
    target = guest.world.images / "exported.raw"
    target.unlink(missing_ok=True)
    await host.semper("disk", "export", f"{VM}/root", str(wanted[0]), "--to", str(target))
    return target.read_bytes()


@asynccontextmanager
async def telling_no_secret(hosts: Sequence[Host], problems: list[str]) -> AsyncIterator[None]:
    """Adds to the problems each secret of a host that a command line or a log has meanwhile."""
    told: set[str] = set()

    async def look() -> None:
        while True:
            told.update(*map(command_lines, hosts))
            await asyncio.sleep(POLL_S)  # poll interval

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()
    assert any("semper-wired" in line for line in told), "nothing was looked at"
    for host in hosts:
        said = "".join(told)
        for path in host.log.parent.rglob("*.log"):
            with suppress(FileNotFoundError):  # gone with a VM that has left
                said += path.read_text(errors="replace")
        problems += [f"a secret of {host} was told" for one in secrets_of(host) if one in said]


def command_lines(host: Host) -> set[str]:
    """Of all that runs there: any user of the host can read them."""
    found = set()
    for pid in host.network.pids(host.name):
        with suppress(OSError):
            found.add(Path(f"/proc/{pid}/cmdline").read_text(errors="replace"))
    return found


def secrets_of(host: Host) -> list[str]:
    """Parts of its keys, and its password for the store."""
    trust = host.config.trust_dir
    found = [
        line
        for path in (*trust.glob("*.key"), trust / "host.pem")
        for line in path.read_text().partition("PRIVATE KEY-----\n")[2].splitlines()[:2]
    ]
    assert found
    credentials = read_credentials(host.config)
    return found if credentials is None else [*found, credentials.password]


def _variables(host: Host) -> bytes:
    return vars_path(host.config, VM).read_bytes()


async def _move(guest: Guest, client: EchoClient, here: Host, there: Host) -> Move:
    network = guest.world.network
    since, sent = time.monotonic(), network.sent()
    await here.semper("vm", "migrate", VM, "--to", there.name)
    total_s = time.monotonic() - since
    sent = network.sent() - sent
    await guest.wait_beat(there)
    await client.wait_heard()
    return Move(total_s, guest.silence_ms(since), client.silence_ms(since), sent)


async def _problems(guest: Guest, client: EchoClient, here: Host, there: Host) -> list[str]:
    problems = []
    probe = await guest.probe_on(there)
    if probe.nonce != guest.nonce:
        problems.append("the guest booted anew")
    if not client.alive:
        problems.append(f"the client outside: {client.problem}")
    problems += [f"{what} is left on {here}" for what in await wait_gone(here, PROGRAMS)]
    problems += [f"{what} is left on {there}" for what in await wait_gone(there, PROGRAMS[-1:])]
    return problems + faults_of(await probe.stats())


async def wait_gone(host: Host, programs: Sequence[str]) -> list[str]:
    """Those of the programs that do not end on a host."""
    give_up = time.monotonic() + END_S
    while True:
        left = [program for program in programs if host.processes(program)]
        if not left or time.monotonic() > give_up:
            return left
        await asyncio.sleep(POLL_S)  # poll interval


def table(reports: Sequence[Report]) -> Table:
    """One line for each link."""
    drawn = Table(title="Moves there and back", title_justify="left")
    drawn.add_column("link")
    columns = ("moves", "errors", "writes verified", "MiB on the link", "seconds")
    for name in (*columns, "stands still, ms", "its client waits, ms"):
        drawn.add_column(name, justify="right")
    for report in reports:
        moves = report.moves
        drawn.add_row(
            report.link.name,
            str(len(moves)),
            str(len(report.problems)),
            f"{report.writes:,}",
            _spread([move.link_bytes / MIB for move in moves]),
            _spread([move.total_s for move in moves], digits=1),
            _spread([move.inside_ms for move in moves]),
            _spread([move.outside_ms for move in moves]),
        )
    return drawn


def _spread(values: Sequence[float], digits: int = 0) -> str:
    """Median and, in brackets, the least and the most."""
    if not values:
        return "-"
    middle = statistics.median(values)
    return f"{middle:.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="make moves", description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="moves on each link")
    parser.add_argument("--link", choices=[link.name for link in LINKS], action="append")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    links = [link for link in LINKS if not options.link or link.name in options.link]
    reports = []
    with Progress(console=Console(stderr=True)) as bar:
        for link in links:
            advance = partial(bar.advance, bar.add_task(link.name, total=options.count))
            reports.append(asyncio.run(there_and_back(link, options.count, advance)))
    out = Console() if sys.stdout.isatty() else Console(width=150)
    out.print(table(reports))
    problems = [(report.link.name, problem) for report in reports for problem in report.problems]
    for name, problem in problems:
        out.print(f"{name}: {problem}", style="red", markup=False)
    options.results.mkdir(parents=True, exist_ok=True)
    document = [asdict(report) for report in reports]
    (options.results / "moves.json").write_text(json.dumps(document, indent=1) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
