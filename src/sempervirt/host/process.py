"""The one door through which subprocesses start, and how their end is seen.

A `Process` is watched through a pidfd, so one that this agent started and one that it adopted
from an earlier agent behave alike; only the exit code of an adopted process is unknown,
because the kernel tells it to the parent alone.

Long-lived processes (`spawn`) stand in a session of their own and write to a file, never to a
pipe: they outlive the agent. Short ones (`run`) end with their caller, by a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sempervirt.core.errors import CommandFailed
from sempervirt.host.privileges import TO_BECOME, UMASK, Identity, with_capabilities
from sempervirt.host.procfs import PROC, ProcessId, identify, start_ticks
from sempervirt.host.programs import why_not_started
from sempervirt.host.records import replace_bytes

TAIL_LINES = 20
_TAIL_BYTES = 16 << 10
_LINE_BYTES = 8 << 20
# Begins a line of a log after which another process wrote, or the same one after an interruption.
_FROM_HERE = "---- "
# Between a service manager and the agent (sd_notify(3), sd_listen_fds(3)): a disk's program would
# tell it that the agent is ready.
_AGENTS_OWN = frozenset(
    ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
)


@dataclass(frozen=True)
class Exit:
    """How a process ended: an exit code, or a signal, or neither when nobody could tell."""

    code: int | None = None
    signal: int | None = None

    def __str__(self) -> str:
        if self.signal is not None:
            try:
                return f"killed by {signal.Signals(self.signal).name}"
            except ValueError:
                return f"killed by signal {self.signal}"
        return "ended, exit code unknown" if self.code is None else f"exit code {self.code}"


@dataclass(frozen=True)
class Completed:
    """A command that ended with exit code 0 (or an accepted one)."""

    exit_code: int
    stdout: str
    stderr: str


class Process:
    """One watched process. `on_exit` is called once, in the event loop, when it ends."""

    def __init__(
        self,
        identity: ProcessId,
        on_exit: Callable[[Exit], None],
        child: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self.identity = identity
        self.exit: Exit | None = None
        self._on_exit = on_exit
        self._child = child
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        # Raises ProcessLookupError when it is already gone (an adopted one; a child stays).
        self._pidfd = os.pidfd_open(identity.pid)
        self._loop.add_reader(self._pidfd, self._ended_now)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.identity.pid

    @property
    def pidfd(self) -> int:
        """Its pidfd, open until the process ends."""
        return self._pidfd

    def send_signal(self, number: signal.Signals) -> None:
        """Sends a signal; nothing happens when the process has ended."""
        if self.exit is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> Exit:
        """Waits for the end."""
        await self._ended.wait()
        assert self.exit is not None
        return self.exit

    async def end(self, grace_s: float) -> Exit | None:
        """SIGTERM, then SIGKILL after `grace_s`; None if even that had no effect in 5 s.

        The last happens when the process is stuck in the kernel.
        """
        first = signal.SIGTERM if grace_s > 0 else signal.SIGKILL
        for number, patience_s in ((first, grace_s), (signal.SIGKILL, 5.0)):
            self.send_signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    return await self.wait()
        return None

    def forget(self) -> None:
        """Stops watching and leaves the process running."""
        if self.exit is None:
            self._stop_watching()
            if self._child is not None:
                self._child.returncode = 0  # keeps Popen from warning about a live child

    def _stop_watching(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)

    def _ended_now(self) -> None:
        self._stop_watching()
        self.exit = Exit() if self._child is None else _exit_of(self._child.wait())
        self._ended.set()
        self._on_exit(self.exit)


def _exit_of(returncode: int) -> Exit:
    return Exit(signal=-returncode) if returncode < 0 else Exit(code=returncode)


def _handed_on() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _AGENTS_OWN}


def spawn(
    argv: Sequence[str],
    *,
    log: Path,
    on_exit: Callable[[Exit], None],
    executable: str | None = None,
    pass_fds: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
    capabilities: Collection[str] | None = None,
    identity: Identity | None = None,
    stdin: int = subprocess.DEVNULL,
    nice: int = 0,
) -> Process:
    """Starts a process that outlives the agent; its output is appended to `log`, after a line that
    tells the output of this process from that of earlier ones (see `said`).

    `stdin` is a descriptor, or nothing. `executable` is the file to execute, if not argv[0];
    `capabilities` are those that the process has at most (see `host.privileges`), if not those of
    the agent; with an `identity` of its own it has none. With one of both it may be `nice` as well.
    Raises CommandFailed when the program cannot be started, or the log cannot be opened.
    """
    with contextlib.suppress(OSError):  # no room: then the process says nothing either
        note_in_log(log, f"{Path(argv[0]).name} started")
    try:
        opened = log.open("ab")
    except OSError as error:
        raise _log_not_opened(argv, log, error) from error
    try:
        with opened as output:

            def start() -> subprocess.Popen[bytes]:
                return subprocess.Popen(
                    argv if identity is None else identity.command(argv),
                    executable=executable,
                    stdin=stdin,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=pass_fds,
                    env={**_handed_on(), **(environment or {})},
                    start_new_session=True,
                    umask=UMASK if identity else -1,
                )

            if identity is not None:
                child = with_capabilities(TO_BECOME, start, identity.ground, nice)
            elif capabilities is not None:
                child = with_capabilities(capabilities, start, nice=nice)
            else:
                child = start()
    except OSError as error:
        raise _cannot_start(argv, error) from error
    except RuntimeError as error:  # no thread can be made, for a program with fewer privileges
        raise _cannot_start(argv, OSError(errno.EAGAIN, str(error))) from error
    # A child that has ended already is a zombie, and keeps its pid until it is waited for.
    started = identify(child.pid) or ProcessId(child.pid, 0, "")
    try:
        return Process(started, on_exit, child)
    except OSError as error:  # no file descriptor left to watch it by
        child.kill()
        child.wait()
        raise _cannot_start(argv, error) from error


def expose_to_oom(pid: int) -> None:
    """Lets the kernel end `pid` like any other process when memory is out: what we start would be
    spared as we are (OOMScoreAdjust=), and a guest is what fills the memory.
    """
    path = PROC / str(pid) / "oom_score_adj"
    with contextlib.suppress(OSError, ValueError):
        if int(path.read_text()) < 0:
            path.write_text("0")


def adopt(identity: ProcessId, on_exit: Callable[[Exit], None]) -> Process | None:
    """Watches a process that an earlier agent started; None when it no longer runs."""
    if not identity.is_alive():
        return None
    try:
        process = Process(identity, on_exit)
    except ProcessLookupError:
        return None
    if start_ticks(identity.pid) != identity.start_ticks:  # the pid was reused in between
        process.forget()
        return None
    return process


async def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    accept: Sequence[int] = (0,),
    hopeless: str | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Completed:
    """Runs a command to its end; `on_line` gets each line of stdout at once.

    Raises CommandFailed for an exit code that is not accepted, at the deadline, and as soon
    as a line of stderr contains `hopeless`. The command has ended when this returns.
    """
    command = shlex.join(argv)
    try:
        child = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
        )
    except OSError as error:
        raise _cannot_start(argv, error) from error
    except RuntimeError as error:  # asyncio makes a thread that waits for it, where it has to
        said = f"cannot start {argv[0]}, or wait for it: {error}"
        raise CommandFailed(command, 127, [said]) from error
    output: tuple[list[str], list[str]] = ([], [])
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(
                _read(child.stdout, output[0], None, on_line),
                _read(child.stderr, output[1], hopeless),
            )
            await child.wait()
    except (TimeoutError, _HopelessError) as error:
        raise CommandFailed(command, None, output[1][-TAIL_LINES:]) from error
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert child.returncode is not None
    if child.returncode not in accept:
        tail = (output[0] + output[1])[-TAIL_LINES:]
        raise CommandFailed(command, child.returncode, tail)
    return Completed(child.returncode, "\n".join(output[0]), "\n".join(output[1]))


class _HopelessError(Exception):
    """The awaited line was seen."""


async def _read(
    stream: asyncio.StreamReader | None,
    lines: list[str],
    hopeless: str | None,
    on_line: Callable[[str], None] | None = None,
) -> None:
    assert stream is not None
    async for raw in stream:
        line = raw.decode(errors="replace").rstrip("\n")
        lines.append(line)
        if on_line is not None:
            on_line(line)
        if hopeless is not None and hopeless in line:
            raise _HopelessError


def _cannot_start(argv: Sequence[str], error: OSError) -> CommandFailed:
    return CommandFailed(
        shlex.join(argv),
        127,
        [f"cannot start {argv[0]}: {error.strerror}"],
        remedy=why_not_started(error),
    )


def _log_not_opened(argv: Sequence[str], log: Path, error: OSError) -> CommandFailed:
    gone = error.errno == errno.ENOENT
    return CommandFailed(
        shlex.join(argv),
        127,
        [f"{argv[0]} was not started: its log {log} cannot be opened: {error.strerror}"],
        remedy=f"{log.parent} was removed: end the VM and start it again"
        if gone
        else f"check {log.parent} and the room in it",
    )


def note_in_log(log: Path, text: str) -> None:
    """Writes a line into a log from which on `said` reads. Raises OSError."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with log.open("ab") as output:
        output.write(f"{_FROM_HERE}{stamp} {text}\n".encode())


def said(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines that the process which writes to `log` has written: nothing from before its
    start. None when there is no such file.
    """
    tail = _read_tail(log)
    starts = [number for number, line in enumerate(tail) if line.startswith(_FROM_HERE)]
    own = tail[starts[-1] + 1 :] if starts else tail
    return own[-lines:]


def tail_of(path: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log, whoever wrote them; none when there is no such file."""
    return _read_tail(path)[-lines:]


def _read_tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return text.splitlines()


def bound_log(path: Path, limit_bytes: int) -> None:
    """Keeps a log that others append to (O_APPEND) below twice the limit, by copy and truncate.

    The last `limit_bytes` go to `path` + ".1". Lines written between reading and truncating are
    lost: a few microseconds, once in `limit_bytes`. Where there is no room for the copy, the log
    gives up its own room first: it is likely the file that takes the room. Raises OSError: there
    is no room even then, and what was read is lost.
    """
    try:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size <= limit_bytes:
                return
            file.seek(size - limit_bytes)
            kept, copy = file.read(limit_bytes), path.with_name(path.name + ".1")
            try:
                replace_bytes(copy, kept)
            except OSError:
                file.truncate(0)
                replace_bytes(copy, kept)
            else:
                file.truncate(0)
    except FileNotFoundError:
        return
