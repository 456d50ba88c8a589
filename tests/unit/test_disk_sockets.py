"""Sockets that somebody has removed, while the disk's backends may not be replaced."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sempervirt.core.errors import StateConflict
from sempervirt.disk import sockets
from sempervirt.disk.sockets import Sockets


class Told:
    """The disk's history, and where QEMU connects."""

    def __init__(self, place: Path) -> None:
        self.said: list[str] = []
        self.listeners: list[Path] = []
        files = SimpleNamespace(socket=place / "front", session=place / "session")
        self.disk: Any = SimpleNamespace(
            name="web/root",
            setup=SimpleNamespace(files=files),
            history=SimpleNamespace(sockets=self.said.append),
            backends=SimpleNamespace(control_sockets={}, listen_at=self.listeners.append),
        )


async def test_what_is_refused_is_tried_again_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that moves, say. Its active backend listens at a socket that nobody finds, until it is
    replaced: also when the name is there again.
    """
    told, asked, refusing = Told(tmp_path), [], True
    front = told.disk.setup.files.socket

    def listen(_setup: object) -> Path:
        front.touch()
        return Path(front)

    async def replace_backends(_disk: object) -> None:
        asked.append(refusing)
        if refusing:
            raise StateConflict("the VM moves")

    monkeypatch.setattr(sockets, "listen", listen)
    monkeypatch.setattr(sockets, "turn_away", lambda _listener: None)
    monkeypatch.setattr(sockets, "replace_backends", replace_backends)
    watched = Sockets(told.disk)
    for _ in range(5):  # the first look may be between an end and a beginning
        await watched.look()
    assert asked == [True] * 4
    assert len(told.said) == len(told.listeners) == 1
    refusing = False
    await watched.look()
    await watched.look()
    assert asked == [True] * 4 + [False]
    # The next time is told as well.
    front.unlink()
    await watched.look()
    await watched.look()
    assert len(told.said) == len(told.listeners) == 2
