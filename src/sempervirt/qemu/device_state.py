"""The state of a QEMU's devices, saved to a file by one QEMU and loaded by another.

The guest's memory is not in the file: both processes map the same memory (`x-ignore-shared`). The
mode `cpr-reboot` tells QEMU that memory stays where it is, so nothing is logged as dirty and no
backend has to take part. A guest of 1 GiB gives some 400 KiB within milliseconds.

`execute` is how a monitor command is carried out: as `qmp.Monitor.execute` with a deadline, and
raises what that raises.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from sempervirt.core.errors import InvalidRequest, OutcomeUnknown, StateConflict, Unavailable

Execute = Callable[..., Awaitable[Any]]
POLL_S = 0.001
DEADLINE_S = 20.0


async def save(execute: Execute, path: Path) -> None:
    """Writes the state of a paused QEMU's devices to `path`.

    Raises InvalidRequest when this QEMU is too old, Unavailable when it fails, OutcomeUnknown when
    it does not end by the deadline.
    """
    await _prepare(execute)
    await execute("migrate", {"uri": f"file:{path}"})
    await _wait(execute, f"QEMU did not write its state to {path.name}")


async def prepare(execute: Execute) -> None:
    """Has a QEMU that was started for a state be ready to load it. Raises InvalidRequest when this
    QEMU is too old.
    """
    await _prepare(execute)


async def load(execute: Execute, path: Path, *, prepared: bool = False) -> None:
    """Loads the state at `path` into a QEMU that was started for it, `prepared` or not. Raises as
    `save`.
    """
    if not prepared:
        await _prepare(execute)
    await execute("migrate-incoming", {"uri": f"file:{path}"})
    await _wait(execute, "the new QEMU cannot load this state")


async def reset(execute: Execute) -> None:
    """Undoes the settings of `save` and `load`, for an ordinary migration later on."""
    await execute("migrate-set-capabilities", _capabilities(on=False))
    await execute("migrate-set-parameters", {"mode": "normal"})


async def machine_type(execute: Execute) -> str:
    """The machine type by its versioned name: "pc-q35-10.0" for "q35"."""
    name = str(await execute("qom-get", {"path": "/machine", "property": "type"}))
    return name.removesuffix("-machine")


def _capabilities(*, on: bool) -> dict[str, Any]:
    return {"capabilities": [{"capability": "x-ignore-shared", "state": on}]}


async def _prepare(execute: Execute) -> None:
    try:
        await execute("migrate-set-capabilities", _capabilities(on=True))
        await execute("migrate-set-parameters", {"mode": "cpr-reboot"})
    except StateConflict as error:
        raise InvalidRequest(
            f"this QEMU cannot write its state without the memory: {error.message}",
            remedy="it takes QEMU 8.2 or newer",
        ) from error


async def _wait(execute: Execute, failure: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        told = await execute("query-migrate")
        status = told.get("status", "none")
        if status == "completed":
            return
        if status in ("failed", "cancelled"):
            raise Unavailable(f"{failure}: {told.get('error-desc', status)}")
        if time.monotonic() > deadline:
            raise OutcomeUnknown(f"{failure} within {DEADLINE_S:g} s; it is {status}")
        await asyncio.sleep(POLL_S)
