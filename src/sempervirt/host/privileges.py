"""Programs that are started with fewer privileges than the agent has.

Linux keeps what a program may become for each thread (capabilities(7): the bounding set, and
no_new_privs), and a process begins with those of the thread that starts it. So a thread gives up
what the program shall not have, starts it, and ends; nothing runs between fork and exec.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from sempervirt.host.confinement import CAPABILITIES
from sempervirt.host.landlock import Ground

_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
# Of util-linux, and what it needs of capabilities; the program that it becomes has none.
SETPRIV = "setpriv"
TO_BECOME = ("setgid", "setpcap", "setuid")
# Of a program with an identity of its own: its group may use what it makes.
UMASK = 0o007

Started = TypeVar("Started")


@dataclass(frozen=True)
class Identity:
    """The user and group, of one number, that a program is started as, further groups, and what is
    left to it of the file system. What it makes is its group's as well.
    """

    number: int
    groups: tuple[int, ...]
    ground: Ground

    def command(self, argv: Sequence[str]) -> list[str]:
        """What becomes the program: by another program, since Python itself would copy its memory
        (fork) to run as another user between, which takes longer than all else.
        """
        groups = f"--groups={','.join(map(str, self.groups))}" if self.groups else "--clear-groups"
        return [
            *(SETPRIV, f"--reuid={self.number}", f"--regid={self.number}", groups),
            *("--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--", *argv),
        ]


def with_capabilities(
    kept: Collection[str],
    start: Callable[[], Started],
    ground: Ground | None = None,
    nice: int = 0,
) -> Started:
    """What `start` gives, which starts a program that has `kept` (names as in `CAPABILITIES`) at
    most, and gains nothing by what it executes; with a `ground` it has nothing else. One that is
    `nice` gives way to others by so much (setpriority(2)). Raises what `start` raises, OSError.

    An agent that may not take capabilities away (it is no root, or its unit leaves it no
    CAP_SETPCAP) passes on what it has.
    """

    def reduced() -> Started:
        if nice:
            os.setpriority(os.PRIO_PROCESS, 0, nice)  # of this thread, and of what it starts
        _give_up_all_but(kept)
        if ground is not None:
            ground.enclose()
        return start()

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="start") as thread:
        return thread.submit(reduced).result()


def _give_up_all_but(kept: Collection[str]) -> None:
    """In the calling thread, for good."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    numbers = {CAPABILITIES.index(name) for name in kept}
    # Also those that are newer than the table; the kernel refuses the first that it does not know.
    for number in range(64):
        if number not in numbers and prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) != 0:
            return
