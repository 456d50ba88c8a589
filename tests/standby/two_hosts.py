"""Two hosts with an agent each, a VM on one, its standby on the other, and a file server between
them that revokes locks (`tests.revoking_server`).

    a: the VM writes numbered rows to a disk that is handed over ── b: the standby waits
    what happens to a ─► b suspects it ─► the server has taken a's locks ─► b goes on ─► a is back

`python -m tests.standby.two_hosts [RUNS [SEED]]` is the campaign: it ends with 1 when a row is lost
that was acknowledged, when a host takes over that must not, or when the one that comes back is not
refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import assert_never

from lab.network import TAP, UNLIMITED
from lab.world import QEMU, Host, World
from sempervirt.api.schemas import EnableStandbyRequest, FailoverRequest, StandbyView
from sempervirt.core.errors import SempervirtError, StateConflict
from sempervirt.guest import ProbeClient, ProbeGone, ProbeSilent
from sempervirt.guest import image as guest_image
from sempervirt.qemu.spec import VmSpec
from sempervirt.standby.state import Life, Step
from sempervirt.store.records import Custody
from tests.revoking_server import FUSE_TYPE, RevokingServer, revoking_server

VM, ROOT, DATA = "web", "root", "data"
MIB, BLOCK = 1 << 20, 4096
BOOT_S, READY_S, OVER_S, BACK_S = 180.0, 400.0, 180.0, 120.0
SPARE_S = 90.0
POLL_S = 0.1
# Rows for ten minutes at least, on a disk that has room for all of them.
ROWS_MAX, ROW_S = 12_000, 0.05
FENCES = (
    f'[revoking]\n"{FUSE_TYPE}" = "the server of the tests ends the lease of a silent client"\n'
)


class Fate(Enum):
    """What becomes of host a."""

    KILLED = "all its processes are killed, and it is cut off"
    CUT = "it is cut off from the other host, the store and the storage, and runs on"
    FROZEN = "all of it stands still, and goes on later where it stood"


@dataclass
class Rows:
    """What a guest writes, one after the other, and what of it was acknowledged."""

    acknowledged: list[int] = field(default_factory=list)

    async def write(self, probe: ProbeClient) -> None:
        """Until the guest is gone, or its disk fails."""
        with contextlib.suppress(ProbeGone, ProbeSilent, SempervirtError):
            for row in range(1, ROWS_MAX):
                await probe.write_raw(f"serial:{DATA}", row * BLOCK, numbered(row))
                self.acknowledged.append(row)
                await asyncio.sleep(ROW_S)  # poll interval: the pace of a client

    async def wait(self, count: int) -> None:
        """Until so many were acknowledged."""
        await until(lambda: len(self.acknowledged) >= count, BOOT_S, f"{count} rows")


def numbered(row: int) -> bytes:
    """A row, as it stands on the disk."""
    return row.to_bytes(8, "little") * (BLOCK // 8)


async def until(true: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Waits. Raises AssertionError."""
    give_up = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < give_up, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(POLL_S)  # poll interval


class Trial:
    """One VM with a standby on the other host. Made by `opened`."""

    def __init__(self, world: World, server: RevokingServer) -> None:
        self.world = world
        self.server = server
        self.rows = Rows()
        self._writing: asyncio.Task[None] | None = None

    @classmethod
    @asynccontextmanager
    async def opened(cls, *, refuses: bool = True) -> AsyncIterator[Trial]:
        """The world, with nothing in it yet."""
        with tempfile.TemporaryDirectory(prefix="sv-two-", dir="/tmp") as name:
            place = Path(name)
            fences = place / "fence.toml"
            fences.write_text(FENCES)
            fences.chmod(0o600)
            with revoking_server(place, ("a", "b"), refuses=refuses) as server:
                views = {host: server.mount(host) for host in "ab"}
                options = ("--fences", str(fences))
                async with World.opened(UNLIMITED, views=views, options=options) as world:
                    trial = cls(world, server)
                    try:
                        yield trial
                    finally:
                        if trial._writing is not None:
                            trial._writing.cancel()
                            await asyncio.wait([trial._writing])
                        trial.heal()

    def spec(self) -> VmSpec:
        """A guest with a system disk, a data disk that is handed over, and a tap."""
        guest = guest_image()
        disks = [
            {
                "name": ROOT,
                "image": str(self.world.images / "root.raw"),
                "serial": ROOT,
                "direct": True,
            },
            {
                "name": DATA,
                "image": str(self.world.images / "data.raw"),
                "serial": DATA,
                "keep": "latest",
                "direct": True,
            },
        ]
        return VmSpec.model_validate(
            {
                "name": VM,
                "memory": "192M",
                "kernel": str(guest.kernel),
                "initrd": str(guest.initrd),
                "cmdline": guest.cmdline,
                "disks": disks,
                "nics": [{"type": "tap", "tap": TAP}],
                "channels": [{"name": "org.sempervirt.probe"}],
                "standby": {
                    "initialised": "channel",
                    "channel": "org.sempervirt.probe",
                    "marker": "hello",
                    "take_over": {"host_silent": 1},
                },
            }
        )

    async def begin(self) -> StandbyView:
        """The VM runs on a and writes; b has a standby that is ready."""
        a, b = self.world.hosts
        for name in ("root", "data"):
            for file in self.server.backing.glob(f"{name}.raw*"):
                assert not file.is_dir(), "a trial has a world of its own"
            path = self.server.backing / f"{name}.raw"
            path.touch()
            os.truncate(path, 64 * MIB)
        async with a.client() as client:
            await client.run_vm(self.spec())
            probe = await connected(a.config.vm_run_dir(VM))
            self._writing = asyncio.create_task(self.rows.write(probe))
            await self.rows.wait(10)
            request = EnableStandbyRequest(every_s=3600, on="b")
            await client.enable_standby(VM, request)
        return await self.wait_ready(b)

    async def wait_ready(self, host: Host) -> StandbyView:
        """What the host shows once a standby waits."""
        give_up = time.monotonic() + READY_S
        while True:
            view = await self.shown(host)
            if any(one.life is Life.READY for one in view.generations):
                return view
            assert not view.trouble, view.trouble
            assert time.monotonic() < give_up, f"{view}\n{host.log_tail()}"
            await asyncio.sleep(POLL_S)  # poll interval

    async def shown(self, host: Host) -> StandbyView:
        """What a host shows of the standbys."""
        async with host.client() as client:
            return await client.standby(VM)

    async def wait_refused(self, host: Host) -> str:
        """Why the take-over that the host has begun waits."""
        give_up = time.monotonic() + OVER_S
        while True:
            view = await self.shown(host)
            assert view.last_take_over is None, view.last_take_over
            if view.take_over is not None and view.take_over.trouble:
                return view.take_over.trouble
            assert time.monotonic() < give_up, f"{view}\n{host.log_tail()}"
            await asyncio.sleep(POLL_S)  # poll interval

    def strike(self, fate: Fate) -> None:
        """What becomes of host a."""
        self.server.cut("a")
        match fate:
            case Fate.KILLED:
                self._cut_network()
                self._signal(signal.SIGKILL)
            case Fate.CUT:
                self._cut_network()
            case Fate.FROZEN:  # the network delivers, and nobody answers
                self._signal(signal.SIGSTOP)
            case _:
                assert_never(fate)

    def _cut_network(self) -> None:
        self.world.network.cut("link")
        self.world.network.cut("store-a")

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.world.network.pids("a"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def heal(self) -> None:
        """Everything that was cut is there again."""
        self.server.restore("a")
        self.world.network.heal("link")
        self.world.network.heal("store-a")

    async def kill_again(self, host: Host) -> None:
        """The VM that was a standby has one that is ready, and its QEMU is killed."""
        await self.wait_ready(host)
        async with host.client() as client:
            pid = (await client.vm(VM)).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    async def wait_taken_over(self, host: Host, after: int = 0) -> StandbyView:
        """What the host shows once the guest of its standby, of a number beyond `after`, was looked
        at.
        """
        give_up = time.monotonic() + OVER_S
        while True:
            view = await self.shown(host)
            if (over := view.last_take_over) is not None and over.number > after:
                assert over.step is Step.DONE, over
                return view
            assert time.monotonic() < give_up, f"{view}\n{host.log_tail(40)}"
            await asyncio.sleep(POLL_S)  # poll interval

    async def rows_on(self, host: Host, number: int) -> list[int]:
        """The rows that the guest of standby `number` finds on the disk that was handed over."""
        run_dir = host.config.run_dir / "standby" / VM / str(number) / "vm" / VM
        probe = await connected(run_dir)
        async with asyncio.timeout(BOOT_S):
            while DATA not in {device.serial for device in await probe.list_devices()}:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)  # poll interval
        found = [
            row
            for row in self.rows.acknowledged
            if await probe.read_raw(f"serial:{DATA}", row * BLOCK, BLOCK) == numbered(row)
        ]
        await probe.close()
        return found

    async def goes_on_as_any_vm(self, host: Host, number: int) -> list[str]:
        """What is wrong with the disks of a VM that was standby `number`: each has a spare, which
        the guest goes on with when its backend dies.
        """
        wrong = []
        run_dir = host.config.run_dir / "standby" / VM / str(number) / "vm" / VM
        probe = await connected(run_dir)
        async with host.client() as client:
            for name in (ROOT, DATA):
                give_up = time.monotonic() + SPARE_S
                while not (disk := await client.disk(f"{VM}/{name}")).spare_ready:
                    if time.monotonic() > give_up:
                        break
                    await asyncio.sleep(POLL_S)  # poll interval
                if not disk.spare_ready or disk.active_pid is None:
                    wrong.append(f"disk {name} has no spare: {disk.condition.value} {disk.reason}")
                    continue
                os.kill(disk.active_pid, signal.SIGKILL)
                async with asyncio.timeout(SPARE_S):
                    await probe.read_raw(f"serial:{name}", 0, BLOCK)
        await probe.close()
        return wrong

    async def come_back(self, fate: Fate) -> str:
        """Host a is there again: what it says when its VM is to run there."""
        a = self.world.a
        self.heal()
        if fate is Fate.KILLED:
            await a.start_agent()
        else:
            if fate is Fate.FROZEN:
                self._signal(signal.SIGCONT)
            await until(lambda: not a.processes(QEMU), BACK_S, "a ends its guest")
        return await self.refused("owned by")

    async def ended_there(self) -> str:
        """The VM has ended on b: what a says when the VM is to run there as it was before, or that
        b has not given it back.
        """
        async with self.world.b.client() as client:
            await client.kill_vm(VM)
        give_up = time.monotonic() + BACK_S
        while (owned := await self.world.ownership(VM)).custody is not Custody.FREE:
            if time.monotonic() > give_up:
                return f"it is {owned.custody.value} by {owned.owner} after its end"
            await asyncio.sleep(POLL_S)  # poll interval
        return await self.refused("lacks what was written since")

    async def refused(self, why: str) -> str:
        """What a says when its VM is to run there, once that is `why`, or for too long is not."""
        give_up = time.monotonic() + BACK_S
        async with self.world.a.client() as client:
            while True:
                try:
                    await client.run_vm(self.spec())
                except StateConflict as error:
                    # Its backends may still be ending.
                    if why in error.message or time.monotonic() > give_up:
                        return error.message
                else:
                    return "it runs there again"
                await asyncio.sleep(POLL_S)  # poll interval


async def connected(run_dir: Path) -> ProbeClient:
    """The probe of a guest whose sockets are there."""
    probe = await ProbeClient.connect(run_dir / "probe.sock", deadline_s=BOOT_S)
    await probe.wait_hello(deadline_s=BOOT_S)
    return probe


async def by_operator(host: Host, word: str) -> StandbyView:
    """A person says that the VM has ended."""
    async with host.client() as client:
        return await client.failover_standby(VM, FailoverRequest(force=True, i_know=word))


async def run(fate: Fate, *, refuses: bool = True) -> list[str]:
    """One trial; what went wrong."""
    wrong = []
    async with Trial.opened(refuses=refuses) as trial:
        await trial.begin()
        trial.strike(fate)
        struck = time.monotonic()
        view = await trial.wait_taken_over(trial.world.b)
        took_s = time.monotonic() - struck
        assert view.last_take_over is not None
        found = await trial.rows_on(trial.world.b, view.last_take_over.number)
        if lost := sorted({*trial.rows.acknowledged} - {*found}):
            wrong.append(f"{len(lost)} rows are lost, the first is {lost[0]}")
        first = view.last_take_over
        await trial.kill_again(trial.world.b)
        view = await trial.wait_taken_over(trial.world.b, first.number)
        assert view.last_take_over is not None
        again = await trial.rows_on(trial.world.b, view.last_take_over.number)
        if again != found:
            wrong.append(f"{len(found) - len(again)} rows are lost in the take-over on host b")
        wrong += await trial.goes_on_as_any_vm(trial.world.b, view.last_take_over.number)
        said = await trial.come_back(fate)
        if "owned by b" not in said:
            wrong.append(f"host a is not refused: {said}")
        said = await trial.ended_there()
        if "lacks what was written since" not in said:
            wrong.append(f"host a would run it from its old image: {said}")
        steps = ", ".join(f"{one.name} {one.after_ms:g} ms" for one in first.steps)
        rows = len(trial.rows.acknowledged)
        print(f"{fate.name} {took_s:.1f} s, {rows} rows; {steps}", flush=True)  # noqa: T201
    return wrong


def main() -> int:
    """The campaign."""
    asked = [int(argument) for argument in sys.argv[1:]]
    runs, seed = asked + [20, 1][len(asked) :]
    logging.getLogger("sempervirt").setLevel(logging.ERROR)
    dice, failures = random.Random(seed), 0
    for number in range(runs):
        wrong = asyncio.run(run(dice.choice([*Fate])))
        failures += bool(wrong)
        for what in wrong:
            print(f"run {number} (seed {seed}): {what}", flush=True)  # noqa: T201
    print(f"{runs} runs, {failures} went wrong")  # noqa: T201
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
