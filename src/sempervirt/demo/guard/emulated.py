"""A machine that QEMU emulates, with a kernel that may die: its shell, and its kernel's log.

    booting ──answers──► up ──panic──► dead (QEMU ends where the kernel would reboot: -no-reboot)
                         │
                         └─ survived: answers further commands

The kernel's log goes to a file; commands and answers go over a serial port, one line "NUMBER
COMMAND" each, answered by what the command said and a line "NUMBER STATUS". Times are for a machine
that is emulated on a processor with other work.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from sempervirt.demo.trial import EMULATOR_SIGNALS

POLL_S = 0.02
COMMAND_S = 180.0
TAIL_LINES = 25
# panic=-1: a kernel that dies reboots at once, which is the end of QEMU.
CMDLINE = "console=ttyS0 panic=-1 loglevel=6"


# Until a process whose sockets are closed has ended.
GONE_S = 60.0


class NoAnswerError(Exception):
    """The machine did not answer by the deadline, or is gone."""


class EmulatedMachine:
    """One boot, of a QEMU with `arguments` beside those that every such machine has. Use in `with`:
    what is left of the machine ends with the block.
    """

    def __init__(
        self, qemu: str, kernel: Path, initrd: Path, log: Path, arguments: Sequence[str]
    ) -> None:
        self.folder = log.parent
        self.log = log
        self._number = 0
        self._received = b""
        self._door = self.folder / "commands"
        self._argv: list[str | Path] = [
            qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2",
            "-kernel", kernel, "-initrd", initrd,
            "-serial", f"file:{self.log}",
            "-serial", f"unix:{self._door},server=on,wait=off",
            *arguments,
        ]  # fmt: skip
        self._socket = socket.socket(socket.AF_UNIX)
        self.process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._argv, stdin=subprocess.DEVNULL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the machine, whatever it does."""
        self.process.kill()
        self.process.wait()
        self._socket.close()

    def wait_up(self, deadline_s: float) -> None:
        """Returns when it takes commands. An emulator that falls over while the machine boots is
        started once more (`demo.trial.emulator_died`). Raises NoAnswerError.
        """
        try:
            self._connect(time.monotonic() + deadline_s)
        except NoAnswerError:
            if not self.fell_over(0.0):
                raise
            self._socket.close()
            self._socket, self._received = socket.socket(socket.AF_UNIX), b""
            self.process = self._started()
            self._connect(time.monotonic() + deadline_s)

    def _connect(self, give_up: float) -> None:
        while True:
            try:
                self._socket.connect(str(self._door))
                break
            except OSError as error:
                if time.monotonic() > give_up or self.process.poll() is not None:
                    raise NoAnswerError(f"it does not boot; {self.tail()}") from error
                time.sleep(POLL_S)
        self._answer(b"0", give_up)

    def ask(self, command: str, deadline_s: float = COMMAND_S) -> tuple[int, str]:
        """The exit status of a command of the shell, and what it said. Raises NoAnswerError."""
        self._number += 1
        self._send(f"{self._number} {command}\n")
        return self._answer(str(self._number).encode(), time.monotonic() + deadline_s)

    def do(self, command: str, deadline_s: float = COMMAND_S) -> str:
        """The same of a command that must succeed. Raises NoAnswerError also when it fails."""
        status, said = self.ask(command, deadline_s)
        if status:
            raise NoAnswerError(f"{command}: status {status}: {said}; {self.tail()}")
        return said

    def start(self, command: str) -> None:
        """Starts a command that perhaps never ends, or never lets the machine answer again. Raises
        NoAnswerError.
        """
        self._number += 1
        self._send(f"{self._number} ({command}) >/dev/null 2>&1 &\n")

    def dies(self, deadline_s: float) -> bool:
        """Waits for the kernel's death; False when the kernel lives at the deadline."""
        try:
            self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def fell_over(self, within_s: float = GONE_S) -> bool:
        """Whether it is gone because its emulator fell over (`demo.trial.emulator_died`)."""
        try:
            return -self.process.wait(within_s) in EMULATOR_SIGNALS
        except subprocess.TimeoutExpired:
            return False

    @property
    def logs(self) -> tuple[Path, ...]:
        """What tells why it does not answer."""
        return (self.log,)

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The ends of its logs."""
        ends = []
        for path in self.logs:
            text = path.read_text(errors="replace") if path.exists() else ""
            ends.append(f"{path.name}:\n" + "\n".join(text.splitlines()[-lines:]))
        return "\n".join(ends)

    def _send(self, text: str) -> None:
        try:
            self._socket.sendall(text.encode())
        except OSError as error:
            raise NoAnswerError(f"it is gone; {self.tail()}") from error

    def _answer(self, number: bytes, give_up: float) -> tuple[int, str]:
        while True:
            lines = self._received.split(b"\n")
            for at, line in enumerate(lines[:-1]):
                words = line.split()
                if len(words) == 2 and words[0] == number and words[1].isdigit():
                    self._received = b"\n".join(lines[at + 1 :])
                    return int(words[1]), b"\n".join(lines[:at]).decode(errors="replace").strip()
            self._socket.settimeout(max(give_up - time.monotonic(), 0.001))
            try:
                more = self._socket.recv(65536)
            except TimeoutError as error:
                raise NoAnswerError(f"no answer by the deadline; {self.tail()}") from error
            except OSError as error:
                raise NoAnswerError(f"it is gone; {self.tail()}") from error
            if not more:
                raise NoAnswerError(f"it is gone; {self.tail()}")
            self._received += more
