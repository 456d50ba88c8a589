"""QEMU's own migration, as both ends of a move use it: settings, start, and what it tells.

The stream goes through a unix socket to semper-wired. The source stops before the switchover
(`pause-before-switchover`), so that the disks are given away and the store is asked while
nobody writes. Throttling is QEMU's auto-converge, held down to one percent until `throttle`
lets it go as far as was decided.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sempervirt.core.errors import StateConflict, Unavailable
from sempervirt.migration.source.convergence import Sample

Execute = Callable[..., Awaitable[Any]]
PAGE_BYTES = 4096
POLL_S = 0.005
# In bytes/s, until the wire has seen what the link carries (docs/design/wire.md).
UNKNOWN_BANDWIDTH = 10e6
MIN_THROTTLE = 1
# QEMU's states of a migration, by what they mean to the source.
STOPPED = ("pre-switchover", "device")
FINISHING = ("device", "postcopy-device", "postcopy-active", "postcopy-paused", "completed")
FAILED = ("failed", "cancelled")
BROKEN = "postcopy-paused"
CAPABILITIES = {
    "events": True,
    "return-path": True,
    "x-ignore-shared": False,
    "multifd": False,
    "xbzrle": False,
}


@dataclass(frozen=True)
class Told:
    """What query-migrate tells. Bytes; `total_bytes` is the guest's memory."""

    status: str
    error: str
    total_bytes: int
    sample: Sample | None


async def prepare_source(execute: Execute, *, postcopy: bool) -> None:
    """Settings of the QEMU that the VM leaves. Raises as `execute`."""
    capabilities = CAPABILITIES | {
        "pause-before-switchover": True,
        "auto-converge": True,
        "postcopy-ram": postcopy,
    }
    await _configure(
        execute,
        capabilities,
        {
            "max-bandwidth": 0,
            "cpu-throttle-initial": MIN_THROTTLE,
            "cpu-throttle-increment": MIN_THROTTLE,
            "max-cpu-throttle": MIN_THROTTLE,
        },
    )


async def prepare_destination(execute: Execute, stream: Path, *, postcopy: bool) -> None:
    """Has the QEMU that the VM goes to wait for the stream. Raises as `execute`."""
    await _configure(execute, CAPABILITIES | {"postcopy-ram": postcopy}, {})
    await execute("migrate-incoming", {"uri": f"unix:{stream}"})


async def take_up(execute: Execute, stream: Path) -> None:
    """Has the destination wait for a stream that broke in postcopy. Raises as `execute`."""
    await execute("migrate-recover", {"uri": f"unix:{stream}"})


async def go_on(execute: Execute, stream: Path) -> None:
    """Has the source go on with a stream that broke in postcopy. Raises as `execute`."""
    await execute("migrate", {"uri": f"unix:{stream}", "resume": True})


async def start(execute: Execute, stream: Path) -> None:
    """Begins to send. Raises as `execute`."""
    await execute("migrate", {"uri": f"unix:{stream}"})


async def reckon(execute: Execute, bandwidth: float) -> None:
    """What QEMU is to reckon with when it decides whether the rest fits into the blackout, in
    bytes/s. By itself it would take the rate at which references leave it.

    A QEMU before 8.2 does that.
    """
    with contextlib.suppress(StateConflict):
        parameters = {"avail-switchover-bandwidth": max(1, round(bandwidth))}
        await execute("migrate-set-parameters", parameters)


async def finish(execute: Execute) -> None:
    """Sends what is left of a guest that stands still."""
    await execute("migrate-continue", {"state": "pre-switchover"})


async def cancel(execute: Execute, timeout_s: float) -> None:
    """Ends it, whatever it does; returns when it is over. Raises Unavailable; as `execute`."""
    deadline = time.monotonic() + timeout_s
    while (told := await look(execute)).status not in ("none", "completed", *FAILED):
        if told.status != "cancelling":
            await execute("migrate_cancel")
        if time.monotonic() > deadline:
            raise Unavailable(f"QEMU does not end its migration ({told.status})")
        await asyncio.sleep(POLL_S)


async def limit_blackout(execute: Execute, blackout_s: float) -> None:
    """QEMU stops the guest when the rest can be sent in that time."""
    await execute("migrate-set-parameters", {"downtime-limit": milliseconds(blackout_s)})


async def throttle(execute: Execute, percent: int) -> None:
    """Takes up to that part of the time from the guest's processors."""
    parameters = {
        "max-cpu-throttle": percent,
        "cpu-throttle-initial": percent,
        "cpu-throttle-increment": percent,
    }
    await execute("migrate-set-parameters", parameters)


async def look(execute: Execute) -> Told:
    """Asks how far it is. Raises as `execute`."""
    return told(await execute("query-migrate"))


def told(answer: Mapping[str, Any]) -> Told:
    """The answer of query-migrate."""
    ram = answer.get("ram")
    sample = None
    if ram is not None:
        sample = Sample(
            elapsed_s=answer.get("total-time", 0) / 1e3,
            passes=int(ram.get("dirty-sync-count", 0)),
            remaining_bytes=int(ram.get("remaining", 0)),
            bandwidth=float(ram.get("mbps", 0.0)) * 1e6 / 8,
            dirtied=float(ram.get("dirty-pages-rate", 0)) * PAGE_BYTES,
        )
    return Told(
        status=str(answer.get("status", "none")),
        error=str(answer.get("error-desc", "")),
        total_bytes=int(ram["total"]) if ram is not None else 0,
        sample=sample,
    )


async def let_run(execute: Execute) -> None:
    """Lets a guest run that has arrived; returns when it does. In postcopy its devices may not be
    there yet: then QEMU lets it run by itself when they are.
    """
    await execute("cont")
    while not (await execute("query-status"))["running"]:  # noqa: ASYNC110 - QEMU's state, not ours
        await asyncio.sleep(POLL_S)
    await announce(execute)


async def announce(execute: Execute) -> None:
    """Tells the switches where the guest is. QEMU does so by itself when a guest is loaded, which
    is before it runs, and when it may not come to run at all.
    """
    await execute("announce-self", {"initial": 50, "max": 550, "rounds": 5, "step": 100})


def milliseconds(seconds: float) -> int:
    """For QEMU, which takes whole ones."""
    return max(1, round(seconds * 1e3))


async def _configure(
    execute: Execute, capabilities: Mapping[str, bool], parameters: Mapping[str, int]
) -> None:
    listed = [{"capability": name, "state": on} for name, on in capabilities.items()]
    await execute("migrate-set-parameters", {"mode": "normal", **parameters})
    await execute("migrate-set-capabilities", {"capabilities": listed})
