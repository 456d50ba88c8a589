"""What the installed QEMU can do, by asking it: one short run over QMP, never its version.

The answer is kept in the state directory until the binary changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sempervirt.core.errors import CommandFailed, Unavailable
from sempervirt.host import process
from sempervirt.host.records import RecordDamaged, read_record, write_record
from sempervirt.vm.command_line import SANDBOX, Features

DEADLINE_S = 20.0
CACHE_VERSION = 1
_BARE = ["-machine", "none", "-nodefaults", "-display", "none"]


def find_qemu(name: str = "qemu-system-x86_64") -> str:
    """The path of the QEMU binary. Raises Unavailable when it is not installed."""
    path = shutil.which(name)
    if path is None:
        raise Unavailable(
            f"{name} is not installed", remedy="install QEMU (Debian: qemu-system-x86)"
        )
    return path


async def probe(qemu: str, cache_directory: Path) -> Features:
    """The features of the binary `qemu`, from the cache if it has not changed.

    Raises Unavailable when it cannot be asked.
    """
    stamp = _stamp(Path(qemu))
    cache = cache_directory / f"qemu-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.json"
    try:
        content = read_record(cache, CACHE_VERSION)
        if content is not None and content.get("stamp") == stamp:
            return _from_cache(content["features"])
    except (RecordDamaged, KeyError, TypeError):
        pass  # what an earlier release or a crash left is asked for again
    features = await _ask(qemu)
    _keep(cache, stamp, features)
    return features


def parse_answers(lines: Iterable[str]) -> Features:
    """Features from QEMU's answers to `QUESTIONS`, one JSON object a line."""
    answers: dict[str, Any] = {}
    for line in lines:
        message = json.loads(line)
        if "id" in message and "return" in message:
            answers[message["id"]] = message["return"]
    schema = answers.get("schema", [])
    chardev = _members_beside(schema, "logappend")
    version = answers.get("version", {})
    number = version.get("qemu", {})
    return Features(
        version=".".join(str(number.get(part, "?")) for part in ("major", "minor", "micro")),
        machines=frozenset(
            name
            for machine in answers.get("machines", [])
            for name in (machine["name"], machine.get("alias"))
            if name
        ),
        devices=frozenset(item["name"] for item in answers.get("devices", [])),
        disk_properties=frozenset(item["name"] for item in answers.get("disk", [])),
        chardev_options=frozenset(chardev),
        netdevs=frozenset(_netdev_types(schema)),
        memfd="memfd" in answers,
    )


def questions() -> str:
    """What QEMU is asked, one QMP command a line."""
    listing = {"implements": "device", "abstract": False}
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("hello", "qmp_capabilities", {}),
        ("version", "query-version", {}),
        ("machines", "query-machines", {}),
        ("devices", "qom-list-types", listing),
        ("disk", "device-list-properties", {"typename": "vhost-user-blk-pci"}),
        ("memfd", "qom-list-properties", {"typename": "memory-backend-memfd"}),
        ("schema", "query-qmp-schema", {}),
        ("bye", "quit", {}),
    ]
    return "".join(
        json.dumps({"execute": command, "id": key, "arguments": arguments}) + "\n"
        for key, command, arguments in asked
    )


async def _ask(qemu: str) -> Features:
    argv = [qemu, *_BARE, "-qmp", "stdio"]
    try:
        done = await process.run(
            [*argv, "-sandbox", SANDBOX], timeout_s=DEADLINE_S, stdin=questions()
        )
        sandbox = True
    except CommandFailed:
        done = await process.run(argv, timeout_s=DEADLINE_S, stdin=questions())
        sandbox = False
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return dataclasses.replace(parse_answers(lines), sandbox=sandbox)


def _members_beside(schema: list[dict[str, Any]], name: str) -> set[str]:
    """Members of every object that has one called `name`; the schema hides objects' names."""
    found: set[str] = set()
    for entity in schema:
        members = {member["name"] for member in entity.get("members", []) if "name" in member}
        if name in members:
            found |= members
    return found


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
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_record(cache, CACHE_VERSION, {"stamp": stamp, "features": plain})


def _from_cache(content: dict[str, Any]) -> Features:
    values: dict[str, Any] = {
        key: frozenset(value) if isinstance(value, list) else value
        for key, value in content.items()
    }
    return Features(**values)
