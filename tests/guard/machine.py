"""A host in a machine of its own: QEMU without KVM, a stock Debian kernel, the guard, a way to die.

    booting ──init answers──► up ──panic──► dead (QEMU ends where the kernel would reboot)
                              │
                              └─ survived: answers further commands

The kernel's log goes to a file, commands and answers over the second serial port
(`tests/guard/init.sh`). Times are for a machine that is emulated on a processor with other work.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sempervirt.guest.cpio import Archive
from sempervirt.guest.initramfs import BUSYBOX
from sempervirt.guest.modules import read_module

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / ".cache/guard"
SERIES = ("6.1", "6.12")
# panic=-1: a kernel that dies reboots at once, which is the end of QEMU.
CMDLINE = "console=ttyS0 panic=-1 loglevel=6 memmap=1M$0xf000000"
BOOT_S = 90.0
COMMAND_S = 60.0
DEATH_S = 45.0
POLL_S = 0.05
# Of the kernel's own modules: `dummy` comes and goes in a health check, the others are a pstore in
# memory, where the boot below leaves room for one.
FURTHER = ("dummy", "reed_solomon", "ramoops")
RAMOOPS = "mem_address=0xf000000 mem_size=0x100000 record_size=0x20000"


class NoAnswerError(Exception):
    """The machine did not answer by the deadline, or is gone."""


@dataclass(frozen=True)
class Image:
    """What a machine boots."""

    kernel: Path
    initrd: Path


def available() -> tuple[str, ...]:
    """The series of kernels that `scripts/guard-kernels` has fetched."""
    return tuple(series for series in SERIES if (KERNELS / series / "release").exists())


def _module(series: str, source: str, name: str) -> bytes:
    """A module of ours for a kernel, built when its source has changed; without symbols for gdb."""
    output = KERNELS / "modules" / f"{name}-{series}"
    subprocess.run(
        ["scripts/kernel-module", "--source", source, "--build", KERNELS / series / "build",
         "--output", output],
        cwd=ROOT, check=True,
    )  # fmt: skip
    stripped = output / f"{name}.stripped"
    subprocess.run(["strip", "--strip-debug", "-o", stripped, output / f"{name}.ko"], check=True)
    return stripped.read_bytes()


def build(series: str, folder: Path) -> Image:
    """The image of a machine: busybox, `init.sh`, and modules: the guard, the crasher, others."""
    archive = Archive()
    for directory in ("dev", "bin", "sbin", "lib"):
        archive.directory(directory)
    archive.character_device("dev/console", 5, 1)
    archive.character_device("dev/null", 1, 3)
    archive.file("bin/busybox", BUSYBOX.read_bytes(), executable=True)
    init = Path(__file__).with_name("init.sh")
    archive.file("init", init.read_bytes(), executable=True)
    modules = {
        "semper_guard": _module(series, "kernel/semper_guard", "semper_guard"),
        "semper_crash": _module(series, "tests/guard/crasher", "semper_crash"),
    }
    misuse = folder / "misuse"
    source = Path(__file__).with_name("misuse.c")
    subprocess.run(["gcc", "-O2", "-static", "-Wall", "-Werror", "-o", misuse, source], check=True)
    archive.file("bin/misuse", misuse.read_bytes(), executable=True)
    tree = KERNELS / series / "modules"
    for name in FURTHER:
        modules[name] = read_module(next(tree.rglob(f"{name}.ko*"))).contents
    for name, contents in modules.items():
        archive.file(f"lib/{name}.ko", contents)
    initrd = folder / f"guard-{series}.img"
    initrd.write_bytes(archive.to_bytes())
    return Image(KERNELS / series / "vmlinuz", initrd)


class Machine:
    """One boot. Use in `with`; what is left of the machine ends with the block."""

    def __init__(self, image: Image, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "console.log"
        self._number = 0
        self._received = b""
        folder.mkdir(parents=True, exist_ok=True)
        door = folder / "commands"
        program = shutil.which("qemu-system-x86_64") or "qemu-system-x86_64"
        self.process = subprocess.Popen(
            [
                program, "-nodefaults", "-display", "none", "-no-reboot",
                "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "256M",
                "-kernel", image.kernel, "-initrd", image.initrd,
                "-append", CMDLINE,
                "-serial", f"file:{self.log}", "-serial", f"unix:{door},server=on,wait=off",
            ],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._connect(door)
        except BaseException:
            self.close()
            raise

    def _connect(self, door: Path) -> None:
        give_up = time.monotonic() + BOOT_S
        while True:
            try:
                self._socket.connect(str(door))
                break
            except OSError:
                if time.monotonic() > give_up or self.process.poll() is not None:
                    raise
                time.sleep(POLL_S)  # poll interval
        self._answer(b"0", give_up)

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

    # -- commands ------------------------------------------------------------------------------

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
                raise NoAnswerError(f"nothing by the deadline; {self.tail()}") from error
            except OSError as error:
                raise NoAnswerError(f"the machine is gone; {self.tail()}") from error
            if not more:
                raise NoAnswerError(f"the machine is gone; {self.tail()}")
            self._received += more

    def ask(self, command: str, deadline_s: float = COMMAND_S) -> tuple[int, str]:
        """The exit status of a command of the shell, and what the command said.

        Raises NoAnswerError.
        """
        self._number += 1
        try:
            self._socket.sendall(f"{self._number} {command}\n".encode())
        except OSError as error:
            raise NoAnswerError(f"the machine is gone; {self.tail()}") from error
        return self._answer(str(self._number).encode(), time.monotonic() + deadline_s)

    def do(self, command: str, deadline_s: float = COMMAND_S) -> str:
        """The same of a command that must succeed."""
        status, said = self.ask(command, deadline_s)
        if status:
            raise AssertionError(f"{command}: status {status}: {said}\n{self.tail()}")
        return said

    def tail(self, lines: int = 30) -> str:
        """The end of the kernel's log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    # -- the guard and the ways to die ----------------------------------------------------------

    def load_guard(self, **parameters: object) -> None:
        """Loads the module, and keeps its events in a file from then on."""
        words = " ".join(f"{name}={value}" for name, value in parameters.items())
        self.do(f"insmod /lib/semper_guard.ko {words}")
        # A block of its own for each line; `cat` would ask by sendfile.
        self.do("(dd if=/dev/semper_guard of=/tmp/events bs=4096 >/dev/null 2>&1 &)")

    def events(self) -> list[dict[str, Any]]:
        """All events so far."""
        said = self.do("cat /tmp/events 2>/dev/null; true")
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]

    def start(self, command: str) -> None:
        """Starts a command that perhaps never ends, or never lets the machine answer again."""
        self._number += 1
        self._socket.sendall(f"{self._number} ({command}) >/dev/null 2>&1 &\n".encode())

    def wait_event(self, after: int, deadline_s: float = COMMAND_S) -> list[dict[str, Any]]:
        """Waits for an event beyond the first `after`, and gives all of those.

        Raises NoAnswerError.
        """
        give_up = time.monotonic() + deadline_s
        while True:
            found = self.events()[after:]
            if found:
                return found
            if time.monotonic() > give_up:
                raise NoAnswerError(f"no event by the deadline; {self.tail()}")
            time.sleep(POLL_S)  # poll interval

    def dies(self, deadline_s: float = DEATH_S) -> bool:
        """Waits for the kernel's death; False when the kernel lives at the deadline."""
        try:
            self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            return False
        return True
