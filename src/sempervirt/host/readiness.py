"""What the agent takes beforehand, so that it works on a host on which little else does.

- Its memory is locked: a page that is swapped out, or a part of its program that was never read,
  needs a disk that may not answer any more.
- Its main thread has a higher priority than guests. What it starts does not inherit that.
- Threads are there: the kernel may refuse to make one.

None of this is needed on a healthy host: what is not allowed is said in the log, and the agent goes
on.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

from sempervirt.host import storage_call

log = logging.getLogger(__name__)

# include/uapi/asm-generic/mman.h
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
NICE = -10
# Of each kind: for calls on storage, and for all else that must not hold the event loop.
THREADS = 8

_libc = ctypes.CDLL(None, use_errno=True)


async def begin() -> None:
    """Takes all that is allowed. Called once, in the event loop."""
    for what, take in (("memory is not locked", lock_memory), ("its priority is not raised", rise)):
        if why := take():
            log.info("readiness: %s: %s", what, why)
    # Afterwards: all of a stack that is there before is read in, and locked.
    storage_call.prepare(THREADS)
    await _fill_pool()


async def _fill_pool() -> None:
    """Makes all threads of the loop's pool, of which each would be made when it is needed."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(THREADS, "pool"))
    all_there = threading.Barrier(THREADS)
    try:
        await asyncio.gather(*(asyncio.to_thread(all_there.wait, 5.0) for _ in range(THREADS)))
    except (RuntimeError, threading.BrokenBarrierError) as error:
        log.info("readiness: not all threads are there: %s", error)


def lock_memory() -> str:
    """Keeps all memory of this process where it is; why not, "" if that was done.

    What is there now is read in at once; what comes is locked when it is used, for whole stacks of
    threads would never be.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    # Within a limit, memory beyond it could not be had any more at all.
    if hard != resource.RLIM_INFINITY and not _may_lock():
        return f"no more than {hard >> 10} KiB may be (LimitMEMLOCK=)"
    for flags in (_MCL_CURRENT, _MCL_FUTURE | _MCL_ONFAULT):
        if _libc.mlockall(flags):
            return os.strerror(ctypes.get_errno())
    return ""


def rise() -> str:
    """Gives this thread precedence over guests, and nothing of it to children; why not, "" if that
    was done.
    """
    try:
        policy = os.SCHED_OTHER | os.SCHED_RESET_ON_FORK
        os.sched_setscheduler(0, policy, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    except OSError as error:
        return str(error.strerror)
    return ""


# CAP_IPC_LOCK in include/uapi/linux/capability.h
_CAP_IPC_LOCK = 14


def _may_lock() -> bool:
    """Whether the limit means nothing to this process."""
    with open("/proc/self/status") as status:  # noqa: PTH123 - a text of the kernel
        for line in status:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False
