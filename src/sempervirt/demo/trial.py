"""One VM with a verified load, and everything that can happen to the disk of the VM.

A trial starts an agent of its own in a temporary directory, runs a stock Linux guest whose disk
is served by a supervised backend, starts the probe's stamped writers in it, and then does what it
is told: kill, upgrade, stop and continue, reboot, unbind. `finish` stops the writers, reads every
block back and gives the verdict. The guest is the judge: nothing that the host says counts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from sempervirt.agent import Agent, AgentConfig
from sempervirt.core.errors import OutcomeUnknown, SempervirtError, Unavailable
from sempervirt.core.queue_map import Binding, ThreadMap
from sempervirt.demo.stall import Cause, Stall, back_ms, stall_ms, steps_ms
from sempervirt.demo.verdict import Verdict
from sempervirt.disk.answers import Status
from sempervirt.disk.backend import BackendCommand, Blkd
from sempervirt.disk.driver import Disk
from sempervirt.guest import image as guest_image
from sempervirt.guest.errors import ProbeGone, ProbeSilent
from sempervirt.guest.probe import ClockOffset, ProbeClient
from sempervirt.guest.reports import Mode
from sempervirt.host.directories import make_scratch
from sempervirt.qemu.accel import AcceleratorKind
from sempervirt.qemu.spec import ChannelSpec, DiskSpec, Engine, VmSpec

log = logging.getLogger(__name__)

MIB = 1 << 20
VM = "guest"
DISK = "data"
SERIAL = "trial"
BOOT_ATTEMPTS = 3
EMULATOR_SIGNALS = (signal.SIGABRT, signal.SIGSEGV)
# After a take-over: for the guest to notice, and for the next spare to be ready.
# The kernel gives up a dead backend's lock when the medium has done its requests.
SETTLE_DEADLINE_S = 60.0
# Of the load before a kill, to compare what comes after it with: no more than the shortest pause.
BEFORE_NS = 150 * 10**6


@dataclass(frozen=True)
class Load:
    """What the writers in the guest do; see the probe's write_start."""

    writers: int = 16
    depth: int = 1
    mode: Mode = "mixed"
    flush_every: int = 64
    hang_s: float = 20.0


@dataclass(frozen=True)
class TrialSetup:
    """What is tried. `image` is made anew, `size_mib` large, unless it is a device."""

    image: Path
    size_mib: int = 128
    engine: Engine = "auto"
    direct: bool = False
    queues: int = 1
    thread_map: ThreadMap | None = None
    queue_size: int = 128
    memory_mib: int = 256
    vcpus: int = 2
    load: Load = field(default_factory=Load)
    command: BackendCommand = field(default_factory=Blkd)
    seed: int = 0


class Trial:
    """Use as `async with Trial(setup) as trial`."""

    def __init__(self, setup: TrialSetup) -> None:
        self.setup = setup
        self.verdict = Verdict()
        self.started_ns = 0
        self._stack = AsyncExitStack()
        self._probe: ProbeClient | None = None
        self._agent: Agent | None = None
        self.accelerator: AcceleratorKind | None = None
        self._clock = ClockOffset(0, 0)

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
        await self._stack.aclose()

    # The parts

    @property
    def agent(self) -> Agent:
        """The trial's own agent."""
        assert self._agent is not None
        return self._agent

    @property
    def disk(self) -> Disk:
        """The disk under trial."""
        return self.agent.disks[f"{VM}/{DISK}"]

    @property
    def probe(self) -> ProbeClient:
        """The probe in the guest."""
        assert self._probe is not None
        return self._probe

    @property
    def device(self) -> str:
        """What the probe calls the disk; a foreign backend gives it no serial number."""
        return f"serial:{SERIAL}" if self.setup.command.has_control else "vda"

    @property
    def clock(self) -> ClockOffset:
        """How the guest's clock and the host's relate, as last compared."""
        return self._clock

    async def _start(self) -> None:
        setup = self.setup
        guest = guest_image()
        folder = make_scratch("semper-trial-")
        self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
        if not setup.image.exists() or setup.image.is_file():
            make_image(setup.image, setup.size_mib * MIB)
            self._stack.callback(setup.image.unlink, missing_ok=True)
        self._agent = await self._stack.enter_async_context(
            Agent.open(
                AgentConfig(
                    state_dir=folder / "state", run_dir=folder / "run", backend=setup.command
                )
            )
        )
        spec = VmSpec(
            name=VM,
            memory=setup.memory_mib * MIB,
            vcpus=setup.vcpus,
            kernel=guest.kernel,
            initrd=guest.initrd,
            cmdline=guest.cmdline,
            disks=(
                DiskSpec(
                    name=DISK,
                    image=setup.image,
                    engine=setup.engine,
                    direct=setup.direct,
                    queues=setup.queues,
                    thread_map=setup.thread_map,
                    queue_size=setup.queue_size,
                    serial=SERIAL,
                ),
            ),
            channels=(ChannelSpec(name="org.sempervirt.probe"),),
        )
        self._stack.push_async_callback(self._kill_vm)
        for attempt in range(BOOT_ATTEMPTS):
            try:
                await self._boot(spec)
            except (ProbeGone, ProbeSilent):
                vm = self.agent.vms[VM]
                console = vm.machine.files.console_log.read_text(errors="replace")
                died = emulator_died(self.accelerator, vm.end.signal if vm.end else None)
                stuck = emulator_stuck(self.accelerator, console)
                if not (died or stuck) or attempt + 1 == BOOT_ATTEMPTS:
                    raise
                log.warning("QEMU fell over while its guest booted: %s; once more", vm.end)
                await vm.kill()
                await self.agent.forget_vm(VM)
            else:
                return

    async def _boot(self, spec: VmSpec) -> None:
        vm = await self.agent.run_vm(spec)
        self.accelerator = vm.record.accelerator.kind
        self._probe = await ProbeClient.connect(vm.channel_path("probe"))
        self._stack.push_async_callback(self.probe.close)
        try:
            await self.probe.wait_hello(deadline_s=180)
        except (ProbeGone, ProbeSilent) as error:
            with suppress(SempervirtError):
                await vm.wait_ended(timeout_s=5)
            error.add_note(f"{self.accelerator}, {vm.run}: {vm.end}: {vm.log_tail()}")
            error.add_note(vm.machine.files.console_log.read_text(errors="replace")[-2000:])
            raise

    async def _kill_vm(self) -> None:
        if (vm := self.agent.vms.get(VM)) is None:  # it was not begun
            return
        with suppress(SempervirtError):
            await vm.kill()

    # The load

    async def start_load(self) -> None:
        """Starts the writers, once the disk is guarded."""
        load = self.setup.load
        await self.wait_guarded()
        await self.probe.write_start(
            self.device,
            writers=load.writers,
            depth=load.depth,
            mode=load.mode,
            flush_every=load.flush_every,
            hang_s=load.hang_s,
            seed=self.setup.seed,
        )
        await self.compare_clocks()
        self.started_ns = time.monotonic_ns()

    async def stop_load(self) -> None:
        """Stops the writers, reads every block back, and adds up."""
        deadline_s = self.setup.load.hang_s + 10
        self.verdict.add(await self.probe.write_stop(stop_deadline_s=deadline_s))

    async def compare_clocks(self) -> None:
        """To be done after each pause of the guest: its clock stands still meanwhile."""
        self._clock = await self.probe.measure_clock()

    async def completions(self, since_ns: int = 0) -> list[tuple[float, int]]:
        """(seconds since the load began, completions) for each 10 ms, on the host's clock."""
        since = max(0, self._clock.to_guest(since_ns)) if since_ns else 0
        timeline = await self.probe.timeline(since_ns=since)
        start = self._clock.to_host(timeline.start_ns) - self.started_ns
        return [
            ((start + index * timeline.bin_ns) / 1e9, count)
            for index, count in enumerate(timeline.counts)
        ]

    # What happens to the disk

    async def kill_backend(self, kill: Callable[[], Awaitable[None]] | None = None) -> Stall:
        """SIGKILL to the backend that serves; returns when its successor is guarded again.

        `kill` is for who chooses the instant: it calls `kill_active`.
        """
        stall = await self._take_over(Cause.KILL, kill or self.kill_active)
        self.verdict.kills += 1
        return stall

    async def hang_backend(self) -> Stall:
        """SIGSTOP to the backend that serves, which nobody undoes; returns when its successor is
        guarded.
        """

        async def stop() -> None:
            self._signal_active(signal.SIGSTOP)

        stall = await self._take_over(Cause.HANG, stop)
        self.verdict.hangs += 1
        return stall

    async def upgrade(self, binary: str | None = None) -> Stall:
        """Replaces the backend, as `semper disk upgrade` does."""

        async def upgrade() -> None:
            await self.disk.upgrade(binary)

        stall = await self._take_over(Cause.UPGRADE, upgrade)
        self.verdict.upgrades += 1
        return stall

    async def terminate_backend(self) -> Stall:
        """SIGTERM to the backend that serves: it drains, and its spare goes on."""

        async def terminate() -> None:
            self._signal_active(signal.SIGTERM)

        stall = await self._take_over(Cause.TERMINATE, terminate)
        self.verdict.upgrades += 1
        return stall

    async def kill_active(self) -> None:
        """SIGKILL to the backend that serves, and nothing else."""
        self._signal_active(signal.SIGKILL)

    async def abort_active(self) -> None:
        """As `kill_active`, by SIGABRT, as a program that finds a mistake in itself."""
        self._signal_active(signal.SIGABRT)

    def _signal_active(self, number: signal.Signals) -> None:
        pid = self.disk.active_pid
        if pid is None:
            raise Unavailable("there is no backend to signal")
        os.kill(pid, number)

    async def rebind(self, thread_map: ThreadMap) -> None:
        """Moves queues to other threads, as `semper disk threads` does."""
        await self.disk.rebind(Binding(thread_map, "trial"))
        self.verdict.rebindings += 1

    async def _take_over(self, cause: Cause, end: Callable[[], Awaitable[None]]) -> Stall:
        await self.compare_clocks()
        before = self.disk.active_pid
        kill_ns = time.monotonic_ns()
        await end()
        await self.wait_successor(before)
        stall = await self._measure(cause, kill_ns)
        await self.wait_guarded()
        if stall.ms is not None:
            stall = replace(stall, back_ms=await self._throughput_back(kill_ns))
        self.verdict.stalls.append(stall)
        return stall

    async def _throughput_back(self, kill_ns: int) -> float | None:
        since = max(0, self._clock.to_guest(kill_ns - BEFORE_NS))
        done = await self.probe.timeline(since_ns=since)
        starts = (self._clock.to_host(done.start_ns + n * done.bin_ns) for n in count())
        return back_ms(kill_ns, list(zip(starts, done.counts, strict=False)), done.bin_ns)

    async def _measure(self, cause: Cause, kill_ns: int) -> Stall:
        if not self.disk.setup.command.has_control:
            return Stall(kill_ns, None, {}, 0, cause)
        status = await self._serving_status()
        if status is None:
            self.verdict.problems.append("no request was completed after a take-over")
            return Stall(kill_ns, None, {}, 0, cause)
        first = status.timeline_ns.first_completion
        assert first is not None
        gaps = await self.probe.gaps(since_ns=max(0, self._clock.to_guest(kill_ns) - 50 * 10**6))
        on_host = [(self._clock.to_host(a), self._clock.to_host(b)) for a, b in gaps.gaps]
        return Stall(
            kill_ns,
            stall_ms(kill_ns, first, on_host),
            steps_ms(kill_ns, status.timeline_ns),
            status.counters.replayed,
            cause,
            kept=status.resumed,
        )

    async def _serving_status(self) -> Status | None:
        """The active backend's status once a request was answered; None if none ever is."""
        deadline = time.monotonic() + SETTLE_DEADLINE_S
        while time.monotonic() < deadline:
            with suppress(Unavailable, OutcomeUnknown):
                status = await self.disk.status()
                if status.timeline_ns.first_completion is not None:
                    return status
            await asyncio.sleep(0.005)
        return None

    async def stop_and_continue(self, pause_s: float = 0.05) -> int:
        """QMP stop and cont under load; returns when it was, as CLOCK_MONOTONIC nanoseconds."""
        vm = self.agent.vms[VM]
        at_ns = time.monotonic_ns()
        await vm.pause()
        await asyncio.sleep(pause_s)
        await vm.resume()
        await self.compare_clocks()
        self.verdict.pauses += 1
        return at_ns

    async def reboot(self) -> None:
        """Verifies, starts the writers again, reboots the guest under them, and starts over."""
        await self.stop_load()
        await self.start_load()
        await self.probe.reboot()
        self.verdict.reboots += 1
        await self.start_load()

    async def reset_device(self) -> None:
        """Unbinds and binds the disk's driver in the guest, between two verified loads."""
        await self.stop_load()
        # A disk without a driver has no serial number to be found by.
        devices = await self.probe.list_devices()
        name = next(device.name for device in devices if device.serial == SERIAL)
        await self.probe.unbind(name)
        await self.probe.bind(name)
        self.verdict.resets += 1
        await self.start_load()

    # Waiting

    async def wait_guarded(self) -> None:
        """Waits for a ready spare, or, where the policy has no spares, for a backend that serves.

        Raises Unavailable at the deadline.
        """
        if self.disk.setup.policy.spare:
            await self.disk.wait_spare_ready(SETTLE_DEADLINE_S)
        else:
            await self.disk.wait_serving(SETTLE_DEADLINE_S)

    async def wait_successor(self, pid: int | None) -> None:
        """Waits until a process other than `pid` is the active one. Raises Unavailable."""
        await self.disk.changes.wait_until(
            lambda: self.disk.active_pid not in (None, pid),
            timeout_s=SETTLE_DEADLINE_S,
            what="a successor of the backend",
        )


def emulator_died(accelerator: AcceleratorKind | None, by_signal: int | None) -> bool:
    """Whether QEMU fell over itself, which no disk can bring about.

    Its emulator of several processors (QEMU 10.0) may look at a memory map that is freed, when a
    guest sets up its PCI devices: `iotlb_to_section: Assertion` or a segmentation fault, in one
    boot of a hundred on a busy machine.
    """
    return accelerator == "tcg" and by_signal in EMULATOR_SIGNALS


def emulator_stuck(accelerator: AcceleratorKind | None, console: str) -> bool:
    """Whether QEMU's emulator has lost a processor's timer, which no disk can bring about either:
    the guest's kernel says so, of one boot of some thousands on a busy machine.
    """
    return accelerator == "tcg" and "rcu_preempt kthread timer wakeup didn't happen" in console


def make_image(path: Path, size_bytes: int) -> None:
    """A new image with every block written, so that a full disk shows now and not later, and the
    file system does not take the image for thousands of pieces (whose removal takes seconds).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size_bytes)
        for _ in range(size_bytes // MIB):
            file.write(bytes(MIB))
        file.flush()
        os.fdatasync(file.fileno())


@asynccontextmanager
async def running(setup: TrialSetup) -> AsyncIterator[Trial]:
    """A trial whose load is running."""
    async with Trial(setup) as trial:
        await trial.start_load()
        yield trial
