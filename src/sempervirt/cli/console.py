"""Attaches the terminal to a VM's serial console."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

from sempervirt.cli.output import err
from sempervirt.core.errors import Unavailable

LEAVE = b"\x1d"  # Ctrl-]
_CHUNK = 4096


def attach(path: Path, name: str) -> None:
    """Connects stdin and stdout to the console until Ctrl-], or until either end closes.

    Raises Unavailable when the console cannot be reached.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        try:
            line.connect(str(path))
        except OSError as error:
            raise Unavailable(f"the console of {name} cannot be reached: {error}") from error
        err.print(f"console of {name}; Ctrl-] leaves", style="dim")
        with _raw(sys.stdin.fileno()):
            _copy(line, sys.stdin.fileno(), sys.stdout.fileno())
    err.print()


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[None]:
    """Every key goes to the guest; the terminal is put back afterwards."""
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _copy(line: socket.socket, source: int, sink: int) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(line, selectors.EVENT_READ)
        with contextlib.suppress(PermissionError):  # a file as stdin cannot be polled
            selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is line:
                    data = line.recv(_CHUNK)
                    if not data:
                        return
                    os.write(sink, data)
                    continue
                typed = os.read(source, _CHUNK)
                before, leave, _ = typed.partition(LEAVE)
                line.sendall(before)
                if leave or not typed:
                    return
