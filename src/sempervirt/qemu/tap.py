"""The tap of a network card while its VM moves to another QEMU on the same host.

A tap has one owner at a time, and QEMU changes it as soon as it opens it: what stands before a
packet, what the kernel may leave to the guest. So the new QEMU gets a stand-in, another tap of
the same kind which leads nowhere, and its open file is led to the tap when the old QEMU has ended:

    old QEMU ── file ── tap ───────── killed, but we have the file ── closed ┐
    new QEMU ── file ── stand-in ──── removed ───────────────────────────────┴── tap

    stop, give, take ─────────────────────────────► the packets of this time are kept, and sent
                                                    again before the guest runs, together with
                                                    what waited in the old file

QEMU notices nothing: it has the same file all the time. It must not reconfigure a file that
serves nothing (it would abort); it does that when it loads its state, or the guest asks for it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.host import background, descriptors
from sempervirt.host import tap as taps
from sempervirt.host.packets import Kept
from sempervirt.host.procfs import PROC

log = logging.getLogger(__name__)

STAND_IN = "semper%d"
FREE_DEADLINE_S = 5.0
SERVE_DEADLINE_S = 5.0
# After that the guest runs on: perhaps somebody has taken the tap down.
RUNNING_DEADLINE_S = 0.5
POLL_S = 0.0005
_removals: set[asyncio.Task[None]] = set()


class TapStandIn:
    """Made by `open`; ends with `close`."""

    def __init__(self, tap: str) -> None:
        self.tap = tap
        self.files: list[int] = []
        self._old_files: list[int] = []
        self._unread: list[bytes] = []
        self._kept: Kept | None = None
        self._before: list[taps.Served | None] = []

    @classmethod
    def open(cls, tap: str, pid: int) -> Self:
        """One that is like `tap`, as QEMU `pid` has it open.

        Raises InvalidRequest for a tap that would end with its owner, Unavailable.
        """
        stand_in = cls(tap)
        try:
            numbers = taps.files_of(pid, tap)
            stand_in._old_files.extend(descriptors.take(pid, number) for number in numbers)
            like = taps.served(stand_in._old_files[0])
            assert like is not None
            if not like.persistent:
                stand_in.close()
                raise InvalidRequest(
                    f"the tap {tap} was made by QEMU, and ends with it",
                    remedy=f"make it beforehand: ip tuntap add {tap} mode tap",
                )
            name = STAND_IN
            for _ in numbers:
                stand_in.files.append(taps.open_file())
                name = taps.serve(stand_in.files[-1], name, like.flags)
        except IndexError:
            raise Unavailable(f"QEMU (pid {pid}) does not have the tap {tap} open") from None
        except OSError as error:
            stand_in.close()
            raise Unavailable(
                f"no second QEMU can be given the tap {tap}: {error.strerror}",
                remedy="the agent needs CAP_NET_ADMIN and CAP_NET_RAW for that",
            ) from error
        return stand_in

    def keep_packets(self) -> None:
        """Keeps what is sent to the guest from now on. Raises Unavailable."""
        try:
            self._kept = Kept(self.tap)
        except OSError as error:
            raise Unavailable(
                f"the packets to the tap {self.tap} cannot be kept: {error.strerror}",
                remedy="the agent needs CAP_NET_RAW for that",
            ) from error

    async def remove(self) -> None:
        """Takes the stand-in away: the new QEMU's files serve nothing then. Raises Unavailable."""
        self._before = await free(self.files, self.tap)

    async def take_over(self) -> None:
        """Gives the new QEMU the tap; the old one has ended. Raises Unavailable.

        Until now our copies of its files have kept the tap in service: it is without an owner for
        no longer than it takes to close them.
        """
        try:
            for file in self._old_files:
                if (was := taps.served(file)) is not None:
                    self._unread += taps.unread(file, was.header)
        except OSError as error:
            log.warning("tap %s: packets are lost: %s", self.tap, error.strerror)
        _close(self._old_files)
        await serve(self.files, self._before, self.tap)

    def send_again(self) -> int:
        """Sends what the guest did not get; gives how many packets that were."""
        return self._kept.send_again(self._unread) if self._kept is not None else 0

    def close(self) -> None:
        """Closes our files; a tap that no QEMU has open is gone then."""
        if self._kept is not None:
            self._kept.close()
        _close(self._old_files)
        _close(self.files)


def _close(files: list[int]) -> None:
    while files:
        os.close(files.pop())


async def free(files: Sequence[int], tap: str) -> list[taps.Served | None]:
    """Takes away what else than `tap` is served by `files`; gives what they served before.

    The files are free long before the interface is gone. Raises Unavailable.
    """
    try:
        before = [taps.served(file) for file in files]
        for name in {was.interface for was in before if was is not None} - {tap}:
            removal = background.start(asyncio.to_thread(taps.Remover(name).remove), name)
            _removals.add(removal)
            removal.add_done_callback(_removals.discard)
        await _wait(lambda: all(_is_free(file, tap) for file in files), FREE_DEADLINE_S)
    except OSError as error:
        raise _not_given(tap, error) from error
    return before


def _is_free(file: int, tap: str) -> bool:
    now = taps.served(file)
    return now is None or now.interface == tap


async def serve(files: Sequence[int], before: Sequence[taps.Served | None], tap: str) -> None:
    """Lets `files` serve `tap`, as soon as no other file does. Raises Unavailable."""
    several = taps.MULTI_QUEUE if len(files) > 1 else 0
    try:
        for file, was in zip(files, before, strict=True):
            if was is not None and was.interface == tap:
                continue
            like = was.flags if was else taps.ORDINARY | several
            if not await _wait(partial(_serves, file, tap, like), SERVE_DEADLINE_S):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            if was is not None:
                taps.set_header(file, was.header)
                if not was.enabled:
                    taps.disable(file)
        await _wait(lambda: not taps.stands_still(tap), RUNNING_DEADLINE_S)
    except OSError as error:
        raise _not_given(tap, error) from error


def _serves(file: int, tap: str, like: int) -> bool:
    try:
        taps.serve(file, tap, like)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise
    return True


async def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether the condition held before the deadline."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while not condition():
        if loop.time() > deadline:
            return False
        await asyncio.sleep(POLL_S)
    return True


def _not_given(tap: str, error: OSError) -> Unavailable:
    return Unavailable(f"the tap {tap} cannot be given to the new QEMU: {error.strerror}")


async def finish(pid: int, netdev: str, tap: str) -> None:
    """Does for QEMU `pid` what an agent that died may have left undone. Raises Unavailable."""
    files: list[int] = []
    try:
        arguments = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace")
        given = re.search(rf"\0tap,id={netdev},fds?=([0-9:]+)[,\0]", arguments)
        numbers = given[1].split(":") if given else []
        files.extend(descriptors.take(pid, int(number)) for number in numbers)
        await serve(files, await free(files, tap), tap)
    except OSError as error:
        raise _not_given(tap, error) from error
    finally:
        _close(files)
