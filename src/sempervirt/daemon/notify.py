"""Tells systemd how the agent is doing (sd_notify(3)), if it was started by systemd."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket


def notify(message: str) -> None:
    """Sends for example "READY=1"; does nothing without NOTIFY_SOCKET."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
        peer.connect(address)
        peer.send(message.encode())


async def keep_watchdog() -> None:
    """Tells systemd that this loop turns, as often as its WatchdogSec= asks for. An agent that does
    not tell is replaced, and the next one adopts what runs.
    """
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    own = os.environ.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
    if not microseconds.isdecimal() or not own:
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(int(microseconds) / 1e6 / 3)
