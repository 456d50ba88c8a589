"""Requests that nobody should send, to the API of a real agent: from its schema, and raw bytes.

    python -m tests.fuzz_api --requests 100000 --seed 7
    python -m tests.fuzz_api --seed 7 --only 4711        one request again, and its answer

Each request is a function of seed and number. Asked are the unix socket (root) and TLS (an admin,
an operator, a viewer, a host). What must hold of every answer:

    it comes within 100 ms    one that is late is asked for again when nothing else is, five
                              times, each time after a control (GET /v1/agent): slow is what is
                              100 ms later than that each time
    it is at most 16 MiB
    its status is not 500     and an error has a kind that `core.errors` knows
    the agent lives on        in at most 64 MiB more than it had after the first requests

The agent finds no QEMU, so that no VM runs: what is behind one is not reached. Why no Schemathesis:
a million requests are wanted, and it makes some hundred in a second; nothing has to be shrunk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lab.ports import free_address
from sempervirt.api.client import Client
from sempervirt.cluster import operators
from sempervirt.cluster.cluster import Cluster, begin_cluster
from sempervirt.core.errors import KINDS, AgentUnavailable
from sempervirt.core.roles import OPERATORS
from sempervirt.trust.operator import operator_context
from sempervirt.vm.config import AgentConfig

DOCUMENT = Path(__file__).parents[1] / "docs/reference/openapi.json"
LATE_S, LARGEST, GROWTH = 0.1, 16 << 20, 64 << 20
BATCH, CONNECTIONS, DEADLINE_S, START_S = 1000, 4, 20.0, 60.0
HOUR = timedelta(hours=1)
KNOWN = {kind.name for kind in KINDS}
ROOT = "root"
DOORS = (ROOT, ROOT, "admin", "admin", "operator", "viewer", "host", "host")
# A 500 that is named is a rollback that failed; nothing here gets so far.
NEVER = 500

WORDS = (
    *("", "none", "web", "a", "root", "b", "host", ".", "..", "../..", "%2e%2e%2f", "%00", "\0"),
    *("a" * 64, "a" * 5000, "ä", "\u202e", "\U0001f4a9", "\ud800", "-1", "0", "1e9", "null", "{}"),
    *("/", "//", "/dev/null", "/dev/zero", "/proc/self/mem", "/etc", "/nonexistent/x", "-rf", "\n"),
    *("0" * 32, "f" * 32, "127.0.0.1:1", "[::1]:0", "512M", "9" * 30 + "T", "-1K", "raw", "tcg"),
    *("a,b=c", "id=x,file=/etc/shadow", "$(id)", "`id`", "' OR 1=1 --", "\r\nX: y", "console"),
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    63,
    64,
    65,
    511,
    512,
    4096,
    1 << 31,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    1 << 64,
)
STRANGE = ("NaN", "Infinity", "-Infinity", "1e400", "-0.0", "1" * 4000, "0x1", "tru", '"\\ud800"')


@dataclass(frozen=True)
class Asked:
    """One request: by which door, and its bytes. `whole`: a server can see where it ends.
    `alone`: on a connection that has no other.
    """

    door: str
    content: bytes
    whole: bool = True
    what: str = "raw"
    alone: bool = True


@dataclass(frozen=True)
class Answered:
    """`status` 0: the connection was closed without a word."""

    status: int
    size: int
    elapsed_s: float
    body: bytes = b""
    ends: bool = True


# Requests


class Schema:
    """What the document says may be asked, and what is near that."""

    def __init__(self, document: Mapping[str, Any], place: Path) -> None:
        self._schemas = document["components"]["schemas"]
        self._operations = [
            (method.upper(), path, operation)
            for path, methods in sorted(document["paths"].items())
            for method, operation in sorted(methods.items())
        ]
        self._paths = (*(str(path) for path in sorted(place.iterdir())), str(place / "none"))

    def request(self, chance: random.Random, door: str) -> Asked:
        """One of an operation, right in many things."""
        method, path, operation = chance.choice(self._operations)
        query = []
        for parameter in operation.get("parameters", ()):
            value = self._value(parameter["schema"], chance, 0)
            text = value if isinstance(value, str) else json.dumps(value)
            text = quote(text.encode("utf-8", "surrogatepass"), safe="")
            if parameter["in"] == "path":
                path = path.replace("{" + parameter["name"] + "}", text or "-")
            elif chance.random() < 0.8:
                query.append(f"{parameter['name']}={text}")
        body = self._body(operation, chance)
        target = path + ("?" + "&".join(query) if query else "")
        what = f"{method} {path.partition('?')[0][:60]}"
        return Asked(door, http(method, target, body), what=what, alone=False)

    def _body(self, operation: Mapping[str, Any], chance: random.Random) -> bytes:
        content = operation.get("requestBody", {}).get("content", {})
        if not content and chance.random() < 0.95:
            return b""
        schema = content.get("application/json", {}).get("schema", {})
        text = json.dumps(self._value(schema, chance, 0))
        match chance.randrange(40):
            case 0:  # cut
                text = text[: chance.randrange(len(text) + 1)]
            case 1:  # a number that is none
                text = text.replace("0", chance.choice(STRANGE), 1)
            case 2:  # deep
                text = "[" * 100_000 if chance.random() < 0.5 else '{"a":' * 20_000
            case 3:  # large
                text = json.dumps({"name": "a" * chance.choice((1 << 16, 1 << 18, 1 << 20))})
            case 4:  # many
                text = json.dumps({"name": "a", "disks": [{}] * 20_000})
            case 5:
                return text.encode().replace(b"a", b"\xff\xfe", 2)
            case 6:
                return text.encode("utf-16")
            case 7:  # the same key twice
                text = text[:-1] + ',"name":1,"name":2}'
            case _:
                pass
        return text.encode()

    def _value(self, schema: Mapping[str, Any], chance: random.Random, depth: int) -> Any:
        if chance.random() < 0.04:
            return self._anything(chance, depth)
        if "$ref" in schema:
            return self._value(self._schemas[schema["$ref"].rpartition("/")[2]], chance, depth + 1)
        if "anyOf" in schema:
            return self._value(chance.choice(schema["anyOf"]), chance, depth)
        if "enum" in schema:
            return chance.choice(schema["enum"])
        if "const" in schema:
            return schema["const"]
        return self._plain(schema, chance, depth)

    def _plain(self, schema: Mapping[str, Any], chance: random.Random, depth: int) -> Any:
        match schema.get("type"):
            case "object":
                return self._object(schema, chance, depth)
            case "array" if "prefixItems" in schema:
                return [self._value(item, chance, depth + 1) for item in schema["prefixItems"]]
            case "array":
                count = chance.choice((0, 1, 1, 2, 3, 70 if depth < 2 else 1))
                return [self._value(schema["items"], chance, depth + 1) for _ in range(count)]
            case "integer" | "number":
                bounds = [schema[key] for key in ("minimum", "maximum") if key in schema]
                near = [bound + step for bound in bounds for step in (-1, 0, 1)]
                return chance.choice((*NUMBERS, *near, *near))
            case "boolean":
                return chance.random() < 0.5
            case "null":
                return None
            case "string" if schema.get("format") == "path":
                return chance.choice(self._paths)
            case "string":
                return chance.choice(WORDS[:6] if chance.random() < 0.5 else WORDS)
            case _:
                return self._anything(chance, depth)

    def _object(self, schema: Mapping[str, Any], chance: random.Random, depth: int) -> Any:
        required = schema.get("required", ())
        found = {
            name: self._value(inner, chance, depth + 1)
            for name, inner in schema.get("properties", {}).items()
            if chance.random() < (0.97 if name in required else 0.3)
        }
        more = schema.get("additionalProperties")
        if isinstance(more, Mapping):
            for _ in range(chance.randrange(4)):
                found[chance.choice(WORDS)] = self._value(more, chance, depth + 1)
        elif chance.random() < 0.03:
            found[chance.choice(WORDS)] = 1
        return found

    def _anything(self, chance: random.Random, depth: int) -> Any:
        kinds: list[Any] = [None, True, chance.choice(NUMBERS), -1.5, chance.choice(WORDS)]
        if depth < 4:
            kinds += [[self._anything(chance, depth + 1)], {"a": self._anything(chance, depth + 1)}]
        return chance.choice(kinds)


def http(method: str, target: str, body: bytes) -> bytes:
    """A request as it should be."""
    lines = [f"{method} {target} HTTP/1.1", "Host: agent", f"Content-Length: {len(body)}"]
    lines += ["Content-Type: application/json"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace") + body


def raw(chance: random.Random, door: str) -> Asked:
    """Bytes that are no request, or that two parsers could read in two ways."""
    good = http("GET", "/v1/vms", b"")
    chunked = b"POST /v1/vms HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
    whole: tuple[bytes, ...] = (
        b"GET /v1/vms HTTP/0.9\r\n\r\n",
        b"GET /v1/vms HTTP/9.9\r\nHost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET  /v1/vms  HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /v1/vms\r\n\r\n",
        b"\r\n\r\n\r\n",
        b"\0" * chance.choice((1, 100, 70_000)) + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /v1/vms HTTP/1.1\r\n" + b"A: b\r\n" * chance.choice((10, 1000, 20_000)) + b"\r\n",
        b"GET /v1/vms HTTP/1.1\r\nHost: a\r\nX: " + b"y" * chance.choice((9, 70_000)) + b"\r\n\r\n",
        b"GET /" + b"a/" * chance.choice((9, 40_000)) + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /v1/vms?" + b"a=b&" * chance.choice((9, 15_000)) + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /v1/vms HTTP/1.1\r\nHost a\r\n\r\n",
        b"GET /v1/vms HTTP/1.1\r\n Host: a\r\n\r\n",
        b"GET /v1/vms HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET http://elsewhere/v1/vms HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"TRACE /v1/vms HTTP/1.1\r\nHost: a\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /v1/vms HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"GET /v1/vms HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET /v1/vms HTTP/1.1\r\nHost: a\r\nContent-Length: 0x5\r\n\r\nabcde",
        b"POST /v1/vms HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"POST /v1/vms HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n{}",
        chunked + b"Content-Length: 2\r\n\r\n0\r\n\r\n",
        chunked + b"\r\nzz\r\n\r\n",
        chunked + b"\r\n-1\r\n{}\r\n0\r\n\r\n",
        chunked + b"\r\nffffffffffffffffffff\r\n{}\r\n0\r\n\r\n",
        chunked + b"\r\n2;" + b"x" * chance.choice((9, 70_000)) + b"\r\n{}\r\n0\r\n\r\n",
        chunked + b"\r\n" + b"1\r\n{\r\n" * chance.choice((3, 30_000)) + b"0\r\n\r\n",
        good * chance.choice((2, 50)),
    )
    match chance.randrange(4):
        case 0 if door == ROOT:  # cut; over TLS nobody sees that there is nothing more to come
            return Asked(door, good[: chance.randrange(1, len(good))], whole=False)
        case 1 if door == ROOT:
            return Asked(door, chance.randbytes(chance.choice((1, 100, 5000))), whole=False)
        case 2 if door == ROOT:
            changed = bytearray(good)
            for _ in range(chance.randrange(1, 6)):
                changed[chance.randrange(len(changed))] = chance.randrange(256)
            return Asked(door, bytes(changed), whole=False)
        case _:
            return Asked(door, chance.choice(whole), whole=door != ROOT)


# The agent


@dataclass
class Site:
    """An agent, and the ways to it."""

    process: subprocess.Popen[bytes]
    config: AgentConfig
    address: str
    contexts: Mapping[str, ssl.SSLContext]
    log: Path

    async def connect(self, door: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A new connection."""
        limit = LARGEST * 2
        if door == ROOT:
            return await asyncio.open_unix_connection(self.config.socket, limit=limit)
        host, _, port = self.address.rpartition(":")
        tls = self.contexts[door]
        return await asyncio.open_connection(
            host, int(port), ssl=tls, server_hostname="a", limit=limit
        )

    def memory(self) -> dict[str, int]:
        """Bytes that the agent has, and has had at most."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        found = {line.partition(":")[0]: line.split()[1] for line in lines if line[:2] == "Vm"}
        return {"now": int(found["VmRSS"]) << 10, "most": int(found["VmHWM"]) << 10}


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    """A real agent of a cluster of its own, with one who has each role."""
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as name:
        place = Path(name)
        config, files = AgentConfig(place / "s", place / "r"), place / "files"
        config.state_dir.mkdir(parents=True)
        files.mkdir()
        for path, content in (("empty", b""), ("zeros", bytes(1 << 20)), ("text", b"[vm]\n" * 99)):
            (files / path).write_bytes(content)
        (files / "directory").mkdir()
        os.mkfifo(files / "pipe")
        (files / "loop").symlink_to("loop")
        (files / "shadow").symlink_to("/etc/shadow")
        address = free_address()
        await begin_cluster(config, "fuzz", "a", address, [])
        contexts = {}
        async with Cluster.opened(config) as cluster:
            contexts["host"] = cluster.identity.client_context()
            for role in OPERATORS:
                made = await operators.add_operator(cluster, role.value, role, HOUR)
                key = place / f"{role.value}.pem"
                key.touch(0o600)
                key.write_text(made.text())
                contexts[role.value] = operator_context(key)
        program = str(Path(sys.executable).with_name("semperd"))
        argv = [program, f"--state-dir={config.state_dir}", f"--run-dir={config.run_dir}"]
        argv += [f"--image-root={files}", f"--saved-root={files}"]
        log = place / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: ASYNC220
                argv, stderr=output, env={**os.environ, "PATH": "/nonexistent"}, process_group=0
            )
        try:
            found = Site(process, config, address, contexts, log)
            await _answers(found)
            yield found
        finally:
            process.kill()
            process.wait()


async def _answers(found: Site) -> None:
    async with asyncio.timeout(START_S):
        while True:
            try:
                async with Client.connect(found.config.socket) as client:
                    await client.agent()
                _, writer = await found.connect("host")
                writer.close()
            except (AgentUnavailable, OSError):
                await asyncio.sleep(0.05)  # poll interval
            else:
                return


# The campaign


@dataclass
class Report:
    """What was asked and answered."""

    seed: int
    requests: int = 0
    doors: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    late: int = 0
    slowest_s: float = 0.0
    largest: int = 0
    memory_after_first: int = 0
    memory_most: int = 0
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)

    def text(self) -> str:
        """JSON."""
        shown = {
            **vars(self),
            "doors": dict(self.doors),
            "statuses": dict(sorted(self.statuses.items())),
        }
        return json.dumps(shown, indent=1)


def request_of(schema: Schema, seed: int, number: int) -> Asked:
    """The request of that number."""
    chance = random.Random(f"{seed}/{number}")
    door = chance.choice(DOORS)
    return raw(chance, door) if chance.random() < 0.15 else schema.request(chance, door)


class Asking:
    """One who asks, one thing after the other: with a connection for each door that is kept for as
    long as the agent keeps it.
    """

    def __init__(self, found: Site) -> None:
        self._found = found
        self._kept: dict[str, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}

    async def answer_of(self, asked: Asked) -> Answered:
        """All that comes for one request. Raises TimeoutError."""
        async with asyncio.timeout(DEADLINE_S):
            kept = None if asked.alone else self._kept.pop(asked.door, None)
            if kept is not None:
                answered = await self._answer(asked, *kept)
                if answered.size:
                    return answered  # else it was closed before the request came
            return await self._answer(asked, *await self._found.connect(asked.door))

    async def _answer(
        self, asked: Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Answered:
        begun, keep = time.perf_counter(), False
        try:
            writer.write(asked.content)
            if not asked.whole:
                writer.write_eof()
            answered = await _read(reader, begun)
            keep = not (asked.alone or answered.ends)
        except ConnectionError:
            return Answered(0, 0, time.perf_counter() - begun)
        finally:
            if keep:
                self._kept[asked.door] = (reader, writer)
            else:
                writer.close()
        return answered

    def close(self) -> None:
        """Ends the connections."""
        for _, writer in self._kept.values():
            writer.close()


async def _read(reader: asyncio.StreamReader, begun: float) -> Answered:
    elapsed = partial(lambda: time.perf_counter() - begun)
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        return Answered(0, len(error.partial), elapsed(), error.partial)
    status, headers = int(head.split(b" ", 2)[1]), head.lower()
    length = headers.partition(b"content-length:")[2].partition(b"\r\n")[0]
    try:
        body = await reader.readexactly(int(length)) if length else await reader.read(LARGEST * 2)
    except asyncio.IncompleteReadError as error:  # an answer to HEAD has no body
        return Answered(status, len(head) + len(error.partial), elapsed(), error.partial)
    ends = not length or b"connection: close" in headers
    return Answered(status, len(head) + len(body), elapsed(), body, ends)


def wrong(asked: Asked, answered: Answered) -> str:
    """What must not be, of what can be seen in one answer; "": nothing."""
    if answered.size > LARGEST:
        return f"an answer of {answered.size} bytes"
    if answered.status >= NEVER and answered.status in {NEVER, 501, 502}:
        return f"status {answered.status}: {answered.body[:200]!r}"
    if answered.status >= 400 and asked.what != "raw":
        try:
            if json.loads(answered.body)["error"]["kind"] in KNOWN:
                return ""
        except (ValueError, KeyError, TypeError):
            # What is no operation has no error of ours; h11 has its own words.
            if answered.status in {400, 404, 405, 431}:
                return ""
        return f"an error of no kind: {answered.status} {answered.body[:200]!r}"
    return ""


async def campaign(seed: int, requests: int, within_s: float = math.inf) -> Report:
    """Asks that many requests, or as many as it can within that time, or until SIGTERM."""
    report, begun, told = Report(seed), time.monotonic(), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    async with site() as found:
        schema = Schema(json.loads(DOCUMENT.read_text()), found.config.state_dir.parent / "files")
        asking = [Asking(found) for _ in range(CONNECTIONS)]
        for first in range(0, requests, BATCH):
            if told.is_set() or time.monotonic() - begun > within_s:
                break
            numbers = iter(range(first, min(first + BATCH, requests)))
            late: list[int] = []
            work = [_ask_all(one, schema, numbers, report, late) for one in asking]
            await asyncio.gather(*work)
            for number in late:
                await _ask_again(asking[0], schema, number, report)
            if (code := found.process.poll()) is not None:
                report.findings.append(f"the agent has ended with {code}, in {first}+{BATCH}")
                break
            memory = found.memory()
            report.memory_after_first = report.memory_after_first or memory["now"]
            report.memory_most = memory["most"]
            if memory["now"] > report.memory_after_first + GROWTH:
                report.findings.append(
                    f"the agent has {memory['now'] >> 20} MiB, in {first}+{BATCH}"
                )
                break
        for one in asking:
            one.close()
        if "Traceback" in (said := found.log.read_text(errors="replace")):
            report.findings.append("in the log: " + said[said.index("Traceback") :][-2000:])
    report.seconds = round(time.monotonic() - begun, 1)
    return report


async def _ask_all(
    asking: Asking, schema: Schema, numbers: Iterator[int], report: Report, late: list[int]
) -> None:
    for number in numbers:
        asked = request_of(schema, report.seed, number)
        report.requests += 1
        report.doors[asked.door] += 1
        try:
            answered = await asking.answer_of(asked)
        except TimeoutError:
            late.append(number)
            continue
        except (OSError, asyncio.IncompleteReadError) as error:
            report.findings.append(f"{number} {asked.door} {asked.what}: no answer: {error!r}")
            continue
        report.statuses[answered.status] += 1
        report.largest = max(report.largest, answered.size)
        if answered.elapsed_s > LATE_S:
            late.append(number)
        if said := wrong(asked, answered):
            report.findings.append(f"{number} {asked.door} {asked.what}: {said}")


async def _ask_again(asking: Asking, schema: Schema, number: int, report: Report) -> None:
    """One that was late, when nothing else is asked: a busy host is no finding."""
    report.late += 1
    asked, least = request_of(schema, report.seed, number), DEADLINE_S
    control = Asked(ROOT, http("GET", "/v1/agent", b""), alone=False)
    tried = silent = 0
    while tried < 5 and silent < 10 and least > LATE_S:
        try:
            beside_s = (await asking.answer_of(control)).elapsed_s
        except TimeoutError:
            silent += 1  # this host has no time for anything, or the agent hangs
            continue
        tried += 1
        with suppress(TimeoutError):
            least = min(least, (await asking.answer_of(asked)).elapsed_s - beside_s)
    report.slowest_s = max(report.slowest_s, least)
    if least > LATE_S:
        report.findings.append(f"{number} {asked.door} {asked.what}: takes {least:.3f} s")


async def once(seed: int, number: int) -> None:
    """Shows one request and its answer."""
    async with site() as found:
        schema = Schema(json.loads(DOCUMENT.read_text()), found.config.state_dir.parent / "files")
        asked = request_of(schema, seed, number)
        say(asked.door, asked.content[:2000])
        say(await Asking(found).answer_of(asked))
        say(found.log.read_text()[-4000:])


def say(*what: object) -> None:
    """To the standard output."""
    sys.stdout.write(" ".join(str(one) for one in what) + "\n")


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="ends then at the latest")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one request, with its answer")
    options = parser.parse_args()
    if options.only is not None:
        asyncio.run(once(options.seed, options.only))
        return 0
    asked = campaign(options.seed, options.requests, options.minutes * 60)
    report = asyncio.run(asked)
    say(report.text())
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
