"""When the OS of a guest is up, as the VM file says: its agent answers, or a marker was read.

Whatever a guest writes is untrusted: it is read in bounded pieces, and only compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import assert_never

from sempervirt.core.errors import (
    InvalidRequest,
    OutcomeUnknown,
    SempervirtError,
    StateConflict,
    Unavailable,
)
from sempervirt.core.printable import printable
from sempervirt.host import process
from sempervirt.qemu.guest_agent import GuestAgent
from sempervirt.qemu.spec import StandbySpec, VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.vm.vm import Vm

PING_S = 2.0
# Its agent starts a program for that, which waits for the hardware's clock to tick; a host on which
# many guests go on at once is busy.
CLOCK_S = 10.0
FLUSH_S = 2.0
AGAIN_S = 0.25
PIECE_BYTES = 64 << 10
CONSOLE_LINES = 5
LINE_MAX = 200
BY_DEFAULT = StandbySpec()
# Of Linux, from 5.18 and from 6.10 on.
DRIVERS = ("/sys/bus/acpi/drivers/vmgenid", "/sys/bus/platform/drivers/vmgenid")
SEED_BYTES = 64
NO_DRIVER = (
    "the guest's kernel has no driver for generation IDs: it was given new random bytes, which "
    "count from its next seeding on, within a minute; what it draws before may be drawn twice. To "
    "have them count at once its agent has to be able to start perl or python3"
)
RESEEDED = (
    "the guest's kernel has no driver for generation IDs: its agent has had it draw a new seed; "
    "what it drew until then may be drawn twice"
)
NO_AGENT = (
    "the guest has no agent: its clock was not set, and it draws new random numbers only if its "
    "kernel has a driver for generation IDs"
)
# A program starts in the guest.
RESEED_S = 10.0


def how(spec: VmSpec) -> StandbySpec:
    """What the VM file says of standbys. Raises InvalidRequest when nothing would show that its
    guest is up.
    """
    found = spec.standby or BY_DEFAULT
    if found.initialised == "agent" and spec.guest_agent is None:
        raise InvalidRequest(
            f"nothing would show that a standby of VM {spec.name} is up",
            remedy="give the VM a channel org.qemu.guest_agent.0, or write in the VM file what its "
            'guest says when it is up: [standby] initialised = "console", marker = "…"',
        )
    return found


def agent_of(vm: Vm) -> GuestAgent | None:
    """The agent inside the guest of `vm`, if the VM has a channel for one."""
    channel = vm.spec.guest_agent
    if channel is None:
        return None
    return GuestAgent(vm.machine.files.channel(channel), vm.name, vm.pid)


async def wait_initialised(vm: Vm) -> float:
    """Returns when the guest's OS is up; for how long that was waited, in seconds.

    Raises Unavailable at the deadline, or when the guest ends, with the console's last lines.
    """
    expected = how(vm.spec)
    begun = time.monotonic()
    seen = asyncio.ensure_future(_seen(vm, expected))
    ended = asyncio.ensure_future(vm.machine.wait_ended())
    try:
        await asyncio.wait(
            (seen, ended), timeout=expected.deadline_s, return_when=asyncio.FIRST_COMPLETED
        )
        if seen.done():
            seen.result()
            return time.monotonic() - begun
        why = f"it ended: {vm.state.why}" if ended.done() else f"not within {expected.deadline_s} s"
    finally:
        for waiting in (seen, ended):
            waiting.cancel()
        await asyncio.wait((seen, ended))
    console = process.tail_of(vm.machine.files.console_log, CONSOLE_LINES)
    said = [printable(line)[:LINE_MAX] for line in console]
    last = f"; its console's last lines: {' | '.join(said)}" if said else ""
    raise Unavailable(f"the guest was not initialised ({_awaited(expected)}), {why}{last}")


def _awaited(expected: StandbySpec) -> str:
    match expected.initialised:
        case "agent":
            return "its agent does not answer"
        case "channel":
            return f'"{expected.marker}" was not read on {expected.channel}'
        case "console":
            return f'"{expected.marker}" was not read on the console'
        case _:
            assert_never(expected.initialised)


async def _seen(vm: Vm, expected: StandbySpec) -> None:
    match expected.initialised:
        case "agent":
            await _again(lambda: _answers(vm))
        case "channel":
            assert expected.channel is not None
            path = vm.channel_path(expected.channel)
            await _again(lambda: _read(path, _marker(expected)))
        case "console":
            log = vm.machine.files.console_log
            await _again(lambda: _logged(log, _marker(expected)))
        case _:
            assert_never(expected.initialised)


def _marker(expected: StandbySpec) -> bytes:
    assert expected.marker is not None
    return expected.marker.encode()


async def _again(look: Callable[[], Awaitable[bool]]) -> None:
    while True:
        if await look():
            return
        await asyncio.sleep(AGAIN_S)


async def _answers(vm: Vm) -> bool:
    agent = agent_of(vm)
    assert agent is not None
    try:
        await agent.ping(PING_S)
    except (Unavailable, OutcomeUnknown, StateConflict):
        return False
    return True


async def _read(path: Path, marker: bytes) -> bool:
    """Whether the marker comes on a channel before the channel closes."""
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    tail = b""
    try:
        while piece := await reader.read(PIECE_BYTES):
            tail = tail[-len(marker) :] + piece
            if marker in tail:
                return True
    except OSError:
        return False
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return False


async def _logged(log: Path, marker: bytes) -> bool:
    """Whether the marker stands in a log that this VM alone has written."""

    def look() -> bool:
        tail = b""
        try:
            with log.open("rb") as file:
                while piece := file.read(PIECE_BYTES):
                    tail = tail[-len(marker) :] + piece
                    if marker in tail:
                        return True
        except OSError:
            return False
        return False

    return await asyncio.to_thread(look)


async def greet(vm: Vm) -> tuple[str, ...]:
    """Sets the clock of a guest that stood still, and sees that the guest answers: what was found.

    A guest without an agent cannot be asked; then that is what was found.
    """
    agent = agent_of(vm)
    if agent is None:
        return (NO_AGENT,)
    try:
        wrong_s = await agent.set_time(CLOCK_S)
        clock = f"the guest answers; its clock is right within {abs(wrong_s) * 1e3:.0f} ms"
    except SempervirtError as error:
        clock = f"the guest's agent was asked to set its clock: {error.message}"
    return (clock, *await _reseed(agent))


async def _reseed(agent: GuestAgent) -> tuple[str, ...]:
    """Gives random bytes to a guest whose kernel has no driver for the generation ID."""
    try:
        for driver in DRIVERS:
            if await agent.exists(driver, PING_S):
                return ()
        with contextlib.suppress(Unavailable, OutcomeUnknown):  # a guest that is slow to start it
            if await agent.reseed(secrets.token_bytes(SEED_BYTES), RESEED_S):
                return (RESEEDED,)
        await agent.give_random_bytes(secrets.token_bytes(SEED_BYTES), PING_S)
    except SempervirtError as error:
        return (f"whether the guest draws new random numbers is not known: {error.message}",)
    return (NO_DRIVER,)


async def flush(vm: Vm) -> str:
    """Has the guest write what it has in memory, before it is ended; how that went, in words."""
    agent = agent_of(vm)
    if vm.run is not Runstate.RUNNING:
        return ""
    if agent is None:
        return "its guest has no agent, so what it had in memory alone was not flushed"
    try:
        async with asyncio.timeout(FLUSH_S):
            await agent.freeze(FLUSH_S)
    except (SempervirtError, TimeoutError) as error:
        said = error.message if isinstance(error, SempervirtError) else "no answer"
        return f"its guest may not have flushed what it had in memory alone: {said}"
    return "its guest had flushed its file systems"
