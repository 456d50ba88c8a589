"""The client of qemu-ga against guests that answer, lie, and say nothing."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sempervirt.core.errors import OutcomeUnknown, StateConflict, Unavailable
from sempervirt.qemu.guest_agent import RESEEDERS, SYNC_S, GuestAgent
from sempervirt.qemu.spec import ChannelSpec, VmSpec

Answerer = Callable[[str, dict[str, Any]], Any]
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def speaking(answer: Answerer, before: bytes = b"") -> Talk:
    """A guest that answers in the manner of qemu-ga; first it writes `before`."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(before)
        while line := await reader.readline():
            request = json.loads(line.removeprefix(b"\xff"))
            if request["execute"] == "guest-sync-delimited":
                writer.write(b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode())
                writer.write(b"\n")
                continue
            said = answer(request["execute"], request.get("arguments", {}))
            writer.write(said if isinstance(said, bytes) else json.dumps(said).encode() + b"\n")
            await writer.drain()

    return talk


@asynccontextmanager
async def guest(path: Path, talk: Talk) -> AsyncIterator[GuestAgent]:
    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(guarded, path)
    try:
        yield GuestAgent(path, "vm1", os.getpid())
    finally:
        server.close()


async def test_answers_that_were_meant_for_others_are_left_behind(tmp_path: Path) -> None:
    stale = b'{"return": 77}\nhalf a li\xff{"return": 5}\n\xff{"return": [[[\n{"return": {}}\n'
    async with guest(tmp_path / "a", speaking(lambda *_: {"return": 2}, stale)) as agent:
        assert await agent.freeze(90) == 2


async def test_a_refusal_is_one(tmp_path: Path) -> None:
    refused = {"error": {"class": "GenericError", "desc": "disabled by the administrator"}}
    async with guest(tmp_path / "a", speaking(lambda *_: refused)) as agent:
        with pytest.raises(StateConflict, match="disabled by the administrator"):
            await agent.freeze(1)


async def test_nobody_at_the_other_end(tmp_path: Path) -> None:
    agent = GuestAgent(tmp_path / "none", "vm1")
    with pytest.raises(Unavailable, match="cannot be reached"):
        await agent.ping()


async def test_a_guest_without_an_agent_was_asked_nothing(tmp_path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async with guest(tmp_path / "a", silent) as agent:
        begun = time.monotonic()
        with pytest.raises(Unavailable, match="no guest agent answers in vm1"):
            await agent.freeze(0.2)
        assert time.monotonic() - begun < SYNC_S


async def test_a_command_without_an_answer_is_unknown(tmp_path: Path) -> None:
    async with guest(tmp_path / "a", speaking(lambda *_: b"")) as agent:
        with pytest.raises(OutcomeUnknown, match="did not answer guest-fsfreeze-freeze"):
            await agent.freeze(1.0)


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"[]\n",
        b"{}\n",
        b"null\n",
        b'{"return": "two"}\n',
        b'{"return": true}\n',
        b'{"error": "no"}\n',
        b"[" * 100_000 + b"\n",
        b"x" * (2 << 20) + b"\n",
        b"\xff\xfe\n",
    ],
    ids=range(10),
)
async def test_an_answer_without_a_meaning_is_unknown(tmp_path: Path, line: bytes) -> None:
    async with guest(tmp_path / "a", speaking(lambda *_: line)) as agent:
        with pytest.raises(OutcomeUnknown):
            await agent.freeze(2)


async def test_a_guest_that_never_ends_writing_is_left(tmp_path: Path) -> None:
    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b'{"return": 1}\n' * 1000)
            await writer.drain()

    async with guest(tmp_path / "a", endless) as agent:
        with pytest.raises(Unavailable, match=r"without end|no guest agent answers"):
            await agent.ping(5)


async def test_another_process_at_the_socket_is_not_asked(tmp_path: Path) -> None:
    async with guest(tmp_path / "a", speaking(lambda *_: {"return": {}})) as agent:
        with pytest.raises(OutcomeUnknown, match="and not pid 1"):
            await GuestAgent(agent.path, "vm1", pid=1).ping()


async def test_a_thaw_is_tried_again(tmp_path: Path) -> None:
    answers = iter([b"nonsense\n", {"return": 2}])
    async with guest(tmp_path / "a", speaking(lambda *_: next(answers))) as agent:
        await agent.thaw()


async def test_a_thaw_that_nobody_confirms_says_how_to_thaw(tmp_path: Path) -> None:
    async with guest(tmp_path / "a", speaking(lambda *_: b"nonsense\n")) as agent:
        with pytest.raises(OutcomeUnknown, match="may still be frozen") as raised:
            await agent.thaw(0.5)
    assert "fsfreeze -u" in raised.value.remedy


@pytest.mark.parametrize(("clock_off_s", "fails"), [(0, False), (3600, True)])
async def test_the_clock_counts_and_not_what_the_agent_says(
    tmp_path: Path, clock_off_s: int, fails: bool
) -> None:
    def answer(command: str, arguments: dict[str, Any]) -> Any:
        if command == "guest-set-time":
            assert abs(arguments["time"] / 1e9 - time.time()) < 5
            return {"error": {"class": "GenericError", "desc": "hwclock failed"}}
        return {"return": int((time.time() - clock_off_s) * 1e9)}

    async with guest(tmp_path / "a", speaking(answer)) as agent:
        if fails:
            with pytest.raises(StateConflict, match="hwclock failed"):
                await agent.set_time()
        else:
            assert abs(await agent.set_time()) < 2


def test_the_channel_of_the_agent_has_a_socket_of_its_own_name() -> None:
    spec = VmSpec(name="a", channels=(ChannelSpec(name="org.qemu.guest_agent.0"),))
    assert spec.guest_agent is not None
    assert spec.guest_agent.socket_name == "agent"
    assert VmSpec(name="a").guest_agent is None
    with pytest.raises(ValueError, match="taken by the VM itself"):
        ChannelSpec(name="org.example.agent")


async def test_a_guest_is_given_random_bytes_and_asked_for_a_file(tmp_path: Path) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def answer(command: str, arguments: dict[str, Any]) -> Any:
        asked.append((command, arguments))
        if arguments.get("path") == "/none":
            return {"error": {"class": "GenericError", "desc": "No such file or directory"}}
        return {"return": 1000 if command == "guest-file-open" else {}}

    async with guest(tmp_path / "a", speaking(answer)) as agent:
        assert await agent.exists("/there")
        assert not await agent.exists("/none")
        asked.clear()
        await agent.give_random_bytes(b"seed")
    assert asked == [
        ("guest-file-open", {"path": "/dev/urandom", "mode": "w"}),
        ("guest-file-write", {"handle": 1000, "buf-b64": "c2VlZA=="}),
        ("guest-file-close", {"handle": 1000}),
    ]


@pytest.mark.parametrize(
    ("perl", "python", "reseeded"),
    [(0, 0, True), (4, 0, True), (None, 0, True), (None, None, False), (3, 1, False)],
)
async def test_a_guest_draws_a_new_seed_by_a_program_that_it_has(
    tmp_path: Path, perl: int | None, python: int | None, *, reseeded: bool
) -> None:
    """None: it has no such program, or its agent starts none."""
    given: list[bytes] = []
    polls = 0

    def answer(command: str, arguments: dict[str, Any]) -> Any:
        nonlocal polls
        statuses = {"perl": perl, "python3": python}
        if command == "guest-exec":
            if statuses[arguments["path"]] is None:
                return {"error": {"class": "GenericError", "desc": "No such file or directory"}}
            given.append(base64.b64decode(arguments["input-data"]))
            return {"return": {"pid": [*statuses].index(arguments["path"])}}
        assert command == "guest-exec-status"
        polls += 1
        if polls % 2:
            return {"return": {"exited": False}}
        return {"return": {"exited": True, "exitcode": [perl, python][arguments["pid"]]}}

    async with guest(tmp_path / "a", speaking(answer)) as agent:
        assert await agent.reseed(b"seed") is reseeded
    assert set(given) <= {b"seed"}


async def test_a_program_that_never_ends_is_not_waited_for(tmp_path: Path) -> None:
    def answer(command: str, _arguments: dict[str, Any]) -> Any:
        return {"return": {"pid": 7} if command == "guest-exec" else {"exited": False}}

    async with guest(tmp_path / "a", speaking(answer)) as agent:
        with pytest.raises((OutcomeUnknown, Unavailable)):
            await agent.reseed(b"seed", timeout_s=0.3)
    async with guest(tmp_path / "b", speaking(lambda *_: {"return": "7"})) as agent:
        with pytest.raises(OutcomeUnknown, match="as nothing"):
            await agent.reseed(b"seed")


def test_what_guests_are_told_to_run_is_what_their_kernel_takes() -> None:
    """On this kernel, which refuses it to whoever is nobody there: but it knows both requests."""
    for program, arguments in RESEEDERS:
        found = shutil.which(program)
        assert found is not None, program
        tried = subprocess.run([found, *arguments], input=b"x" * 64, check=False, timeout=20)
        assert tried.returncode in (0, 1, 3), program  # not: no such request, or no such syntax


async def test_a_handle_that_is_none_is_unknown(tmp_path: Path) -> None:
    async with guest(tmp_path / "a", speaking(lambda *_: {"return": True})) as agent:
        with pytest.raises(OutcomeUnknown, match="gave no handle"):
            await agent.exists("/there")


@pytest.mark.parametrize("told", [1 << 1200, -(1 << 63) - 1, 1.5, True, "now", None])
async def test_a_time_that_no_clock_shows_is_unknown(tmp_path: Path, told: object) -> None:
    async with guest(tmp_path / "a", speaking(lambda _command, _arguments: {"return": told})) as a:
        with pytest.raises(OutcomeUnknown, match="what time it is"):
            await a.set_time()


async def test_what_a_guest_says_commands_no_terminal_and_can_be_put_on_record(
    tmp_path: Path,
) -> None:
    def answer(_command: str, _arguments: dict[str, Any]) -> Any:
        return {"error": {"class": "GenericError", "desc": "no \x1b[2J \ud800\r\nway"}}

    async with guest(tmp_path / "a", speaking(answer)) as agent:
        with pytest.raises(StateConflict) as refused:
            await agent.ping()
    assert refused.value.message.endswith("no \ufffd[2J \ufffd\ufffd\ufffdway")
    assert refused.value.message.encode()
