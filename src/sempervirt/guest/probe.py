"""The client of semper-probe: its commands, typed."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sempervirt.core.errors import Unavailable
from sempervirt.guest.connection import ProbeConnection
from sempervirt.guest.errors import ProbeGone, ProbeRebooted, ProbeSilent
from sempervirt.guest.reports import (
    Device,
    Gaps,
    Hello,
    KernelLine,
    Mode,
    Ran,
    Started,
    Stats,
    Timeline,
)

STATS_POLL_S = 0.05


@dataclass(frozen=True)
class ClockOffset:
    """How the guest's CLOCK_MONOTONIC and the host's relate: host = guest + offset.

    Off by `uncertainty_ns` at most. A guest that was paused has another offset afterwards.
    """

    offset_ns: int
    uncertainty_ns: int

    def to_host(self, guest_ns: int) -> int:
        return guest_ns + self.offset_ns

    def to_guest(self, host_ns: int) -> int:
        return host_ns - self.offset_ns


class ProbeClient(ProbeConnection):
    """The probe of one VM. Make one by `await ProbeClient.connect(path)`; end it by `close`.

    Every command raises what `ask` raises.
    """

    async def measure_clock(self, *, samples: int = 8) -> ClockOffset:
        """Compares the clocks: of several pings the quickest counts."""
        best = ClockOffset(0, 1 << 62)
        for _ in range(samples):
            before = time.monotonic_ns()
            answer = await self.call("ping")
            after = time.monotonic_ns()
            if after - before < 2 * best.uncertainty_ns:
                middle = (before + after) // 2
                best = ClockOffset(middle - int(answer["monotonic_ns"]), (after - before) // 2)
        return best

    async def list_devices(self) -> list[Device]:
        answer = await self.call("list")
        return [Device.model_validate(device) for device in answer["devices"]]

    async def write_start(
        self, device: str, *, writers: int = 16, mode: Mode = "mixed", **arguments: Any
    ) -> Started:
        """Starts writers.

        More arguments: depth, block_size, offset_bytes, span_bytes, seed, verify_ratio,
        flush_every, hang_s, resume (see `Config` in crates/probe/src/writers.rs).
        """
        answer = await self.call(
            "write_start", device=device, writers=writers, mode=mode, **arguments
        )
        return Started.model_validate(answer)

    async def write_stop(
        self,
        *,
        verify: bool = True,
        device: str | None = None,
        stop_deadline_s: float = 10.0,
        verify_deadline_s: float = 120.0,
    ) -> Stats:
        """Stops the writers and, unless told otherwise, reads every block back.

        A writer that is not back by the first deadline counts as hung.
        """
        arguments = {
            "device": device,
            "verify": verify,
            "deadline_s": stop_deadline_s,
            "verify_deadline_s": verify_deadline_s,
        }
        patience_s = stop_deadline_s + verify_deadline_s + 10.0
        answer = await self.ask("write_stop", arguments, deadline_s=patience_s)
        return Stats.model_validate(answer)

    async def stats(self, *, device: str | None = None) -> Stats:
        return Stats.model_validate(await self.call("stats", device=device))

    async def wait_stats(
        self,
        condition: Callable[[Stats], bool],
        *,
        device: str | None = None,
        deadline_s: float = 180.0,
    ) -> Stats:
        """Waits for figures of the writers that fulfil a condition, and gives those figures.

        Raises Unavailable, with the last figures, at the deadline.
        """
        give_up = time.monotonic() + deadline_s
        while True:
            stats = await self.stats(device=device)
            if condition(stats):
                return stats
            if time.monotonic() > give_up:
                raise Unavailable(f"not reached within {deadline_s:g} s; the last figures: {stats}")
            await asyncio.sleep(STATS_POLL_S)

    async def timeline(self, *, since_ns: int = 0, device: str | None = None) -> Timeline:
        answer = await self.call("timeline", device=device, since_ns=since_ns)
        return Timeline.model_validate(answer)

    async def gaps(self, *, since_ns: int = 0, device: str | None = None) -> Gaps:
        return Gaps.model_validate(await self.call("gaps", device=device, since_ns=since_ns))

    async def dmesg(self, *, since: int = 0) -> list[KernelLine]:
        answer = await self.call("dmesg", since=since)
        return [KernelLine.model_validate(line) for line in answer["lines"]]

    async def read_raw(self, device: str, offset: int, length: int) -> bytes:
        answer = await self.call("read_raw", device=device, offset=offset, length=length)
        return base64.b64decode(answer["data_b64"])

    async def write_raw(self, device: str, offset: int, data: bytes) -> None:
        text = base64.b64encode(data).decode()
        await self.call("write_raw", device=device, offset=offset, data_b64=text)

    async def execute(self, *argv: str, deadline_s: float = 180.0) -> Ran:
        """Runs a program in the guest; a name without a slash is an applet of busybox."""
        return Ran.model_validate(await self.call("exec", deadline_s=deadline_s, argv=argv))

    async def network_up(self, device: str, address: str, *, gateway: str | None = None) -> None:
        """Brings an interface up, with an address and its prefix ("10.0.2.15/24")."""
        await self.call("net_up", device=device, address=address, gateway=gateway)

    async def echo_start(self, port: int) -> None:
        """From now on the guest echoes TCP at that port of every address."""
        await self.call("tcp_echo_start", port=port)

    async def reboot(self, *, deadline_s: float = 180.0) -> Hello:
        """Reboots the guest at once, without sync, and waits for the greeting of the next boot."""
        nonce = self.nonce
        with suppress(ProbeRebooted):
            await self.call("reboot", deadline_s=deadline_s)
        return await self.wait_hello(other_than=nonce, deadline_s=deadline_s)

    async def unbind(self, device: str) -> None:
        """Takes the driver off a disk, as before a device reset."""
        await self.call("unbind", device=device)

    async def bind(self, device: str) -> str:
        """Gives an unbound disk the driver back; returns the new name of the disk ("vdb")."""
        return str((await self.call("bind", device=device))["device"])

    async def heartbeat_start(self, *, interval_ms: int = 10) -> None:
        """From now on there is an event `beat` at this interval."""
        await self.call("heartbeat_start", interval_ms=interval_ms)

    async def heartbeat_stop(self) -> None:
        await self.call("heartbeat_stop")

    async def poweroff(self) -> None:
        """Powers the guest off at once, without sync; the connection ends when QEMU does."""
        with suppress(ProbeGone, ProbeSilent):
            await self.call("poweroff", deadline_s=10.0)
