"""Host a: an emulated machine with a stock Debian kernel. Its ports are files of this machine.

first   the kernel's log                      second  commands and answers (`serve.sh`)
third   what its guests say                   fourth  the log of its agent
"""

from __future__ import annotations

import time
from pathlib import Path

from sempervirt.demo.guard.emulated import CMDLINE, POLL_S, EmulatedMachine, NoAnswerError

BOOT_S = 120.0


class HostA(EmulatedMachine):
    """One boot. What is left of it ends with the block."""

    def __init__(
        self, qemu: str, kernel: Path, initrd: Path, disk: Path, folder: Path, forward: str
    ) -> None:
        """`forward` is the address "HOST:PORT" here that leads to host a's port 7443."""
        self.beats = folder / "beats.log"
        self.agent_log = folder / "semperd-a.log"
        arguments = [
            "-m", "1G", "-append", f"{CMDLINE} mitigations=off",
            "-drive", f"if=virtio,format=raw,snapshot=on,file={disk}",
            "-netdev", f"user,id=net,hostfwd=tcp:{forward}-:7443",
            "-device", "virtio-net-pci,netdev=net,romfile=",
            "-serial", f"file:{self.beats}", "-serial", f"file:{self.agent_log}",
        ]  # fmt: skip
        super().__init__(qemu, kernel, initrd, folder / "kernel.log", arguments)

    @property
    def logs(self) -> tuple[Path, ...]:
        """The kernel's and the agent's."""
        return (self.log, self.agent_log)

    def wait_log(self, words: str, deadline_s: float, *, after: int = 0) -> float:
        """The time (monotonic) at which the words were seen in the kernel's log, beyond so many
        bytes.

        Raises NoAnswerError.
        """
        give_up = time.monotonic() + deadline_s
        while True:
            if words.encode() in self.log.read_bytes()[after:]:
                return time.monotonic()
            if time.monotonic() > give_up:
                raise NoAnswerError(f"not in the kernel's log: {words}; {self.tail()}")
            time.sleep(POLL_S)
