"""One VM with standbys whose QEMU is killed, and a client that writes numbered rows to its disk.

    rows ──► first VM ── killed ─► standby goes on ◄── rows: the next one acknowledged
              every row that was acknowledged is read back from the disk that was handed over

The guest is the judge: what counts is what it reads from its disks afterwards.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from sempervirt.agent import Agent, AgentConfig, Vm
from sempervirt.core.errors import SempervirtError, Unavailable
from sempervirt.guest import image as guest_image
from sempervirt.guest.probe import ProbeClient
from sempervirt.host.changes import Changes
from sempervirt.host.directories import make_scratch
from sempervirt.qemu.spec import VmSpec
from sempervirt.standby.driver import StandbyDriver
from sempervirt.standby.state import Life, Step, TakeOver
from sempervirt.standby.values import EVERY_MAX_S, Policy, Tier

MIB, BLOCK = 1 << 20, 4096
NAME = "guest"
CHANNEL = "org.sempervirt.probe"
DISK_MIB = 64
ROWS_MAX = DISK_MIB * MIB // BLOCK - 1
BOOT_S, READY_S, OVER_S, ANSWER_S = 120.0, 300.0, 60.0, 60.0
PAUSE_S = 0.01


@dataclass(frozen=True)
class Succession:
    """One take-over. Times in ms: `detected` and `running` from the kill to the agent's knowledge
    of QEMU's end and to QEMU's word that the guest runs, `answered` to the next row that was
    acknowledged. `rows` were acknowledged before, `lost` of them are not on the disk. `steps` are
    those of the take-over, from its declaration. `as_snapshot`: the system disk is as the snapshot
    has it.
    """

    tier: Tier
    detected_ms: float
    running_ms: float
    answered_ms: float
    boot_s: float
    rows: int
    lost: int
    as_snapshot: bool
    steps: tuple[tuple[str, float], ...]

    @property
    def clean(self) -> bool:
        """Whether nothing was lost that was not said to be."""
        return self.lost == 0 and self.as_snapshot and self.rows > 0


def row_of(number: int) -> bytes:
    """The content of a row."""
    return number.to_bytes(8, "little") * (BLOCK // 8)


@dataclass
class Client:
    """Writes one row after the other; `answers` are the times of acknowledgements, in seconds of
    CLOCK_MONOTONIC.
    """

    acknowledged: list[int] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)
    last: int = 0
    changes: Changes = field(default_factory=Changes)

    async def write(self, probe: ProbeClient, *, rows: int | None = None) -> None:
        """Writes until the guest is gone, or so many rows."""
        begun = self.last
        while rows is None or self.last < begun + rows:
            number = self.last = self.last % ROWS_MAX + 1
            try:
                await probe.write_raw("serial:data", number * BLOCK, row_of(number))
            except SempervirtError:
                return
            self.acknowledged.append(number)
            self.answers.append(time.monotonic())
            self.changes.notify()
            await asyncio.sleep(PAUSE_S)

    async def wait_rows(self, rows: int) -> None:
        """Waits until so many more are acknowledged. Raises Unavailable."""
        wanted = len(self.answers) + rows
        await self.changes.wait_until(
            lambda: len(self.answers) >= wanted, timeout_s=ANSWER_S, what="rows"
        )


class Trial:
    """A VM of an agent of its own, in a temporary directory. Use as `async with Trial(tier)`."""

    def __init__(self, tier: Tier, keep: int = 1) -> None:
        self.tier = tier
        self.client = Client()
        self.kills: list[float] = []
        self._keep = keep
        self._stack = AsyncExitStack()
        self._agent: Agent | None = None
        self._driver: StandbyDriver | None = None
        self._probe: ProbeClient | None = None
        self._writing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._end_writing()
        await self._stack.aclose()

    @property
    def vm(self) -> Vm:
        """The VM, whichever QEMU it is now."""
        assert self._agent is not None
        return self._agent.vms[NAME]

    @property
    def places(self) -> AgentConfig:
        """Where the VM has its files."""
        assert self._agent is not None
        return self._agent.config

    @property
    def driver(self) -> StandbyDriver:
        """The owner of its standbys."""
        assert self._driver is not None
        return self._driver

    @property
    def probe(self) -> ProbeClient:
        """The connection to the guest that runs."""
        assert self._probe is not None
        return self._probe

    async def _start(self) -> None:
        place = make_scratch("svs-", Path("/tmp"))
        self._stack.callback(shutil.rmtree, place, ignore_errors=True)
        images = {name: place / f"{name}.raw" for name in ("root", "data")}
        for image in images.values():
            image.touch()
            os.truncate(image, DISK_MIB * MIB)
        config = AgentConfig(place / "s", place / "r")
        self._agent = await self._stack.enter_async_context(Agent.open(config))
        await self._agent.run_vm(_spec(images))
        self._probe = await self._connected()
        await self._wait_disk()
        policy = Policy(EVERY_MAX_S, self._keep, self.tier)
        self._driver = await self._agent.standbys.enable(self.vm, policy)

    async def wait_ready(self) -> float:
        """Waits for a standby that is newer than the VM; how long its guest took to boot. Raises
        Unavailable with the reason when there is none.
        """

        def ready() -> bool:
            state = self.driver.state
            serving = state.serving
            newer = [one for one in state.ready if serving is None or one.number > serving.number]
            return bool(newer or state.failures)

        await self.driver.changes.wait_until(ready, timeout_s=READY_S, what="a standby")
        state = self.driver.state
        if state.failures:
            raise Unavailable(state.trouble)
        return state.ready[-1].made_s

    async def begin_rows(self) -> None:
        """The client writes from now on."""
        self._writing = asyncio.create_task(self.client.write(self.probe))

    async def _end_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            with suppress(asyncio.CancelledError):
                await self._writing
            self._writing = None
        if self._probe is not None:
            await self._probe.close()
            self._probe = None

    async def kill_first(self, *, rows: int = 20) -> Succession:
        """Waits for a standby, marks the system disk, writes rows, kills QEMU, and looks at what
        goes on. The client has to write already. Raises Unavailable when nothing does.
        """
        boot_s = await self.wait_ready()
        # After the snapshot: the standby does not have it.
        marked = await self.probe.read_raw("serial:root", 0, BLOCK)
        await self.probe.write_raw("serial:root", 0, os.urandom(BLOCK))
        self.client.acknowledged.clear()
        await self.client.wait_rows(rows)
        first, past = self.vm, self.driver.state.past
        assert first.pid is not None
        killed = time.monotonic()
        os.kill(first.pid, signal.SIGKILL)
        self.kills.append(killed)
        over, answered = await self._followed(first, past)
        before = self.client.acknowledged[:-1]
        await self.begin_rows()
        await self.client.wait_rows(rows)
        lost = [row for row in before if not await self._has(row)]
        as_snapshot = await self.probe.read_raw("serial:root", 0, BLOCK) == marked
        steps = dict(over.steps)
        declared_ms = (over.since - killed) * 1e3
        return Succession(
            tier=self.tier,
            detected_ms=round(declared_ms, 1),
            running_ms=round(declared_ms + steps["running"], 1),
            answered_ms=round((answered - killed) * 1e3, 1),
            boot_s=boot_s,
            rows=len(before),
            lost=len(lost),
            as_snapshot=as_snapshot,
            steps=over.steps,
        )

    async def _followed(self, first: Vm, past: TakeOver | None) -> tuple[TakeOver, float]:
        """The take-over, and when a row was acknowledged again."""
        await self.driver.changes.wait_until(
            lambda: self.vm is not first or self.driver.state.past != past,
            timeout_s=OVER_S,
            what="the take-over",
        )
        await self._end_writing()
        probe = await self._connected()
        self._probe = probe
        answered = await self._answered(probe)
        await self.driver.changes.wait_until(
            lambda: self.driver.state.past != past, timeout_s=OVER_S, what="the take-over's end"
        )
        over = self.driver.state.past
        if over is None or over.step is not Step.DONE:
            raise Unavailable(f"no standby went on: {over and over.trouble}")
        serving = self.driver.state.serving
        assert serving is not None
        assert serving.life is Life.SERVING
        return over, answered

    async def _answered(self, probe: ProbeClient) -> float:
        """When a row was acknowledged again: the guest has to find its data disk first."""
        deadline = time.monotonic() + ANSWER_S
        while True:
            before = len(self.client.answers)
            await self.client.write(probe, rows=1)
            if len(self.client.answers) > before:
                return self.client.answers[-1]
            if time.monotonic() > deadline:
                raise Unavailable(f"no row was acknowledged within {ANSWER_S:g} s")
            await asyncio.sleep(PAUSE_S)

    async def _has(self, row: int) -> bool:
        return await self.probe.read_raw("serial:data", row * BLOCK, BLOCK) == row_of(row)

    async def _connected(self) -> ProbeClient:
        probe = await ProbeClient.connect(self.vm.channel_path("probe"), deadline_s=BOOT_S)
        await probe.wait_hello(deadline_s=BOOT_S)
        return probe

    async def _wait_disk(self) -> None:
        deadline = time.monotonic() + BOOT_S
        while "data" not in {one.serial for one in await self.probe.list_devices()}:
            if time.monotonic() > deadline:
                raise Unavailable("the guest does not see its data disk")
            await asyncio.sleep(PAUSE_S)


def _spec(images: dict[str, Path]) -> VmSpec:
    guest = guest_image()
    return VmSpec.model_validate(
        {
            "name": NAME,
            "memory": "256M",
            "kernel": str(guest.kernel),
            "initrd": str(guest.initrd),
            "cmdline": "console=ttyS0 quiet",
            "disks": [
                {"name": "root", "image": str(images["root"]), "serial": "root"},
                {
                    "name": "data",
                    "image": str(images["data"]),
                    "serial": "data",
                    "keep": "latest",
                },
            ],
            "nics": [{}],
            "channels": [{"name": CHANNEL}],
            "standby": {"initialised": "channel", "channel": CHANNEL, "marker": "hello"},
        }
    )
