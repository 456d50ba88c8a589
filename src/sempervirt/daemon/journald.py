"""Events in systemd's journal with fields (systemd.journal-fields(7), and the protocol in
https://systemd.io/JOURNAL_NATIVE_PROTOCOL/): `journalctl SEMPERVIRT_SUBJECT=web/root`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sempervirt.core.events import STREAM, Announced, Stream

SOCKET = Path("/run/systemd/journal/socket")
_NOTICE = "5"  # syslog.h: normal, and to be noticed
# An event is a sentence; the journal takes much more.
FIELD_MAX = 4096


class JournalWriter:
    """Sends each event to systemd as a datagram. Never waits: what the journal does not take at
    once is counted in `lost`, and is in the stream all the same.
    """

    def __init__(self, stream: Stream, path: Path = SOCKET) -> None:
        self._stream = stream
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._path = str(path)
        self.lost = 0
        self._leave = stream.listen(self._write)

    def close(self) -> None:
        """No event is written any more."""
        self._leave()
        self._socket.close()

    def _write(self, announced: Announced) -> None:
        try:
            self._socket.sendto(self._datagram(announced), self._path)
        except OSError:
            self.lost += 1

    def _datagram(self, announced: Announced) -> bytes:
        event = announced.event
        return to_datagram(
            {
                "MESSAGE": f"{announced.subject}: {event.message}",
                "PRIORITY": _NOTICE,
                "SYSLOG_IDENTIFIER": "semperd",
                "SEMPERVIRT_EVENT": event.kind,
                "SEMPERVIRT_EVENT_ID": self._stream.id_of(announced),
                "SEMPERVIRT_SUBJECT": announced.subject,
                **{
                    f"SEMPERVIRT_EVIDENCE_{name.upper()}": value
                    for name, value in announced.evidence.items()
                },
            }
        )


def to_datagram(fields: Mapping[str, str]) -> bytes:
    """The fields as the journal takes them: NAME=VALUE, or with the length of a value of several
    lines, so that no value can begin another field.
    """
    parts: list[bytes] = []
    for name, value in fields.items():
        text = value.encode("utf-8", "backslashreplace")[:FIELD_MAX]
        if b"\n" in text:
            parts.append(name.encode() + b"\n" + len(text).to_bytes(8, "little") + text + b"\n")
        else:
            parts.append(name.encode() + b"=" + text + b"\n")
    return b"".join(parts)


@contextmanager
def journal_written() -> Iterator[None]:
    """Writes events to systemd's journal, if that is where our stderr goes as well."""
    if "JOURNAL_STREAM" not in os.environ or not SOCKET.is_socket():
        yield
        return
    writer = JournalWriter(STREAM)
    try:
        yield
    finally:
        writer.close()
