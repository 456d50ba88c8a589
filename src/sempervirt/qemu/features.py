"""What the installed QEMU can do, by asking it: one short run over QMP, never its version.

The answer is kept in the state directory until the binary changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sempervirt.core.errors import CommandFailed, OutcomeUnknown, StateConflict, Unavailable
from sempervirt.host import process
from sempervirt.host.records import RecordDamaged, read_record, write_record
from sempervirt.host.storage_call import call_storage
from sempervirt.qemu.command_line import MAPPING, SANDBOX, Features
from sempervirt.qemu.qmp import Monitor

log = logging.getLogger(__name__)

DEADLINE_S = 20.0
RETRY_S = 0.02
CACHE_VERSION = 3
KEEP_S = 2.0
_FEATURES = TypeAdapter(Features)

QUESTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "version": ("query-version", {}),
    "machines": ("query-machines", {}),
    "devices": ("qom-list-types", {"implements": "device", "abstract": False}),
    "disk": ("device-list-properties", {"typename": "vhost-user-blk-pci"}),
    "blk": ("device-list-properties", {"typename": "virtio-blk-pci"}),
    "scsi": ("device-list-properties", {"typename": "virtio-scsi-pci"}),
    "schema": ("query-qmp-schema", {}),
}


def find_qemu(name: str = "qemu-system-x86_64") -> str:
    """The path of the QEMU binary. Raises Unavailable when QEMU is not installed."""
    path = shutil.which(name)
    if path is None:
        raise Unavailable(
            f"{name} is not installed", remedy="install QEMU (Debian: qemu-system-x86)"
        )
    return path


async def probe(qemu: str, cache_directory: Path) -> Features:
    """The features of the binary `qemu`, from the cache if the file is the same as then.

    Raises Unavailable when the program cannot be asked.
    """
    stamp = _stamp(Path(qemu))
    cache = cache_directory / f"qemu-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.json"
    try:
        content = read_record(cache, CACHE_VERSION)
        if content is not None and content.get("stamp") == stamp:
            features = _FEATURES.validate_python(content["features"])
            if features.version and content["features"].keys() == asdict(features).keys():
                return features
    except (RecordDamaged, KeyError, ValidationError):
        pass  # what an earlier release or a crash left is asked for again
    features = await _ask(qemu)
    with contextlib.suppress(Unavailable):  # QEMU is asked again
        await call_storage(cache, partial(_keep, cache, stamp, features), KEEP_S)
    return features


def judge(answers: Mapping[str, Any]) -> Features:
    """Features from QEMU's answers to `QUESTIONS`, by key."""
    schema = answers.get("schema", [])
    version = answers.get("version", {}).get("qemu", {})
    return Features(
        version=".".join(str(version.get(part, "?")) for part in ("major", "minor", "micro")),
        machines=frozenset(
            name
            for machine in answers.get("machines", [])
            for name in (machine["name"], machine.get("alias"))
            if name
        ),
        devices=frozenset(item["name"] for item in answers.get("devices", [])),
        disk_properties=frozenset(item["name"] for item in answers.get("disk", [])),
        mapped_devices=frozenset(
            device
            for device, key in (("virtio-blk", "blk"), ("virtio-scsi", "scsi"))
            if MAPPING in {item["name"] for item in answers.get(key, [])}
        ),
        aio=frozenset(_enumeration_with(schema, "threads", "native")),
        chardev_options=frozenset(_members_beside(schema, "logappend")),
        netdevs=frozenset(_netdev_types(schema)),
        sandbox=bool(answers.get("sandbox")),
    )


async def _ask(qemu: str) -> Features:
    argv = [qemu, "-machine", "none", "-nodefaults", "-display", "none"]
    try:
        answers = await _interview([*argv, "-sandbox", SANDBOX])
        return judge({**answers, "sandbox": True})
    except CommandFailed:
        return judge(await _interview(argv))


async def _interview(argv: list[str]) -> dict[str, Any]:
    """Runs QEMU, asks all questions, and ends QEMU. A question that QEMU refuses has no answer."""
    answers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="semper-") as directory:
        path = Path(directory) / "qmp.sock"
        monitored = [*argv, "-qmp", f"unix:{path},server=on,wait=off"]
        running = asyncio.create_task(process.run(monitored, timeout_s=DEADLINE_S))
        monitor = await _connect(path, running)
        try:
            for key, (command, arguments) in QUESTIONS.items():
                with contextlib.suppress(StateConflict):
                    answers[key] = await monitor.execute(command, arguments, timeout_s=DEADLINE_S)
            with contextlib.suppress(OutcomeUnknown):  # it may be gone before it has answered
                await monitor.execute("quit", timeout_s=DEADLINE_S)
        finally:
            await monitor.close()
            await running
    return answers


async def _connect(path: Path, running: asyncio.Task[process.Completed]) -> Monitor:
    while True:
        try:
            return await Monitor.connect(path, "features", DEADLINE_S)
        except Unavailable:  # not listening yet, or never
            await asyncio.wait((running,), timeout=RETRY_S)
            if running.done():
                running.result()
                raise


def _members_beside(schema: list[dict[str, Any]], name: str) -> set[str]:
    """Members of every object that has one called `name`; the schema hides objects' names."""
    found: set[str] = set()
    for entity in schema:
        members = {member["name"] for member in entity.get("members", []) if "name" in member}
        if name in members:
            found |= members
    return found


def _enumeration_with(schema: list[dict[str, Any]], *values: str) -> set[str]:
    """The values of the enumeration that has all of `values`."""
    for entity in schema:
        if entity.get("meta-type") == "enum" and {*values} <= {*entity.get("values", [])}:
            return set(entity["values"])
    return set()


def _netdev_types(schema: list[dict[str, Any]]) -> set[str]:
    """The network back ends: the variants of the object that has "hubport" among them."""
    for entity in schema:
        cases = {variant["case"] for variant in entity.get("variants", [])}
        if "hubport" in cases:
            return cases
    return set()


def _stamp(path: Path) -> str:
    try:
        status = path.resolve().stat()
    except OSError as error:
        raise Unavailable(f"{path} cannot be used: {error.strerror}") from error
    return f"{path.resolve()} {status.st_mtime_ns} {status.st_size}"


def _keep(cache: Path, stamp: str, features: Features) -> None:
    plain = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in asdict(features).items()}
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_record(cache, CACHE_VERSION, {"stamp": stamp, "features": plain})
    except OSError as error:  # no room, or a file system that is read-only: QEMU is asked again
        log.warning("cache path=%s not written: %s", cache, error.strerror)
