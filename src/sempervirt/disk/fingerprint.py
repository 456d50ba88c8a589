"""Of which host, with which programs, a measurement holds."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from sempervirt.host import process

CPUINFO = Path("/proc/cpuinfo")
_MODEL = re.compile(r"^(?:model name|cpu model|cpu)\s*:\s*(.+)$", re.MULTILINE | re.IGNORECASE)
_DEADLINE_S = 10.0
_NAMES = {
    "cpu": "the processor",
    "cpus": "the number of processors",
    "kernel": "the kernel",
    "blkd": "semper-blkd",
    "qemu": "QEMU",
}


class HostFingerprint(BaseModel):
    """The processors and the kernel; `blkd` and `qemu` are versions, empty if not asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str
    cpus: int
    kernel: str
    blkd: str = ""
    qemu: str = ""

    def differences(self, other: HostFingerprint, fields: tuple[str, ...]) -> list[str]:
        """What of `fields` is not the same in `other`, in words."""
        return [
            f"{_NAMES[field]} was {getattr(self, field) or 'unknown'!r}, "
            f"is {getattr(other, field) or 'unknown'!r}"
            for field in fields
            if getattr(self, field) != getattr(other, field)
        ]


@cache
def this_host() -> HostFingerprint:
    """This host without its programs; the same until the next boot."""
    found = _MODEL.search(CPUINFO.read_text())
    return HostFingerprint(
        cpu=found[1].strip() if found else platform.machine(),
        cpus=os.cpu_count() or 1,
        kernel=platform.release(),
    )


async def fingerprint(blkd: str, qemu_version: str = "") -> HostFingerprint:
    """This host with the program `blkd`, which is asked for its version.

    Raises CommandFailed when the program does not answer.
    """
    answer = await process.run([blkd, "--version"], timeout_s=_DEADLINE_S)
    version = answer.stdout.strip().rpartition(" ")[2]
    return this_host().model_copy(update={"blkd": version, "qemu": qemu_version})
