"""Watching a backend over its control socket, with a program at the other end that tests write."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sempervirt.disk.answers import Status
from sempervirt.disk.observer import observe
from sempervirt.disk.running import Running
from sempervirt.disk.state import Progressed, Ready, Serving, SupervisionEvent
from sempervirt.host.changes import Changes
from sempervirt.host.process import Process
from sempervirt.host.procfs import identify

GOLDEN = Path(__file__).parents[2] / "crates/control/golden"
DEADLINE_S = 90.0


def status(name: str, **keys: Any) -> dict[str, Any]:
    content = json.loads((GOLDEN / f"blkd-status-{name}.json").read_text())["ok"]
    return {**content, **keys}


class Seen:
    """Whoever is told, and a program that answers what `answer` says."""

    connection_expected = True

    def __init__(self) -> None:
        self.answer: dict[str, Any] = {}
        self.events: list[SupervisionEvent] = []
        self.statuses: list[Status] = []
        self.questions = 0
        self.changes = Changes()

    def post(self, event: SupervisionEvent) -> None:
        self.events.append(event)
        self.changes.notify()

    def seen(self, generation: int, status: Status) -> None:
        assert generation == 3
        self.statuses.append(status)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        self.questions += 1
        writer.write(json.dumps({"id": 1, "ok": self.answer}).encode() + b"\n")
        await writer.drain()
        writer.close()
        self.changes.notify()

    async def reached(self, *events: SupervisionEvent) -> None:
        await self.changes.wait_until(
            lambda: self.events == list(events), timeout_s=DEADLINE_S, what=f"{events}"
        )


@pytest.fixture
async def seen(place: Path) -> AsyncIterator[Seen]:
    listener = Seen()
    async with await asyncio.start_unix_server(listener.serve, place / "ctl"):
        yield listener


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
async def running(place: Path) -> AsyncIterator[Running]:
    identity = identify(os.getpid())
    assert identity is not None
    process = Process(identity, lambda _end: None)
    yield Running(3, "/blkd#1", process, place / "ctl", place / "log", 9)
    process.forget()


async def test_a_spare_that_begins_while_the_active_process_dies_is_seen_to_serve(
    seen: Seen, running: Running
) -> None:
    """It takes the image without ever waiting for it, perhaps before the agent hears of that."""
    timeline = {**status("active")["timeline_ns"], "spare_ready": None}
    assert timeline["lock_acquired"] is not None
    seen.answer = status("active", timeline_ns=timeline)
    watching = asyncio.create_task(observe(running, seen))
    await seen.reached(Ready(3))
    running.promoted.set()
    await seen.reached(Ready(3), Serving(3), Progressed(3))
    watching.cancel()


async def test_a_spare_is_ready_then_serves_then_has_progressed(
    seen: Seen, running: Running
) -> None:
    begun = {**status("spare")["timeline_ns"], "spare_ready": None}
    seen.answer = status("spare", timeline_ns=begun)
    watching = asyncio.create_task(observe(running, seen))
    await seen.changes.wait_until(
        lambda: seen.questions > 3, timeout_s=DEADLINE_S, what="some questions"
    )
    assert seen.events == []
    seen.answer = status("spare")
    await seen.reached(Ready(3))
    running.promoted.set()
    timeline = {**status("active")["timeline_ns"], "first_completion": None}
    seen.answer = status("active", state="listening", timeline_ns=timeline)
    assert seen.statuses == []
    seen.answer = status("active", timeline_ns=timeline)
    await seen.changes.wait_until(
        lambda: Serving(3) in seen.events, timeout_s=DEADLINE_S, what="serving"
    )
    assert Progressed(3) not in seen.events
    seen.answer = status("active")
    await seen.changes.wait_until(
        lambda: seen.events[-1] == Progressed(3), timeout_s=DEADLINE_S, what="progress"
    )
    watching.cancel()


async def test_an_answer_that_is_not_understood_is_told_once_and_is_no_status(
    seen: Seen, running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    running.promoted.set()
    seen.answer = status("active")
    del seen.answer["timeline_ns"]
    watching = asyncio.create_task(observe(running, seen))
    await seen.changes.wait_until(
        lambda: seen.questions > 5, timeout_s=DEADLINE_S, what="some questions"
    )
    assert seen.events == []
    assert seen.statuses == []
    assert running.complaint.startswith("semper-blkd 0.1.0 answers status without `timeline_ns`")
    assert caplog.text.count("without `timeline_ns`") == 1
    seen.answer = status("active")
    await seen.changes.wait_until(
        lambda: Progressed(3) in seen.events, timeout_s=DEADLINE_S, what="progress"
    )
    assert running.complaint == ""
    watching.cancel()
