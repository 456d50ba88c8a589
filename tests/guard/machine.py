"""A host in a machine of its own: QEMU without KVM, a stock Debian kernel, the guard, a way to die.

It is an `EmulatedMachine`, whose shell is `tests/guard/init.sh`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sempervirt.demo.guard.emulated import (
    CMDLINE,
    COMMAND_S,
    POLL_S,
    EmulatedMachine,
    NoAnswerError,
)
from sempervirt.guest.cpio import Archive
from sempervirt.guest.initramfs import BUSYBOX
from sempervirt.guest.modules import read_module

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / ".cache/guard"
SERIES = ("6.1", "6.12")
# With KASAN and lockdep, by scripts/guard-debug-kernel. They are tried where they are named only.
DEBUG = tuple(f"{series}-debug" for series in SERIES)
BOOT_S = 240.0
DEATH_S = 120.0
MEMORY, DEBUG_MEMORY = "256M", "1G"
# Of the kernel's own modules: `dummy` comes and goes in a health check, the others are a pstore in
# memory, where the boot below leaves room for one.
FURTHER = ("dummy", "reed_solomon", "ramoops")
WITH_PSTORE = f"{CMDLINE} memmap=1M$0xf000000"
RAMOOPS = "mem_address=0xf000000 mem_size=0x100000 record_size=0x20000"
# Of a machine with a crash kernel, which has its memory from the start.
WITH_CRASH_KERNEL = f"{CMDLINE} crashkernel=160M"
CRASH_MEMORY = "640M"
CRASH_UP = "crash kernel: up, with a dump of "


@dataclass(frozen=True)
class Image:
    """What a machine boots, in so much memory. `patience`: by how much it is slower than others."""

    kernel: Path
    initrd: Path
    memory: str = MEMORY
    patience: float = 1.0


def available(*, debug: bool = False) -> tuple[str, ...]:
    """The series of kernels that `scripts/guard-kernels` has fetched; with `debug` also those that
    `scripts/guard-debug-kernel` has built.
    """
    wanted = (*SERIES, *DEBUG) if debug else SERIES
    return tuple(series for series in wanted if (KERNELS / series / "release").exists())


def module_file(series: str, source: str, name: str) -> Path:
    """A module of ours for a kernel, built when its source has changed; without symbols for gdb."""
    output = KERNELS / "modules" / f"{name}-{series}"
    subprocess.run(
        ["scripts/kernel-module", "--source", source, "--build", KERNELS / series / "build",
         "--output", output],
        cwd=ROOT, check=True,
    )  # fmt: skip
    stripped = output / f"{name}.stripped"
    subprocess.run(["strip", "--strip-debug", "-o", stripped, output / f"{name}.ko"], check=True)
    return stripped


def build(series: str, folder: Path, *, crash_kernel: bool = False) -> Image:
    """The image of a machine: busybox, `init.sh`, and modules: the guard, the crasher, others. With
    `crash_kernel` also what `Machine.load_crash_kernel` loads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = Archive()
    for directory in ("dev", "bin", "sbin", "lib"):
        archive.directory(directory)
    archive.character_device("dev/console", 5, 1)
    archive.character_device("dev/null", 1, 3)
    archive.file("bin/busybox", BUSYBOX.read_bytes(), executable=True)
    init = Path(__file__).with_name("init.sh")
    archive.file("init", init.read_bytes(), executable=True)
    modules = {
        "semper_guard": module_file(series, "kernel/semper_guard", "semper_guard").read_bytes(),
        "semper_crash": module_file(series, "tests/guard/crasher", "semper_crash").read_bytes(),
    }
    if crash_kernel:
        archive.file("lib/crash-kernel", (KERNELS / series / "vmlinuz").read_bytes())
        archive.file("lib/crash-initrd", _crash_initrd())
    for program in ("misuse", "cost", "crash_kernel"):
        made = folder / program
        source = Path(__file__).with_name(f"{program}.c")
        subprocess.run(
            ["gcc", "-O2", "-static", "-Wall", "-Werror", "-o", made, source], check=True
        )
        archive.file(f"bin/{program}", made.read_bytes(), executable=True)
    tree = KERNELS / series / "modules"
    for name in FURTHER:
        modules[name] = read_module(next(tree.rglob(f"{name}.ko*"))).contents
    for name, contents in modules.items():
        archive.file(f"lib/{name}.ko", contents)
    initrd = folder / f"guard-{series}.img"
    initrd.write_bytes(archive.to_bytes())
    kernel = KERNELS / series / "vmlinuz"
    return Image(kernel, initrd, DEBUG_MEMORY, 4.0) if series in DEBUG else Image(kernel, initrd)


def _crash_initrd() -> bytes:
    archive = Archive()
    for directory in ("dev", "bin"):
        archive.directory(directory)
    archive.character_device("dev/console", 5, 1)
    archive.file("bin/busybox", BUSYBOX.read_bytes(), executable=True)
    archive.file("init", Path(__file__).with_name("crash.sh").read_bytes(), executable=True)
    return archive.to_bytes()


class Machine(EmulatedMachine):
    """One boot. Use in `with`; what is left of the machine ends with the block."""

    def __init__(
        self,
        image: Image,
        folder: Path,
        options: Sequence[str] = (),
        *,
        cmdline: str = WITH_PSTORE,
        memory: str = "",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        program = shutil.which("qemu-system-x86_64") or "qemu-system-x86_64"
        arguments = ["-m", memory or image.memory, "-append", cmdline, *options]
        super().__init__(program, image.kernel, image.initrd, folder / "console.log", arguments)
        try:
            self.wait_up(BOOT_S * image.patience)
        except BaseException:
            self.close()
            raise

    def load_guard(self, **parameters: object) -> None:
        """Loads the module, and keeps its events in a file from then on."""
        words = " ".join(f"{name}={value}" for name, value in parameters.items())
        self.do(f"insmod /lib/semper_guard.ko {words}")
        # A block of its own for each line; `cat` would ask by sendfile.
        self.do("(dd if=/dev/semper_guard of=/tmp/events bs=4096 >/dev/null 2>&1 &)")

    def load_crash_kernel(self) -> None:
        """As kdump-tools does; the image has to be built for that."""
        self.do(
            "/bin/crash_kernel /lib/crash-kernel /lib/crash-initrd "
            "'console=ttyS0 panic=-1 loglevel=4 nr_cpus=1 reset_devices'"
        )
        self.do("grep -qx 1 /sys/kernel/kexec_crash_loaded")

    def events(self) -> list[dict[str, Any]]:
        """All events so far."""
        said = self.do("cat /tmp/events 2>/dev/null; true")
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]

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
        return super().dies(deadline_s)
