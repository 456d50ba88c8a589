"""Blocks are overwritten at the worst instants while a guest moves, and every page is compared.

    early     after the source has read all blocks, before the guest begins to move
    held      when the destination is about to read a block that was referred to
    torn      at the very time when it reads
    blind     anywhere, until the guest has moved
    guest     the guest itself writes, in every second run, to blocks of its own

The disk of the guest is in its page cache, so what others write to the image is nothing that it
would ever see; afterwards the image is put back. One guest moves between two QEMUs, again and
again, through both ends of the wire (`semper-wired-trial`, which can hold its reads back). With
verification switched off it stays where it is, and its damaged copies are thrown away.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from lab.plain_qemu import DEADLINE_S, QMP_S, wait_migration
from sempervirt.qemu.qmp import Monitor
from sempervirt.trust.authority import Authority
from tests.integration.test_wired import (
    DISK,
    MEMORY,
    Host,
    boot,
    exit_of,
    joined,
    nonce_of,
    start_writers,
    stop_writers,
)

MIB = 1 << 20
PAGE = 4096
# The guest's own; see `start_writers`.
WRITERS = 8 * MIB
ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "trials/semper-wired-trial"
VARIABLE = "SEMPER_WIRED_TRIAL"
EARLY_BLOCKS = 300
# From then on reads are not held any longer: the guest has to arrive some day.
HELD_S = 1.5
# More failures would make the source give the disk up.
STRUCK = 0.15


@dataclass
class Totals:
    """What all runs came to."""

    runs: int = 0
    damaged_runs: int = 0
    damaged_pages: int = 0
    references: int = 0
    struck: int = 0
    mismatches: int = 0
    least_mismatches: int = 1 << 62
    problems: list[str] = field(default_factory=list)


class Gate:
    """The destination's reads, held back and let go."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def of(cls, host: Host) -> Self:
        return cls(*await asyncio.open_unix_connection(str(host.path("wired.control"))))

    async def ask(self, **words: object) -> dict[str, Any]:
        """Raises ConnectionError when the destination has ended."""
        self._writer.write(json.dumps({"cmd": "reads", **words}).encode() + b"\n")
        line = await self._reader.readline()
        if not line:
            raise ConnectionError
        told: dict[str, Any] = json.loads(line)["ok"]
        return told

    def close(self) -> None:
        self._writer.close()


class Vandal:
    """Overwrites blocks of the image, and puts them back."""

    def __init__(self, image: Path, content: bytes, seed: int) -> None:
        self._file = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        self._content = content
        self.random = random.Random(seed)
        self.struck: set[int] = set()

    def strike(self, block: int) -> None:
        """Noise."""
        assert block * PAGE >= WRITERS, "the guest's own"
        self.struck.add(block)
        os.pwrite(self._file, self.random.randbytes(PAGE), block * PAGE)

    def mend(self, block: int) -> None:
        at = block * PAGE
        os.pwrite(self._file, self._content[at : at + PAGE], at)

    def anywhere(self) -> int:
        return self.random.randrange(WRITERS // PAGE, DISK // PAGE)

    def mend_all(self) -> int:
        """Puts everything back; gives how many blocks had been overwritten."""
        for block in self.struck:
            self.mend(block)
        count = len(self.struck)
        self.struck.clear()
        return count

    async def harass(self, gate: Gate) -> None:
        """Until the destination has ended."""
        held_until = time.monotonic() + HELD_S
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < held_until:
                waits = (await gate.ask())["waits"]
                if waits is None:
                    await asyncio.sleep(0.001)  # poll interval
                    continue
                first = max(waits["block"], WRITERS // PAGE)
                blocks = range(first, waits["block"] + waits["count"])
                chosen = [block for block in blocks if self.random.random() < STRUCK]
                for block in chosen:
                    self.strike(block)
                await gate.ask(step=1)
                for block in chosen[::3]:
                    self.mend(block)
                    self.strike(block)
            await gate.ask(hold=False)
            while True:
                await gate.ask()
                block = self.anywhere()
                (self.strike if self.random.random() < STRUCK else self.mend)(block)

    def close(self) -> None:
        os.close(self._file)


async def pages_of(monitor: Monitor, file: Path) -> bytes:
    """All memory of a machine that stands still."""
    assert not (await monitor.execute("query-status", timeout_s=QMP_S))["running"]
    arguments = {"val": 0, "size": MEMORY, "filename": str(file)}
    await monitor.execute("pmemsave", arguments, timeout_s=QMP_S)
    content = await asyncio.to_thread(file.read_bytes)
    file.unlink()  # noqa: ASYNC240
    assert len(content) == MEMORY
    return content


def differing(one: bytes, other: bytes) -> int:
    """How many pages are not the same."""
    if one == other:
        return 0
    return sum(one[at : at + PAGE] != other[at : at + PAGE] for at in range(0, MEMORY, PAGE))


class Campaign:
    """One guest that moves as often as it is told to. Made by `begin`."""

    def __init__(self, place: Path, seed: int, *, verify: bool) -> None:
        self.totals = Totals()
        self._verify = verify
        self._content = random.Random(seed).randbytes(DISK)
        image = place / "disk.raw"
        image.write_bytes(self._content)
        self._vandal = Vandal(image, self._content, seed)
        authority = Authority.create(place, "test")
        self._hosts = [
            Host(place / name, image, f"{name}.example", blkd=False, wired=str(PROGRAM))
            for name in "ab"
        ]
        for host in self._hosts:
            host.directory.mkdir()
            host.certify(authority)
        self._machines = [ExitStack(), ExitStack()]
        self._nonce = ""

    async def begin(self) -> None:
        """Boots the guest."""
        self._machines[0].enter_context(self._hosts[0].machine())
        self._nonce = await boot(self._hosts[0])

    def end(self) -> None:
        """Kills what is left."""
        for machine in self._machines:
            machine.close()
        self._vandal.close()

    async def move(self) -> None:
        """One run."""
        totals, vandal = self.totals, self._vandal
        here, there = self._hosts
        totals.runs += 1
        writes = totals.runs % 2 == 0
        for name in ("qmp", "stream", "probe", "wired.control"):
            there.path(name).unlink(missing_ok=True)
        here.path("wired.control").unlink(missing_ok=True)
        listening = ["-incoming", f"unix:{there.path('stream')}", "-S"]
        self._machines[1].enter_context(there.machine(*listening))
        if writes:
            await start_writers(here)
        os.environ[VARIABLE] = "hold-reads" if self._verify else "hold-reads,no-verify"
        async with AsyncExitStack() as stack:
            source = await stack.enter_async_context(here.monitor())
            target = await stack.enter_async_context(there.monitor())
            ends = await stack.enter_async_context(joined(here, there))
            gate = await Gate.of(there)
            stack.callback(gate.close)
            for _ in range(EARLY_BLOCKS):
                vandal.strike(vandal.anywhere())
            harassing = asyncio.create_task(vandal.harass(gate))
            uri = {"uri": f"unix:{here.path('stream')}"}
            await source.execute("migrate", uri, timeout_s=QMP_S)
            await wait_migration(source, "completed")
            assert [await exit_of(end) for end in ends] == [0, 0]
            async with asyncio.timeout(DEADLINE_S):
                await harassing
            damaged = differing(
                await pages_of(source, here.path("memory")),
                await pages_of(target, there.path("memory")),
            )
            totals.struck += vandal.mend_all()
            await (target if self._verify else source).execute("cont", timeout_s=QMP_S)
        self._count(there, damaged)
        if self._verify:
            self._hosts.reverse()
            self._machines.reverse()
        self._machines[1].close()
        if writes:
            await stop_writers(self._hosts[0])
        if await nonce_of(self._hosts[0]) != self._nonce:
            totals.problems.append(f"run {totals.runs}: the guest booted anew")
        if writes:  # what it wrote by itself is no longer in its page cache
            await boot(self._hosts[0])

    def _count(self, there: Host, damaged: int) -> None:
        totals, outcome = self.totals, there.outcome()
        totals.references += outcome["references"]
        totals.mismatches += outcome["mismatches"]
        totals.least_mismatches = min(totals.least_mismatches, outcome["mismatches"])
        totals.damaged_pages += damaged
        totals.damaged_runs += damaged > 0


async def run(runs: int, seed: int, *, verify: bool, say: Callable[[Totals], None]) -> Totals:
    """As many runs, with a guest of their own."""
    # No disk: 512 MiB for each run would wear it for nothing.
    place = Path(tempfile.mkdtemp(prefix="svc-", dir="/dev/shm"))
    campaign = Campaign(place, seed, verify=verify)
    try:
        await campaign.begin()
        for _ in range(runs):
            await campaign.move()
            say(campaign.totals)
    finally:
        os.environ.pop(VARIABLE, None)
        campaign.end()
        shutil.rmtree(place, ignore_errors=True)
    return campaign.totals


def build() -> None:
    """The program that can be told to hold its reads back."""
    subprocess.run([ROOT / "scripts/trial-programs"], cwd=ROOT, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make corruption", description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--control", type=int, default=10, help="runs without verification")
    parser.add_argument("--seed", type=int, default=int(time.time()) & 0xFFFF)
    options = parser.parse_args()
    build()
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"seed {options.seed}")

    def say(totals: Totals) -> None:
        if totals.runs % 10 == 0:
            console.print(totals)

    verified = asyncio.run(run(options.runs, options.seed, verify=True, say=say))
    console.print(f"verified: {verified}")
    control = asyncio.run(run(options.control, options.seed + 1, verify=False, say=say))
    console.print(f"control, nothing verified: {control}")
    lost = verified.damaged_pages or verified.problems or not verified.least_mismatches
    return 1 if lost or control.damaged_runs < control.runs else 0


if __name__ == "__main__":
    sys.exit(main())
