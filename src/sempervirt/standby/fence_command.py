"""The operator's command that switches a host off, and what its answers prove."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from sempervirt.core.errors import CommandFailed
from sempervirt.host import process
from sempervirt.standby.means import Means, NotYet, Proof, Proven

COMMAND_S = 60.0
_OUTPUT_LINES = 5
# "Status: OFF" of the fence agents, "Chassis Power is off" of ipmitool, "already off" of both.
_OFF = re.compile(r"\boff\b", re.IGNORECASE)
_ON = re.compile(r"\b(on|not off)\b", re.IGNORECASE)


@dataclass(frozen=True)
class FenceCommand:
    """Switches a host off, and tells its state: two commands, without a shell, as fence agents are.

    `status` has to tell the state in a word on its last line: "Status: OFF", "Power is off". Each
    may take `timeout_s`.
    """

    off: tuple[str, ...]
    status: tuple[str, ...]
    timeout_s: float = COMMAND_S


@dataclass(frozen=True)
class Ran:
    """What came of a command. `exit_code` None: it did not end by its deadline, or did not
    start.
    """

    command: str
    exit_code: int | None
    output: tuple[str, ...] = ()

    def __str__(self) -> str:
        how = "no end in time" if self.exit_code is None else f"exit code {self.exit_code}"
        last = f": {self.output[-1]}" if self.output else ""
        return f"`{self.command}` {how}{last}"


def judge_command(off: Ran, status: Ran) -> Proof:
    """What the two commands prove. Pure.

    That a host was told to go off proves nothing, nor does an exit code 0: of the others' users
    many saw "fenced" where the host ran on. What counts is that the host was *seen* to be off
    after that, also where the first command failed because it was off already. Fence agents answer
    a question for the state of a host that is off with exit code 2.
    """
    told = status.output[-1] if status.output else ""
    answered = status.exit_code in (0, 2)
    if answered and _OFF.search(told) and not _ON.search(told):
        return Proven(Means.COMMAND, f"{off}; then {status}")
    return NotYet(f"its host was not seen to be off: {off}; then {status}")


async def run_fence(command: FenceCommand) -> Proof:
    """Carries the operator's commands out; takes at most two times their limit."""
    off = await _ran(command.off, command.timeout_s)
    return judge_command(off, await _ran(command.status, command.timeout_s))


async def _ran(argv: Sequence[str], timeout_s: float) -> Ran:
    try:
        done = await process.run(argv, timeout_s=timeout_s, accept=range(256))
    except CommandFailed as error:
        code = None if error.exit_code == 127 else error.exit_code  # it did not start
        return Ran(error.command, code, tuple(error.tail[-_OUTPUT_LINES:]))
    lines = [line for text in (done.stderr, done.stdout) for line in text.splitlines() if line]
    return Ran(shlex.join(argv), done.exit_code, tuple(lines[-_OUTPUT_LINES:]))
