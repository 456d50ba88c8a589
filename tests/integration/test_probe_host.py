"""The probe's commands on a host, over a unix socket: what needs no guest."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sempervirt.guest import ProbeClient, ProbeRefused

PROBE = Path(sys.executable).parent / "semper-probe"
SPAN = 1 << 20
DEADLINE_S = 90.0


@asynccontextmanager
async def served() -> AsyncIterator[Path]:
    """A probe that serves on a socket."""
    folder = Path(tempfile.mkdtemp(prefix="semper", dir="/tmp"))
    process = await asyncio.create_subprocess_exec(PROBE, "serve", "--socket", folder / "probe")
    try:
        yield folder / "probe"
    finally:
        process.kill()
        await process.wait()
        shutil.rmtree(folder)


@pytest.fixture
async def client() -> AsyncIterator[ProbeClient]:
    async with served() as socket, await ProbeClient.connect(socket) as client:
        await client.wait_hello(deadline_s=DEADLINE_S)
        yield client


@pytest.fixture
def disk(tmp_path: Path) -> str:
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, SPAN)
    return str(path)


async def test_a_run_from_start_to_stop(client: ProbeClient, disk: str) -> None:
    started = await client.write_start(disk, seed=7, flush_every=10)
    assert not started.continued
    with pytest.raises(ProbeRefused, match="goes on") as caught:
        await client.write_start(disk)
    assert caught.value.kind == "unavailable"
    during = await client.wait_stats(lambda stats: stats.completions > 1000)
    assert (during.running, during.lanes_active) == (True, 16)
    stats = await client.write_stop()
    assert stats.is_clean
    assert not stats.running
    assert (await client.write_start(disk)).continued
    assert (await client.write_stop()).is_clean
    # Other geometry, other ledger; and what it does not know cannot be wrong.
    assert not (await client.write_start(disk, block_size=512)).continued
    await client.wait_stats(lambda stats: stats.completions > 1000)
    assert (await client.write_stop()).is_clean


async def test_figures_go_on_after_a_resumption(client: ProbeClient, disk: str) -> None:
    await client.write_start(disk)
    await client.wait_stats(lambda stats: stats.completions > 500)
    first = await client.write_stop(verify=False)
    assert first.verified_final is None
    await client.write_start(disk, resume=True)
    await client.wait_stats(lambda stats: stats.completions > first.completions + 500)
    stats = await client.write_stop()
    assert stats.is_clean
    assert sum((await client.timeline()).counts) == stats.completions
    with pytest.raises(ProbeRefused, match="arguments of the last run"):
        await client.write_start(disk, writers=3, resume=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "/absent"}, "cannot open /absent"),
        ({"device": "vdx9"}, "no block device"),
        ({"writers": 0}, "writers times depth"),
        ({"writers": 1000, "depth": 1000}, "writers times depth"),
        ({"block_size": 1000}, "not a multiple of 512"),
        ({"block_size": 0}, "not a multiple of 512"),
        ({"span_bytes": 2 * SPAN}, "does not fit"),
        ({"span_bytes": 4096}, "gives a lane no block"),
        ({"offset_bytes": 5}, "offset_bytes is no block"),
        ({"offset_bytes": SPAN}, "offset_bytes is no block"),
        ({"verify_ratio": 1.5}, "verify_ratio"),
        ({"hang_s": 0}, "hang_s"),
        ({"mode": "sideways"}, "unknown variant"),
        ({"wrtiers": 3}, "unknown field"),
        ({"resume": True}, "no run"),
    ],
)
async def test_wrong_arguments_are_refused(
    client: ProbeClient, disk: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ProbeRefused, match=message):
        await client.ask("write_start", {"device": disk, **arguments})
    await client.call("ping")


async def test_what_only_a_guest_does_is_refused(client: ProbeClient) -> None:
    commands: list[tuple[str, dict[str, Any]]] = [
        ("reboot", {}),
        ("poweroff", {}),
        ("rescan", {}),
        ("unbind", {"device": "vda"}),
        ("bind", {"device": "vda"}),
        ("exec", {"argv": ["true"]}),
        ("net_up", {"device": "lo", "address": "127.0.0.1/8"}),
    ]
    for command, arguments in commands:
        with pytest.raises(ProbeRefused, match="only in a guest") as caught:
            await client.ask(command, arguments)
        assert caught.value.kind == "unavailable"


async def test_nonsense_is_answered_and_ends_nothing() -> None:
    async with served() as socket:
        async with await ProbeClient.connect(socket) as client:
            await client.wait_hello(deadline_s=DEADLINE_S)
        reader, writer = await asyncio.open_unix_connection(socket)
        lines = [b"{", b"[]", b'{"id":7}', b'{"id":8,"cmd":"nope"}', b"\xff\xfe", b'{"cmd":"ping"}']
        writer.write(b"\n".join(lines) + b"\n")
        answers: list[tuple[int | None, str | None]] = []
        async with asyncio.timeout(DEADLINE_S):
            while len(answers) < len(lines):
                line = await reader.readline()
                message = json.loads(line) if line.strip() else {}
                if "id" in message:
                    answers.append((message["id"], message.get("error", {}).get("kind")))
        invalid = "invalid"
        assert answers == [
            (None, invalid), (None, invalid), (7, invalid), (8, invalid), (None, invalid),
            (None, None),
        ]  # fmt: skip
        writer.close()


async def test_the_next_host_is_greeted_and_gets_no_old_answers(disk: str) -> None:
    async with served() as socket:
        async with await ProbeClient.connect(socket) as first:
            nonce = (await first.wait_hello(deadline_s=DEADLINE_S)).nonce
            await first.write_start(disk)
        async with await ProbeClient.connect(socket) as second:
            assert (await second.wait_hello(deadline_s=DEADLINE_S)).nonce == nonce
            await second.wait_stats(lambda stats: stats.completions > 100)
            assert (await second.write_stop()).is_clean


async def test_the_command_line_writes_and_verifies(disk: str) -> None:
    async def run(*arguments: str) -> tuple[int | None, bytes, bytes]:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(PROBE, *arguments, stdout=pipe, stderr=pipe)
        output, error = await asyncio.wait_for(process.communicate(), 60)
        return process.returncode, output, error

    status, output, _ = await run("write", "--device", disk, "--seconds", "1", "--writers", "4")
    figures = json.loads(output)
    assert (status, figures["verified_final"]["wrong"]) == (0, 0)
    assert figures["writes"] > 0
    status, _, error = await run("write", "--device", "/absent")
    assert (status, error.startswith(b"semper-probe: error: ")) == (1, True)
    assert (await run("nonsense"))[0] == 2
    assert (await run("--version"))[1].startswith(b"semper-probe ")
