"""The door for subprocesses: commands, long-lived processes, adoption, logs."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sempervirt.core.errors import CommandFailed
from sempervirt.host import process
from sempervirt.host.process import Exit
from sempervirt.host.procfs import find_by_argument, identify, start_ticks

DEADLINE_S = 90.0


async def test_a_command_and_its_output() -> None:
    done = await process.run(["sh", "-c", "echo out; echo err >&2"], timeout_s=DEADLINE_S)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "out", "err")
    accepted = await process.run(["sh", "-c", "exit 3"], timeout_s=DEADLINE_S, accept=(0, 3))
    assert accepted.exit_code == 3


async def test_a_failure_carries_command_exit_code_and_last_lines() -> None:
    with pytest.raises(CommandFailed) as caught:
        await process.run(["sh", "-c", "seq 100; exit 7"], timeout_s=DEADLINE_S)
    assert caught.value.command == "sh -c 'seq 100; exit 7'"
    assert caught.value.exit_code == 7
    assert caught.value.tail[-1] == "100"
    assert len(caught.value.tail) == process.TAIL_LINES


async def test_the_deadline_ends_a_command() -> None:
    with pytest.raises(CommandFailed, match="did not end by its deadline"):
        await process.run(["sleep", f"1000.{os.getpid()}"], timeout_s=0.1)
    assert find_by_argument(re.compile(rf"1000\.{os.getpid()}")) == []


async def test_a_hopeless_line_ends_a_command_at_once() -> None:
    with pytest.raises(CommandFailed, match="all is lost"):
        await process.run(
            ["sh", "-c", "echo all is lost >&2; exec sleep 1000"],
            timeout_s=DEADLINE_S,
            hopeless="is lost",
        )


@pytest.mark.parametrize(
    "error", [RuntimeError("can't start new thread"), BlockingIOError(11, "try again")]
)
async def test_a_host_that_refuses_to_fork_or_to_make_a_thread_ends_no_agent(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse)
    with pytest.raises(CommandFailed, match="cannot start true"):
        await process.run(["true"], timeout_s=DEADLINE_S)


async def test_what_a_service_manager_gives_the_agent_is_not_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("HANDED_ON", "yes")
    log = tmp_path / "log"
    child = process.spawn(
        ["env"], log=log, on_exit=lambda _: None, environment={"FURTHER": "as well"}
    )
    assert await child.wait() == Exit(code=0)
    said = log.read_text().splitlines()
    assert "HANDED_ON=yes" in said
    assert "FURTHER=as well" in said
    assert not [line for line in said if line.startswith(("NOTIFY_SOCKET=", "LISTEN_FDS="))]


async def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="cannot start /nonexistent"):
        await process.run(["/nonexistent"], timeout_s=1)
    with pytest.raises(CommandFailed, match="cannot start /nonexistent"):
        process.spawn(["/nonexistent"], log=tmp_path / "log", on_exit=lambda _end: None)
    with pytest.raises(CommandFailed, match=r"its log .* cannot be opened"):
        process.spawn(["true"], log=tmp_path / "no" / "log", on_exit=lambda _end: None)


@pytest.mark.parametrize(
    ("script", "end", "words"),
    [
        ("exit 0", Exit(code=0), "exit code 0"),
        ("exit 4", Exit(code=4), "exit code 4"),
        ("kill -KILL $$", Exit(signal=signal.SIGKILL), "killed by SIGKILL"),
    ],
)
async def test_the_end_of_a_long_lived_process(
    tmp_path: Path, script: str, end: Exit, words: str
) -> None:
    ends: list[Exit] = []
    log = tmp_path / "log"
    started = process.spawn(
        ["sh", "-c", f"echo $GREETING; {script}"],
        log=log,
        on_exit=ends.append,
        environment={"GREETING": "hello"},
    )
    async with asyncio.timeout(DEADLINE_S):
        assert await started.wait() == end
    assert ends == [end]
    assert str(end) == words
    assert process.said(log) == ["hello"]
    started.send_signal(signal.SIGTERM)  # too late, and harmless


async def test_what_an_earlier_process_said_is_not_quoted(tmp_path: Path) -> None:
    """The whole log, which people read, keeps the words: the control."""
    log = tmp_path / "log"
    for script in ("echo an old error", "echo; exit 1"):
        started = process.spawn(["sh", "-c", script], log=log, on_exit=lambda _end: None)
        async with asyncio.timeout(DEADLINE_S):
            await started.wait()
    assert process.said(log) == [""]
    assert "an old error" in process.tail_of(log)
    process.note_in_log(log, "goes on")
    with log.open("a") as later:
        later.write("later\n")
    assert process.said(log) == ["later"]


async def test_a_process_leads_its_own_session(tmp_path: Path) -> None:
    started = process.spawn(["sleep", "1000"], log=tmp_path / "log", on_exit=lambda _end: None)
    assert os.getsid(started.pid) == started.pid
    assert await started.end(0) == Exit(signal=signal.SIGKILL)


async def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "log"
    script = "trap '' TERM; echo ready; while :; do sleep 0.02; done"
    started = process.spawn(["sh", "-c", script], log=ready, on_exit=lambda _end: None)
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if process.said(ready) == ["ready"]:
                break
            await asyncio.sleep(0.01)  # poll interval
    assert await started.end(0.1) == Exit(signal=signal.SIGKILL)


async def test_a_foreign_process_is_adopted_and_its_end_is_seen() -> None:
    # Not our child: a shell starts it and ends.
    shell = subprocess.run(  # noqa: ASYNC221
        ["sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!"], capture_output=True, check=True
    )
    identity = identify(int(shell.stdout))
    assert identity is not None
    ends: list[Exit] = []
    adopted = process.adopt(identity, ends.append)
    assert adopted is not None
    async with asyncio.timeout(DEADLINE_S):
        assert await adopted.end(DEADLINE_S) == Exit()
    assert ends == [Exit()]
    assert str(Exit()) == "ended, exit code unknown"
    assert process.adopt(identity, ends.append) is None


async def test_a_reused_pid_is_not_mistaken() -> None:
    mine = identify(os.getpid())
    assert mine is not None
    assert mine.is_alive()
    for other in (replace(mine, start_ticks=1), replace(mine, boot_id="another boot")):
        assert not other.is_alive()
        assert process.adopt(other, lambda _end: None) is None


async def test_a_forgotten_process_runs_on(tmp_path: Path) -> None:
    ends: list[Exit] = []
    started = process.spawn(["sleep", "1000"], log=tmp_path / "log", on_exit=ends.append)
    started.forget()
    assert start_ticks(started.pid) is not None
    os.kill(started.pid, signal.SIGKILL)
    os.waitpid(started.pid, 0)  # noqa: ASYNC222
    assert ends == []


def test_processes_are_found_by_a_whole_argument() -> None:
    marker = f"marker-{os.getpid()}"
    argv = [sys.executable, "-c", "print('up', flush=True); input()", marker]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe) as one:
        try:
            assert one.stdout is not None
            assert one.stdout.readline() == b"up\n"  # before exec has ended there is no argument
            assert find_by_argument(re.compile(marker)) == [one.pid]
            assert find_by_argument(re.compile(marker[:-1])) == []
        finally:
            one.kill()


def test_logs_are_bounded(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("ab") as writer:
        process.bound_log(log, 100)
        writer.write(b"x" * 150 + b"end\n")
        writer.flush()
        process.bound_log(log, 100)
        assert log.stat().st_size == 0
        writer.write(b"next\n")  # O_APPEND: no hole where the old content was
    assert log.read_bytes() == b"next\n"
    assert (tmp_path / "log.1").read_bytes().endswith(b"xend\n")
    assert process.tail_of(tmp_path / "absent") == []
    process.bound_log(tmp_path / "absent", 1)


def test_a_log_is_bounded_where_there_is_no_room_for_a_copy(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 150)
    (tmp_path / "log.1").mkdir()  # nothing can take its place
    with pytest.raises(OSError, match="directory"):
        process.bound_log(log, 100)
    assert log.stat().st_size == 0
