"""Asks the service of a VM whether it is there: whether it takes a TCP connection."""

from __future__ import annotations

import asyncio
import contextlib


async def ask_tcp(service: str) -> str:
    """Connects to "ADDRESS:PORT" and hangs up; why that failed, "" if it did not. Whoever calls
    sets the time that this may take.
    """
    address, _, port = service.rpartition(":")
    try:
        _, writer = await asyncio.open_connection(address.strip("[]"), int(port))
    except (OSError, OverflowError, ValueError) as error:  # ValueError: it is no name of a host
        return f"{service}: {(isinstance(error, OSError) and error.strerror) or error}"
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return ""
