"""Programs that are started with fewer privileges than the agent has.

Linux keeps what a program may become for each thread (capabilities(7): the bounding set, and
no_new_privs), and a process begins with those of the thread that starts it. So a thread gives up
what the program shall not have, starts it, and ends; nothing runs between fork and exec.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sempervirt.host.confinement import CAPABILITIES

_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38

Started = TypeVar("Started")


def with_capabilities(kept: Collection[str], start: Callable[[], Started]) -> Started:
    """What `start` gives, which starts a program that has `kept` (names as in `CAPABILITIES`) at
    most, and gains nothing by what it executes. Raises what `start` raises.

    An agent that may not take capabilities away (it is no root, or its unit leaves it no
    CAP_SETPCAP) passes on what it has.
    """

    def reduced() -> Started:
        _give_up_all_but(kept)
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
