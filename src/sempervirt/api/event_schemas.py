"""An event as the API tells it, one for each message of a stream of server-sent events."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import BaseModel

from sempervirt.core.events import Announced, EventKind, Stream


class AnnouncedView(BaseModel):
    """Something that happened to a VM or a disk. `subject` is the VM, or VM/DISK; `time` is in
    seconds since the epoch; `evidence` what it was seen by. Who has read it goes on after `id`.
    """

    id: str
    time: float
    subject: str
    kind: EventKind
    message: str
    evidence: dict[str, str]


class GapView(BaseModel):
    """Events before this point are not kept any more, or were an earlier agent's."""

    kind: Literal["gap"] = "gap"


def announced_view(stream: Stream, announced: Announced) -> AnnouncedView:
    """An event of the stream."""
    event = announced.event
    return AnnouncedView(
        id=stream.id_of(announced),
        time=event.time,
        subject=announced.subject,
        kind=event.kind,
        message=event.message,
        evidence=dict(announced.evidence),
    )


def to_message(view: AnnouncedView | GapView) -> bytes:
    """As a server-sent event. JSON has no line break in it, so one line of data is all of it."""
    lines = [f"id: {view.id}"] if isinstance(view, AnnouncedView) else []
    data = json.dumps(view.model_dump(mode="json"))
    return "\n".join([*lines, f"event: {view.kind}", f"data: {data}", "", ""]).encode()


def read_messages(text: str) -> tuple[list[AnnouncedView | GapView], str]:
    """The events in what a stream has sent so far, and what is left: the beginning of a message.

    Raises ValueError for what is no stream of ours.
    """
    *whole, rest = text.split("\n\n")
    found: list[AnnouncedView | GapView] = []
    for message in whole:
        data = [line[6:] for line in message.split("\n") if line.startswith("data: ")]
        if not data:
            continue  # a comment: the stream is alive
        value = json.loads(data[0])
        is_gap = isinstance(value, dict) and value.get("kind") == "gap"
        found.append((GapView if is_gap else AnnouncedView).model_validate(value))
    return found, rest
