"""What the scenarios do and see: two hosts in network namespaces, real guests, etcd.

The operator's commands are those of `semper`. What is said about a guest comes from the guest: its
probe counts requests, reads every block back, and knows whether it has booted again.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from lab.client import EchoClient
from lab.guest import LOAD, VM, Guest
from lab.world import POLL_S, QEMU, Host, World
from sempervirt.api.schemas import DiskView, VmView
from sempervirt.core.errors import SempervirtError
from sempervirt.disk.state import Condition
from sempervirt.guest.reports import Stats
from tests.migration.judge import faults_of

MIB = 1 << 20
WAIT_S = 120.0
# Requests of the guest that show that it goes on: more than are ever under way.
GOES_ON = 100
BACKEND = "semper-blkd"
# The processes that a VM has on its host.
PROGRAMS = (QEMU, BACKEND, "semper-wired")
UNAVAILABLE = 6
# All that the writers use.
DAMAGED_BYTES: int = LOAD["span_bytes"]


async def wait_until(condition: Callable[[], Any], what: str) -> None:
    """Waits for a condition, plain or a coroutine's. Raises AssertionError after WAIT_S."""
    give_up = time.monotonic() + WAIT_S
    while True:
        met = condition()
        if asyncio.iscoroutine(met):
            met = await met
        if met:
            return
        assert time.monotonic() < give_up, f"waited {WAIT_S:g} s for {what}"
        await asyncio.sleep(POLL_S)  # poll interval


class Stage:
    """One scenario. Made by `set`; what it starts is ended with the block."""

    def __init__(self, world: World, stack: AsyncExitStack) -> None:
        self.world = world
        self._stack = stack
        self._guest: Guest | None = None
        self._client: EchoClient | None = None
        self._since = 0.0
        self._qemu: int | None = None
        self._store_is_gone = False
        self._left: tuple[int, int] = (0, 0)
        # From each death until another process was seen to serve.
        self.takeovers_s: list[float] = []
        # Until the guest's requests were answered again as well.
        self.goes_on_s: list[float] = []

    @classmethod
    @asynccontextmanager
    async def set(cls, world: World) -> AsyncIterator[Stage]:
        """Both agents and etcd run, and there is no VM; so it is again afterwards."""
        async with AsyncExitStack() as stack:
            stage = cls(world, stack)
            stack.push_async_callback(stage._clear)
            yield stage

    async def _clear(self) -> None:
        if self._store_is_gone:
            await self.start_store()
        for host in self.world.hosts:
            if not host.agent_runs:
                await host.start_agent()
            for view in await self.vms(host):
                async with host.client() as client:
                    with suppress(SempervirtError):  # it may have ended
                        await client.kill_vm(view.name)
                    await client.forget_vm(view.name)

    def host(self, name: str) -> Host:
        return self.world.a if name == "a" else self.world.b

    @property
    def guest(self) -> Guest:
        assert self._guest is not None
        return self._guest

    @property
    def client(self) -> EchoClient:
        assert self._client is not None
        return self._client

    # What is there

    async def boot(self, host: Host) -> None:
        """VM web: its guest's writers, its heart and its echo are at work."""
        self._guest = await self._stack.enter_async_context(Guest.booted(self.world, host))

    async def start_firmware(self, host: Host, name: str) -> None:
        """A VM that gets no further than its firmware."""
        await host.semper("vm", "run", str(self._file_of(name)), "--detach")

    def _file_of(self, name: str) -> Path:
        image = self.world.images / f"{name}.raw"
        image.unlink(missing_ok=True)
        image.with_name(f"{image.name}.epoch").unlink(missing_ok=True)
        image.touch()
        os.truncate(image, 8 * MIB)
        file = image.with_suffix(".toml")
        disk = f'[[disks]]\nname = "root"\nimage = "{image}"\n'
        file.write_text(f'name = "{name}"\nmemory = "64M"\n{disk}')
        return file

    async def connect(self) -> None:
        """A TCP client of the guest, on neither host."""
        self._client = await self._stack.enter_async_context(self.guest.outside())

    # What happens

    async def kill_backend(self, count: int) -> None:
        """SIGKILL, `count` times, each when the disk is guarded again."""
        for _ in range(count):
            await self._take_over_after((await self._backends())[:1])

    async def kill_backend_and_spare(self) -> None:
        await self._take_over_after(await self._backends())

    async def _backends(self) -> tuple[int, int]:
        """The process that serves web's disk and its spare, once the disk is guarded."""
        await self.wait_guarded()
        view = await self.disk()
        assert view.active_pid is not None
        assert view.spare_pid is not None
        return view.active_pid, view.spare_pid

    async def _take_over_after(self, killed: Sequence[int]) -> None:
        struck = time.monotonic()
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

        async def taken_over() -> bool:
            return (await self.disk()).active_pid not in (None, *killed)

        await wait_until(taken_over, "another process that serves the disk")
        self.takeovers_s.append(time.monotonic() - struck)
        await self.wait_goes_on()
        self.goes_on_s.append(time.monotonic() - struck)

    async def kill_agent(self, host: Host) -> None:
        self._left = await self._backends()
        await asyncio.to_thread(host.kill_agent)

    async def kill_backend_alone(self) -> None:
        """With no agent to see it."""
        os.kill(self._left[0], signal.SIGKILL)

    async def damage(self, host: Host) -> None:
        """Other bytes in the image, from behind the backend, while the guest stands still."""
        await self.wait_goes_on()
        async with host.client() as client:
            await client.pause_vm(VM)
            with self.guest.image.open("r+b") as image:
                image.write(b"\xaa" * DAMAGED_BYTES)
            await client.resume_vm(VM)

    async def restart_qemu(self, host: Host) -> None:
        self._since = time.monotonic()
        self._qemu = (await self.vm(host, VM)).pid
        await host.semper("vm", "restart-qemu", VM)

    async def empty(self, host: Host) -> None:
        """Every VM of a host moves away; the host is in service again after the scenario."""
        self._since = time.monotonic()
        self._stack.push_async_callback(host.semper, "host", "return")
        await host.semper("host", "evacuate")

    async def kill_store(self) -> None:
        await asyncio.to_thread(self.world.etcd.kill)
        self._store_is_gone = True

    async def start_store(self) -> None:
        """Returns when both hosts are known to it again."""
        await asyncio.to_thread(self.world.etcd.start)
        self._store_is_gone = False
        await self.world.wait_members()

    # What is seen

    async def vms(self, host: Host) -> list[VmView]:
        async with host.client() as client:
            return await client.vms()

    async def vm(self, host: Host, name: str) -> VmView:
        async with host.client() as client:
            return await client.vm(name)

    async def disk(self) -> DiskView:
        async with self.world.a.client() as client:
            return await client.disk(f"{VM}/root")

    async def home(self) -> Host:
        """The host where the guest is heard."""
        return await self.guest.wait_beat(*self.world.hosts)

    async def wait_guarded(self) -> None:
        async def guarded() -> bool:
            return (await self.disk()).condition is Condition.GUARDED

        await wait_until(guarded, "a disk that is guarded")

    async def wait_goes_on(self) -> None:
        """The guest's requests are answered."""
        probe = await self.guest.probe_on(await self.home())
        done = (await probe.stats()).completions
        await probe.wait_stats(lambda stats: stats.completions >= done + GOES_ON)

    async def stats(self) -> Stats:
        """The writers are stopped, and every block was read back."""
        return await self.guest.judged(await self.home())

    async def problems(self) -> list[str]:
        """What the guest found wrong with its disk."""
        stats = await self.stats()
        assert stats.writes > 0
        assert stats.verified_final is not None
        assert stats.verified_final.blocks > 0
        return faults_of(stats)

    async def refused(self, what: str) -> str:
        """What the operator on host a is told, when nothing can be asked of the store."""
        words = {
            "start db": ("vm", "run", str(self._file_of("db")), "--detach"),
            "move web": ("vm", "migrate", VM, "--to", "b"),
        }[what]
        return await self.world.a.semper(*words, code=UNAVAILABLE)

    async def wait_runs(self, name: str, host: Host) -> None:
        async def runs() -> bool:
            return (await self.vm(host, name)).state.value == "running"

        await wait_until(runs, f"{name} to run on {host}")

    async def other_qemu(self, host: Host) -> bool:
        pid = (await self.vm(host, VM)).pid
        return pid not in (None, self._qemu)

    async def wait_no_process(self, host: Host) -> None:
        await wait_until(
            lambda: not any(host.processes(program) for program in PROGRAMS),
            f"the end of what VMs had on {host}",
        )

    async def booted_again(self) -> bool:
        probe = await self.guest.probe_on(await self.home())
        return probe.nonce != self.guest.nonce

    async def still_ms(self) -> float:
        """The longest time for which the guest's heart was not heard since the move began."""
        await self.home()
        return self.guest.silence_ms(self._since)
