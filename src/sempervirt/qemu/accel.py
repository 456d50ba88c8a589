"""Whether KVM works here, found by running a tiny guest: it can be present and not work.

A KVM that emulates some processor modes only (a nested one, say) runs firmware happily and
then hangs every operating system; `accel_rom` reaches the mode that they need, and fails
there within milliseconds.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sempervirt.core.errors import CommandFailed, Unavailable
from sempervirt.host import process
from sempervirt.qemu.accel_rom import PASSED, rom

DEADLINE_S = 10.0
KVM_DEVICE = Path("/dev/kvm")
# isa-debug-exit ends QEMU with (value << 1) | 1.
_PASSED_EXIT = PASSED << 1 | 1


AcceleratorKind = Literal["kvm", "tcg"]


@dataclass(frozen=True)
class Accelerator:
    """How guests run, and why so."""

    kind: AcceleratorKind
    reason: str


async def probe(qemu: str) -> Accelerator:
    """KVM if a tiny guest runs under it, otherwise TCG with the reason."""
    if obstacle := _obstacle():
        return Accelerator("tcg", obstacle)
    try:
        await run_tiny_guest(qemu, "kvm")
    except CommandFailed as error:
        last = error.tail[-1] if error.tail else "it did not end in time"
        return Accelerator("tcg", f"KVM is present, but a tiny guest fails under it: {last}")
    return Accelerator("kvm", "a tiny guest ran under it")


def _obstacle() -> str:
    """Why KVM need not even be tried, or an empty string."""
    if not KVM_DEVICE.exists():
        return f"{KVM_DEVICE} does not exist"
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return f"no permission to use {KVM_DEVICE}"
    return ""


async def run_tiny_guest(qemu: str, accel: str) -> None:
    """Raises CommandFailed unless the tiny guest runs to its end under `accel`."""
    with tempfile.NamedTemporaryFile(prefix="semper-", suffix=".rom") as image:
        image.write(rom())
        image.flush()
        argv = [qemu, "-accel", accel, "-machine", "q35", "-cpu", "max", "-m", "16M"]
        argv += ["-nodefaults", "-no-user-config", "-display", "none", "-bios", image.name]
        argv += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
        await process.run(
            argv, timeout_s=DEADLINE_S, accept=(_PASSED_EXIT,), hopeless="KVM internal error"
        )


def choose(wanted: Literal["auto", "kvm", "tcg"], probed: Accelerator) -> Accelerator:
    """The accelerator for a VM that asks for auto, kvm or tcg.

    Raises Unavailable when the VM insists on a KVM that does not work.
    """
    if wanted == "auto" or wanted == probed.kind:
        return probed
    if wanted == "tcg":
        return Accelerator("tcg", "the VM asks for it")
    raise Unavailable(
        f"KVM does not work here: {probed.reason}",
        remedy='write accel = "auto" to run without it, slowly',
    )
