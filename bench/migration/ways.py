"""The ways to move a guest that are compared. Each takes it from one host to the other.

Everything is the same but how memory travels: the same QEMU, the same limit to the downtime (QEMU's
300 ms), the same backends that hand the disks over, no limit on bandwidth but the link's own. Only
semper-wired encrypts.

A way that is *steered* is driven as the agent does it (sempervirt.migration.source.steering): the
limit begins at a quarter, and QEMU is told what the link carries. semper-wired tells that itself;
for QEMU alone it is what the link's interfaces have counted since the move began. The others have
QEMU's own judgement.
"""

import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from bench.migration.ends import QMP_S, End, ask, program
from bench.migration.waiting import MoveError, until
from sempervirt.migration import stream
from sempervirt.migration.source.convergence import ConvergencePolicy
from sempervirt.migration.source.steering import LOOK_S, Steering
from sempervirt.qemu.qmp import Monitor
from sempervirt.trust.authority import CERTIFICATE_FILE as AUTHORITY_FILE
from sempervirt.trust.authority import Authority, Issued
from sempervirt.trust.identity import CERTIFICATE_FILE, KEY_FILE, Identity, KeyRequest

MOVE_S = 240.0
WIRED_S = 60.0
CHANNELS = 2
_ports = itertools.count(41000)


@dataclass(frozen=True)
class Way:
    """One way. `wired`: QEMU speaks to semper-wired on its own host, and not to the other QEMU, and
    is `steered`.
    """

    name: str
    label: str
    capabilities: tuple[str, ...] = ()
    parameters: tuple[tuple[str, Any], ...] = ()
    wired: bool = False
    steered: bool = False

    async def move(self, here: End, there: End, source: Monitor, target: Monitor) -> dict[str, Any]:
        """Moves the guest; returns when QEMU says that it is done, with what was told of it."""
        steering = Steering(ConvergencePolicy())
        for monitor in (source, target):
            await self._prepare(monitor)
        to = f"tcp:{there.address}:{next(_ports)}"
        source_uri, target_uri = to, to
        if self.wired:
            source_uri, target_uri = (f"unix:{end.path('stream')}" for end in (here, there))
        await target.execute("migrate-incoming", {"uri": target_uri}, timeout_s=QMP_S)
        if self.wired:
            await lay_wire(here, there)
        if self.steered:
            await steering.begin(source.execute_within(QMP_S))
        for disk in here.hardware.disks:
            await ask(here.control(disk), "handover", armed=True)
        await source.execute("migrate", {"uri": source_uri}, timeout_s=QMP_S)
        carried = _told_by_wire(here) if self.wired else _counted_by_link(here)
        steers = asyncio.create_task(steer(steering, carried, source)) if self.steered else None
        try:
            told = await wait_completed(source, target)
        finally:
            if steers is not None:
                steers.cancel()
                await asyncio.gather(steers, return_exceptions=True)
        if self.wired:
            for end in (here, there):
                await end.ended("wired", WIRED_S)
            told["wired"] = outcome(here)
        return told

    async def _prepare(self, monitor: Monitor) -> None:
        wanted = [{"capability": name, "state": True} for name in self.capabilities]
        if wanted:
            given = {"capabilities": wanted}
            await monitor.execute("migrate-set-capabilities", given, timeout_s=QMP_S)
        parameters = {"max-bandwidth": 0, **dict(self.parameters)}
        await monitor.execute("migrate-set-parameters", parameters, timeout_s=QMP_S)


async def wait_completed(source: Monitor, target: Monitor) -> dict[str, Any]:
    """Wait until the migration is complete and the guest runs there. Raises MoveError."""
    info: dict[str, Any] = {}

    async def complete() -> bool:
        info.update(await source.execute("query-migrate", timeout_s=QMP_S))
        if info.get("status") in {"failed", "cancelled"}:
            raise MoveError(f"QEMU could not migrate: {info.get('error-desc', info)}")
        return info.get("status") == "completed"

    async def runs() -> bool:
        return await target.query_status(QMP_S) == "running"

    await until(complete, "the migration", MOVE_S)
    await until(runs, "the guest at its destination", MOVE_S)
    return {"qemu": info}


# What the link carries, in bytes per second; None before that is known.
Carried = Callable[[], Awaitable[int | None]]


def _told_by_wire(here: End) -> Carried:
    async def told() -> int | None:
        status = await ask(here.path("wired.control"), "status")
        seen = status["switchover_bandwidth"]
        return None if seen is None else int(seen)

    return told


def _counted_by_link(here: End) -> Carried:
    """As semper-wired, which says nothing for the first 100 ms."""
    began, before = time.monotonic(), here.network.sent()

    async def counted() -> int | None:
        passed_s = time.monotonic() - began
        return int((here.network.sent() - before) / passed_s) if passed_s > LOOK_S else None

    return counted


async def steer(steering: Steering, carried: Carried, source: Monitor) -> None:
    """What the agent does while a guest moves. Ends with the wire."""
    execute = source.execute_within(QMP_S)
    while True:
        told = await stream.look(execute)
        try:
            seen = await carried()
        except (OSError, ValueError):
            return
        if told.status == "active" and told.sample:
            await steering.steer(execute, told.sample, seen)
        await asyncio.sleep(LOOK_S)


def certify(*ends: End) -> None:
    """Makes the hosts a cluster: each has a certificate of the same authority."""
    authority = Authority.create(ends[0].directory, "bench")
    for end in ends:
        identity = Identity(end.directory)
        asked = KeyRequest.made(end.name)
        issued = authority.issue_host(asked.text, end.name, "127.0.0.1:1")
        identity.keep(asked, issued.pem, Issued(authority.certificate).pem)


async def lay_wire(here: End, there: End) -> None:
    """Both ends of semper-wired, joined over TLS, with the index of the disks made."""
    there.start("wired", _end("destination", there, here, f"--listen={there.address}:0"))
    address = await _told(there, "address")
    here.start("wired", _end("source", here, there, f"--connect={address}"))
    await _told(here, "state", "ready")


def _end(kind: str, end: End, peer: End, address: str) -> list[str]:
    disks = end.hardware.disks.items()
    return [
        program("semper-wired"),
        kind,
        "--migration=bench",
        f"--ca={end.path(AUTHORITY_FILE)}",
        f"--cert={end.path(CERTIFICATE_FILE)}",
        f"--key={end.path(KEY_FILE)}",
        f"--peer-name={peer.name}",
        f"--qemu-socket={end.path('stream')}",
        f"--control-socket={end.path('wired.control')}",
        address,
        *(f"--disk={name}={image},backend={end.control(name)}" for name, image in disks),
    ]


async def _told(end: End, key: str, value: object = None) -> Any:
    """Wait until an end of the wire tells something (that value, if one is given)."""
    found: list[Any] = []

    async def told() -> bool:
        try:
            status = await ask(end.path("wired.control"), "status")
        except OSError:  # not listening yet
            return False
        if status["error"]:
            raise MoveError(f"semper-wired on {end.name}: {status['error']}")
        found.append(status[key])
        return found[-1] is not None and value in {None, found[-1]}

    await until(told, f"{key} of semper-wired on {end.name}", WIRED_S)
    return found[-1]


def outcome(end: End) -> dict[str, Any]:
    """The last word of an end of the wire. Raises MoveError if there is none."""
    said = [
        line.partition("migration status=")[2]
        for line in end.path("wired.log").read_text().splitlines()
    ]
    for text in reversed(said):
        if text:
            return dict(json.loads(text))
    raise MoveError(f"semper-wired on {end.name} tells nothing: {end.said('wired')}")


def _multifd(name: str, label: str, level: int = 1, *, steered: bool = False) -> Way:
    """QEMU's own way to pack; 1 is the level that QEMU takes by itself."""
    parameters = (
        ("multifd-channels", CHANNELS),
        ("multifd-compression", "zstd"),
        ("multifd-zstd-level", level),
    )
    label = f"multifd, {CHANNELS} channels, zstd{label}"
    return Way(name, label, ("multifd",), parameters, steered=steered)


STOCK = Way("stock", "stock QEMU")
STOCK_STEERED = Way("stock-steered", "stock QEMU, steered", steered=True)
MULTIFD = _multifd("multifd-zstd", "")
MULTIFD_STEERED = _multifd("multifd-zstd-steered", ", steered", steered=True)
MULTIFD_3 = _multifd("multifd-zstd-3", " level 3, steered", 3, steered=True)
MULTIFD_6 = _multifd("multifd-zstd-6", " level 6, steered", 6, steered=True)
WIRED = Way("wired", "semper-wired", wired=True, steered=True)
_PEERS = (STOCK, STOCK_STEERED, MULTIFD, MULTIFD_STEERED, MULTIFD_3, MULTIFD_6)
WAYS = {way.name: way for way in (*_PEERS, WIRED)}
