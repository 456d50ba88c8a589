"""The store of one host: a SQLite file. The default; nothing has to be installed.

WAL with full synchronisation: a commit that was acknowledged outlives a killed agent and a lost
host, one that was not is there as a whole or not at all. Several processes of the host may have
the file open (the agent, and `semper host`).

Leases count on the boot clock of this host, and all of them end with its boot.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sqlite3
import stat
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from sempervirt.core.errors import OutcomeUnknown, SempervirtError, Unavailable
from sempervirt.host.procfs import boot_id
from sempervirt.host.records import RecordDamaged, RecordNewer
from sempervirt.store.port import (
    Delete,
    Entry,
    Lease,
    LeaseEnded,
    Put,
    Snapshot,
    Write,
    boot_clock_s,
    check_writes,
    outdated,
)

VERSION = 1
# How long to wait for another process of this host that writes.
BUSY_S = 5.0
# Other processes' commits, and leases that end, are seen this late by a watch.
LOOK_S = 0.25

_SCHEMA = """
CREATE TABLE IF NOT EXISTS revision (revision INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS entries (
    key TEXT PRIMARY KEY, value TEXT NOT NULL, revision INTEGER NOT NULL, lease INTEGER);
CREATE TABLE IF NOT EXISTS leases (
    id INTEGER PRIMARY KEY AUTOINCREMENT, ttl_s REAL NOT NULL, boot TEXT NOT NULL,
    deadline REAL NOT NULL);
INSERT INTO revision SELECT 0 WHERE NOT EXISTS (SELECT * FROM revision);
"""
# No key is empty, or begins with the last character that there is.
_ALL, _LAST = "", "\U0010ffff"
_LIVE = "SELECT id FROM leases WHERE boot = :boot AND deadline > :now"

Result = TypeVar("Result")


class SqliteStore:
    """A `Store` in a file. Made by `open`."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection
        self._lock = asyncio.Lock()

    @classmethod
    def open(cls, path: Path) -> SqliteStore:
        """Opens the file, or makes one that only the present user can read.

        Raises Unavailable, and RecordNewer for a file of a later release.
        """
        with _translated(path):
            _make(path)
            connection = sqlite3.connect(
                path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
            )
        try:
            with _translated(path):
                _prepare(path, connection)
        except BaseException:
            connection.close()
            raise
        return cls(path, connection)

    async def read(self, *parts: str) -> Snapshot:
        """See `Store`."""
        return await self._run(lambda: self._read(parts))

    async def commit(self, writes: Sequence[Write], *, expect: Mapping[str, int]) -> int:
        """See `Store`. OutcomeUnknown only when the medium failed while it was flushed."""
        check_writes(writes, expect)
        return await self._run(lambda: self._commit(writes, expect))

    async def watch(self, *parts: str) -> AsyncGenerator[Snapshot]:
        """See `Store`. Looks four times a second."""
        last = await self.read(*parts)
        yield last
        while True:
            await asyncio.sleep(LOOK_S)
            present = await self.read(*parts)
            if present.entries != last.entries:
                yield present
            last = present

    async def grant(self, ttl_s: float) -> Lease:
        """See `Store`."""
        deadline = boot_clock_s() + ttl_s

        def insert() -> int:
            with self._transaction():
                cursor = self._connection.execute(
                    "INSERT INTO leases (ttl_s, boot, deadline) VALUES (?, ?, ?)",
                    (ttl_s, boot_id(), deadline),
                )
                assert cursor.lastrowid is not None
                return cursor.lastrowid

        return Lease(await self._run(insert), ttl_s, deadline)

    async def renew(self, lease: Lease) -> Lease:
        """See `Store`."""
        deadline = boot_clock_s() + lease.ttl_s

        def update() -> None:
            with self._transaction():
                cursor = self._connection.execute(
                    f"UPDATE leases SET deadline = :deadline WHERE id = :id AND id IN ({_LIVE})",
                    {"deadline": deadline, "id": lease.id, **_now()},
                )
                if cursor.rowcount == 0:
                    raise _lease_ended()

        await self._run(update)
        return Lease(lease.id, lease.ttl_s, deadline)

    async def revoke(self, lease: Lease) -> None:
        """See `Store`."""

        def delete() -> None:
            with self._transaction():
                self._connection.execute("DELETE FROM leases WHERE id = ?", (lease.id,))
                self._sweep()

        await self._run(delete)

    async def close(self) -> None:
        """See `Store`."""
        await self._run(self._connection.close)

    async def _run(self, work: Callable[[], Result]) -> Result:
        """Runs `work` in a thread: never beside other work, and always to the end."""
        async with self._lock:
            task = asyncio.ensure_future(asyncio.to_thread(self._translate, work))
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                await asyncio.wait([task])
                raise

    def _translate(self, work: Callable[[], Result]) -> Result:
        with _translated(self._path):
            return work()

    def _read(self, parts: tuple[str, ...]) -> Snapshot:
        with self._transaction("DEFERRED"):
            row = self._connection.execute("SELECT revision FROM revision").fetchone()
            if row is None or type(row[0]) is not int:
                raise _damaged(self._path, "it has no revision")
            (revision,) = row
            return Snapshot(revision, self._entries(parts or (_ALL,)), parts)

    def _entries(self, parts: Iterable[str]) -> dict[str, Entry]:
        entries = {}
        for part in parts:
            first, end = _range(part)
            rows = self._connection.execute(
                "SELECT key, value, revision FROM entries WHERE key >= :first AND key < :end "
                f"AND (lease IS NULL OR lease IN ({_LIVE})) ORDER BY key",
                {"first": first, "end": end, **_now()},
            )
            for key, value, revision in rows:
                texts = isinstance(key, str) and isinstance(value, str)
                if not (texts and isinstance(revision, int)):
                    raise _damaged(self._path, f"its entry {key!r:.40} is none")
                entries[key] = Entry(value, revision)
        return entries

    def _commit(self, writes: Sequence[Write], expect: Mapping[str, int]) -> int:
        with self._transaction():
            self._sweep()
            present = Snapshot(0, self._entries(expect))
            changed = [key for key, seen in expect.items() if present.revision_of(key) != seen]
            if changed:
                raise outdated(changed)
            (revision,) = self._connection.execute(
                "UPDATE revision SET revision = revision + 1 RETURNING revision"
            ).fetchone()
            for write in writes:
                self._write(write, revision)
        assert isinstance(revision, int)
        return revision

    def _write(self, write: Write, revision: int) -> None:
        match write:
            case Put(key, value, lease):
                if lease is not None and not self._is_live(lease):
                    raise _lease_ended()
                self._connection.execute(
                    "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)",
                    (key, value, revision, lease and lease.id),
                )
            case Delete(key):
                self._connection.execute("DELETE FROM entries WHERE key = ?", (key,))

    def _is_live(self, lease: Lease) -> bool:
        found = self._connection.execute(
            f"SELECT 1 WHERE :id IN ({_LIVE})", {"id": lease.id, **_now()}
        )
        return found.fetchone() is not None

    def _sweep(self) -> None:
        """Removes leases that have ended; nobody has seen their entries since."""
        self._connection.execute(f"DELETE FROM leases WHERE id NOT IN ({_LIVE})", _now())
        self._connection.execute(
            "DELETE FROM entries WHERE lease IS NOT NULL AND lease NOT IN (SELECT id FROM leases)"
        )

    @contextlib.contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        self._connection.execute(f"BEGIN {kind}")
        try:
            yield
        except BaseException:
            self._roll_back()
            raise
        try:
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            if _name(error).startswith("SQLITE_IOERR"):
                raise OutcomeUnknown(
                    f"{self._path} could not be flushed ({error}); the change may be there or not",
                    remedy="look at the medium, then ask again what the state is",
                ) from error
            raise

    def _roll_back(self) -> None:
        if self._connection.in_transaction:  # some errors have done it already
            self._connection.execute("ROLLBACK")


def _prepare(path: Path, connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise RecordNewer(
            f"{path} has version {version}, this program knows {VERSION}",
            remedy="use the release that wrote it",
        )
    connection.execute("PRAGMA synchronous = FULL")
    if version == VERSION:
        return
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")


def _range(part: str) -> tuple[str, str]:
    """The first key that may be of a part, and the first one after it."""
    if part == _ALL:
        return part, _LAST
    return part, part[:-1] + "0" if part.endswith("/") else part + "\0"


def _now() -> dict[str, str | float]:
    return {"boot": boot_id(), "now": boot_clock_s()}


def _lease_ended() -> LeaseEnded:
    return LeaseEnded("the lease has ended", remedy="grant another one")


def _name(error: sqlite3.Error) -> str:
    return getattr(error, "sqlite_errorname", "")


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """SQLite's errors as ours; all of them mean that nothing was done."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise _translation(path, error) from error
    except UnicodeDecodeError as error:  # of a name that the damaged file itself tells
        raise _damaged(path, error) from error


def _damaged(path: Path, why: object) -> RecordDamaged:
    remedy = "move it away and restore it from a backup"
    return RecordDamaged(f"{path} is damaged: {why}", remedy=remedy)


def _make(path: Path) -> None:
    """Makes the file unless it is there. A link is not followed: it may lead anywhere.

    An existing file is not opened: to close it again would end the locks of other connections.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.close(os.open(path, flags, 0o600))
        return
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no regular file")


def _translation(path: Path, error: sqlite3.Error | OSError) -> SempervirtError:
    name = _name(error) if isinstance(error, sqlite3.Error) else ""
    if name == "SQLITE_FULL":
        message = f"no space is left for {path}; nothing was changed"
        return Unavailable(message, remedy=f"make room in {path.parent}, then try again")
    if name.startswith("SQLITE_BUSY"):
        message = f"another process has kept {path} locked for {BUSY_S:g} s"
        return Unavailable(message, remedy="end it, or try again")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return _damaged(path, error)
    return Unavailable(
        f"cannot use {path}: {error}", remedy="check the directory, its permissions and its medium"
    )
