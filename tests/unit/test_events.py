"""The stream of events: its ring, its ids, its readers, and systemd's journal."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fastapi import FastAPI

from sempervirt.api import events, failures, server
from sempervirt.api.bounds import LOCAL, BoundedProtocol
from sempervirt.api.client import Client
from sempervirt.api.event_schemas import AnnouncedView, GapView, read_messages
from sempervirt.api.peers import Introduced, LocalProtocol
from sempervirt.api.reach import Caller
from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.core.events import STREAM, Event, Journal, Stream
from sempervirt.core.roles import Role
from sempervirt.daemon.journald import JournalWriter, to_datagram
from sempervirt.host.sockets import listen_unix

DEADLINE_S = 90.0
POLL_S = 0.01


def announce(stream: Stream, count: int, text: str = "ran") -> None:
    for number in range(count):
        event = Event(float(number), "state", f"{text} {number}")
        stream.announce("web", event, {"pid": "7"} if number == 0 else {})


def numbers(found: list[AnnouncedView | GapView]) -> list[int]:
    return [int(view.id.split(".")[1]) for view in found if isinstance(view, AnnouncedView)]


# The ring


def test_a_reader_goes_on_where_it_was() -> None:
    stream = Stream("a1", length=8)
    announce(stream, 3)
    part = stream.after_id("")
    assert [one.number for one in part.events] == [1, 2, 3]
    assert not part.gap
    announce(stream, 2)
    following = stream.after_id(stream.id_of(part.events[-1]))
    assert [one.number for one in following.events] == [4, 5]
    assert not following.gap


def test_a_reader_that_was_too_slow_is_told_of_the_gap() -> None:
    stream = Stream("a1", length=8)
    announce(stream, 20)
    late = stream.after(11)  # 12 is gone
    assert ([one.number for one in late.events], late.gap) == ([*range(13, 21)], True)
    in_time = stream.after(12)  # the control: 13 is there
    assert ([one.number for one in in_time.events], in_time.gap) == ([*range(13, 21)], False)


@pytest.mark.parametrize("known", ["b2.1", "a1.9"])
def test_an_id_of_another_agent_gives_everything_and_a_gap(known: str) -> None:
    stream = Stream("a1")
    announce(stream, 2)
    part = stream.after_id(known)
    assert (len(part.events), part.gap) == (2, True)


@pytest.mark.parametrize("nonsense", ["none", "a1", "a1.-1", "a1.1\n", "A1.1", "a1." + "9" * 40])
def test_what_is_no_id_is_refused(nonsense: str) -> None:
    with pytest.raises(ValueError, match="no id"):
        Stream("a1").after_id(nonsense)


def test_a_journal_announces_what_happens_to_its_subject() -> None:
    heard: list[tuple[str, str]] = []
    leave = STREAM.listen(lambda one: heard.append((one.subject, one.event.message)))
    try:
        Journal("web/root").note(1.0, "restart", "backend 1 ended")
        Journal().note(1.0, "restart", "nobody's")
    finally:
        leave()
    assert heard == [("web/root", "backend 1 ended")]


# Readers


@asynccontextmanager
async def served(
    place: Path, readers: events.Readers, protocol: type[BoundedProtocol] = LocalProtocol
) -> AsyncIterator[Path]:
    """The route alone, behind the server that the agent has."""
    app = FastAPI()
    app.include_router(events.router)
    app.state.readers = readers
    failures.install(app)
    path = place / "agent.sock"
    running = server._Server(app, listen_unix(path), protocol, LOCAL).running()
    async with running, asyncio.timeout(DEADLINE_S):
        try:
            yield path
        finally:
            readers.close()


async def wait_count(readers: events.Readers, count: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while readers.count != count:  # noqa: ASYNC110 - a condition of the server
            await asyncio.sleep(POLL_S)  # poll interval


async def test_what_was_is_told_and_the_answer_ends(tmp_path: Path) -> None:
    stream = Stream("a1")
    announce(stream, 3)
    async with served(tmp_path, events.Readers(stream)) as path, Client.connect(path) as client:
        found = [event async for event in client.events()]
        assert numbers(found) == [1, 2, 3]
        assert isinstance(found[0], AnnouncedView)
        assert found[0].evidence == {"pid": "7"}
        assert numbers([event async for event in client.events(after="a1.2")]) == [3]
        first, *_ = [event async for event in client.events(after="b1.2")]
        assert isinstance(first, GapView)
        with pytest.raises(InvalidRequest, match="no id"):
            [event async for event in client.events(after="none")]


async def test_who_follows_hears_what_happens_until_the_agent_ends(tmp_path: Path) -> None:
    stream = Stream("a1")
    readers = events.Readers(stream)
    announce(stream, 1)
    heard: list[int] = []

    async def follow(path: Path) -> None:
        async with Client.connect(path) as client:
            async for event in client.events(follow=True):
                heard.extend(numbers([event]))
                if heard[-1] < 5:
                    announce(stream, 1)

    async with served(tmp_path, readers) as path:
        following = asyncio.create_task(follow(path))
        async with asyncio.timeout(DEADLINE_S):
            while len(heard) < 5:  # noqa: ASYNC110 - heard in another task
                await asyncio.sleep(POLL_S)  # poll interval
    await following  # the stream has ended with the agent
    assert heard == [1, 2, 3, 4, 5]
    assert readers.count == 0


async def test_a_reader_that_hangs_is_cut_and_the_others_hear_everything(tmp_path: Path) -> None:
    stream = Stream("a1")
    readers = events.Readers(stream, send_s=2.0)
    heard: list[int] = []

    async def follow(path: Path) -> None:
        async with Client.connect(path) as client:
            async for event in client.events(follow=True):
                heard.extend(numbers([event]))

    async with served(tmp_path, readers) as path:
        with socket.socket(socket.AF_UNIX) as hung:
            hung.connect(str(path))
            hung.sendall(b"GET /v1/events?follow=true HTTP/1.1\r\nHost: a\r\n\r\n")
            await wait_count(readers, 1)
            following = asyncio.create_task(follow(path))
            await wait_count(readers, 2)
            for _ in range(40):
                announce(stream, 20, "x" * 4096)
                await asyncio.sleep(0)
            await wait_count(readers, 1)  # who reads is not cut
            while len(heard) < 800:  # noqa: ASYNC110 - heard in another task
                await asyncio.sleep(POLL_S)  # poll interval
    await following
    assert heard == [*range(1, 801)]


async def test_who_may_not_follow_any_more_hears_nothing_more(tmp_path: Path) -> None:
    """An operator is revoked, or the certificate ends, while the stream is open."""
    stream = Stream("a1")
    readers = events.Readers(stream)
    now: list[Caller | None] = [Caller("operator eve", Role.VIEWER)]
    heard: list[int] = []

    class OfEve(BoundedProtocol):
        """A connection over TLS, as far as rights go."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.app = Introduced(self.app, lambda: now[0])

    async def follow(path: Path) -> None:
        async with Client.connect(path) as client:
            async for event in client.events(follow=True):
                heard.extend(numbers([event]))

    async with served(tmp_path, readers, OfEve) as path:
        following = asyncio.create_task(follow(path))
        await wait_count(readers, 1)
        announce(stream, 1)
        while len(heard) < 1:  # noqa: ASYNC110 - heard in another task
            await asyncio.sleep(POLL_S)  # poll interval
        now[0] = None
        announce(stream, 1)
        await following
        assert (heard, readers.count) == ([1], 0)


async def test_so_many_may_follow_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "READERS_MAX", 1)
    readers = events.Readers(Stream("a1"))
    async with served(tmp_path, readers) as path, Client.connect(path) as client:
        readers.count = 1
        with pytest.raises(Unavailable, match="follow the events already"):
            [event async for event in client.events(follow=True)]
        assert [event async for event in client.events()] == []  # to look is free
        readers.count = 0


def test_a_stream_is_read_in_any_pieces() -> None:
    stream = Stream("a1")
    announce(stream, 2, "it said:\n\ndata: ü")
    whole = b"".join(events.messages(stream, stream.after(0))).decode()
    at_once, rest = read_messages(whole)
    assert (numbers(at_once), rest) == ([1, 2], "")
    found, rest = [], ""
    for letter in whole:
        some, rest = read_messages(rest + letter)
        found += some
    assert found == at_once


# systemd's journal


def test_each_event_is_in_the_journal_with_its_fields(tmp_path: Path) -> None:
    stream = Stream("a1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        writer = JournalWriter(stream, tmp_path / "journal")
        announce(stream, 1)
        lines = journal.recv(65536).decode().splitlines()
        writer.close()
    assert {"MESSAGE=web: ran 0", "SEMPERVIRT_SUBJECT=web", "SEMPERVIRT_EVENT=state"} <= {*lines}
    assert {"SEMPERVIRT_EVENT_ID=a1.1", "SEMPERVIRT_EVIDENCE_PID=7", "PRIORITY=5"} <= {*lines}
    assert writer.lost == 0


def test_a_journal_that_is_not_there_loses_lines_and_harms_nothing(tmp_path: Path) -> None:
    stream = Stream("a1")
    writer = JournalWriter(stream, tmp_path / "journal")
    announce(stream, 3)
    writer.close()
    assert writer.lost == 3
    assert stream.position == 3


def test_no_value_of_a_field_can_begin_another() -> None:
    text = "ended\nPRIORITY=0"
    packed = to_datagram({"MESSAGE": text})
    assert packed == b"MESSAGE\n" + len(text).to_bytes(8, "little") + text.encode() + b"\n"
    assert to_datagram({"MESSAGE": "ended"}) == b"MESSAGE=ended\n"
