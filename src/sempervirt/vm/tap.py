"""The tap of a network card while its VM moves to another QEMU on the same host.

A tap has one owner at a time, and QEMU changes it as soon as it opens it: what stands before a
packet, what the kernel may leave to the guest. So the new QEMU gets a stand-in, another tap of
the same kind which leads nowhere, and its open file is led to the tap when the old QEMU has ended:

    old QEMU ── file ── tap ────────────────────────┐ killed
    new QEMU ── file ── stand-in ─── (removed) ─────┴── tap

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
from collections.abc import Sequence
from typing import Self

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.host import background, descriptors
from sempervirt.host import tap as taps
from sempervirt.host.packets import Kept
from sempervirt.host.procfs import PROC

log = logging.getLogger(__name__)

STAND_IN = "semper%d"
# The old QEMU has 10 s to end.
ATTACH_DEADLINE_S = 15.0
# After that the guest runs on: perhaps somebody has taken the tap down.
RUNNING_DEADLINE_S = 0.5
POLL_S = 0.0005


class TapStandIn:
    """Made by `open`; ends with `close`."""

    def __init__(self, tap: str) -> None:
        self.tap = tap
        self.files: list[int] = []
        self._old_files: list[int] = []
        self._unread: list[bytes] = []
        self._kept: Kept | None = None
        self._removals: list[asyncio.Task[None]] = []

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

    async def lead_to_tap(self) -> None:
        """Gives the new QEMU the tap, as soon as the old one is gone. Raises Unavailable."""
        try:
            for file in self._old_files:
                if (was := taps.served(file)) is not None:
                    self._unread += taps.unread(file, was.header)
        except OSError as error:
            log.warning("tap %s: packets are lost: %s", self.tap, error.strerror)
        _close(self._old_files)
        self._removals = await lead(self.files, self.tap)

    def send_again(self) -> int:
        """Sends what the guest did not get; gives how many packets that were."""
        return self._kept.send_again(self._unread) if self._kept is not None else 0

    def close(self) -> None:
        """Lets go of it; if no QEMU has it, it is gone."""
        if self._kept is not None:
            self._kept.close()
        _close(self._old_files)
        _close(self.files)


def _close(files: list[int]) -> None:
    while files:
        os.close(files.pop())


async def lead(files: Sequence[int], tap: str) -> list[asyncio.Task[None]]:
    """Makes open files of a stand-in serve `tap`, once the last file that does is closed.

    What was done already stays as it is. The stand-in's files are free long before it is gone:
    given back is what removes it. Raises Unavailable.
    """
    try:
        before = [taps.served(file) for file in files]
        others = {was.interface for was in before if was is not None} - {tap}
        removals = [_start_removal(name) for name in others]
        await _serve(files, before, tap)
        deadline = asyncio.get_running_loop().time() + RUNNING_DEADLINE_S
        while taps.stands_still(tap) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
    except OSError as error:
        raise Unavailable(
            f"the tap {tap} cannot be given to the new QEMU: {error.strerror}"
        ) from error
    return removals


def _start_removal(stand_in: str) -> asyncio.Task[None]:
    removal = asyncio.to_thread(taps.Remover(stand_in).remove)
    return background.start(removal, f"remove {stand_in}")


async def _serve(files: Sequence[int], before: Sequence[taps.Served | None], tap: str) -> None:
    several = taps.MULTI_QUEUE if len(files) > 1 else 0
    for file, was in zip(files, before, strict=True):
        if was is not None and was.interface == tap:
            continue
        await _serve_when_free(file, tap, was.flags if was else taps.ORDINARY | several)
        if was is not None:
            taps.set_header(file, was.header)
            if not was.enabled:
                taps.disable(file)


async def _serve_when_free(file: int, tap: str, like: int) -> None:
    """EEXIST: it still serves the stand-in; EBUSY: the old QEMU has not ended yet."""
    deadline = asyncio.get_running_loop().time() + ATTACH_DEADLINE_S
    while True:
        try:
            taps.serve(file, tap, like)
        except OSError as error:
            late = asyncio.get_running_loop().time() > deadline
            if late or error.errno not in (errno.EEXIST, errno.EBUSY):
                raise
        else:
            return
        await asyncio.sleep(POLL_S)


async def settle(pid: int, netdev: str, tap: str) -> None:
    """Does for QEMU `pid` what an agent that died may have left undone. Raises Unavailable."""
    files: list[int] = []
    try:
        arguments = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace")
        given = re.search(rf"\0tap,id={netdev},fds?=([0-9:]+)[,\0]", arguments)
        numbers = given[1].split(":") if given else []
        files.extend(descriptors.take(pid, int(number)) for number in numbers)
        await asyncio.gather(*await lead(files, tap))
    except OSError as error:
        raise Unavailable(f"the tap {tap} cannot be given to QEMU: {error.strerror}") from error
    finally:
        _close(files)
