"""Records that other programs keep: rasdaemon's database, and what disks say of themselves."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from sempervirt.guard.signs import Sign, SignId, one_line
from sempervirt.guard.sources.source import AbsentError

RASDAEMON = Path("/var/lib/rasdaemon/ras-mc_event.db")
BLOCK = Path("/sys/block")
RASDAEMON_EVERY_S = 10.0
SMART_EVERY_S = 900.0
ROWS_MAX = 64
DISKS_MAX = 64
# Tables of rasdaemon (ras-record.c), and the columns that tell most.
TABLES = {
    "mc_event": (SignId.RASDAEMON_MEMORY, ("err_type", "err_msg", "label")),
    "mce_record": (SignId.RASDAEMON_MACHINE_CHECK, ("bank_name", "error_msg", "mcistatus_msg")),
    "aer_event": (SignId.RASDAEMON_PCI, ("dev_name", "err_type", "err_msg")),
    "disk_errors": (SignId.RASDAEMON_DISK, ("dev", "error")),
}


class Rasdaemon:
    """New rows in rasdaemon's database, which is opened read-only, and anew at each look."""

    name = "rasdaemon"
    interval_s = RASDAEMON_EVERY_S

    def __init__(self, path: Path = RASDAEMON) -> None:
        self._path = path
        self._last: dict[str, int] | None = None

    def look(self, patience_s: float) -> Sequence[Sign]:
        """Raises AbsentError, OSError."""
        if not self._path.is_file():
            raise AbsentError("rasdaemon is not there")
        try:
            address = f"{self._path.absolute().as_uri()}?mode=ro"
            with closing(sqlite3.connect(address, uri=True, timeout=patience_s)) as database:
                return self._news(database)
        except sqlite3.Error as error:
            raise OSError(f"{self._path}: {error}") from error

    def _news(self, database: sqlite3.Connection) -> Sequence[Sign]:
        present = {row[0] for row in database.execute("SELECT name FROM sqlite_master LIMIT 256")}
        signs, last = [], {}
        for table, (identifier, columns) in TABLES.items():
            if table not in present:
                continue
            newest = database.execute(f"SELECT max(id) FROM {table}").fetchone()[0]
            last[table] = newest if isinstance(newest, int) else 0
            if self._last is None:
                continue
            before = self._last.get(table, 0)
            rows = database.execute(
                f"SELECT {', '.join(columns)} FROM {table} WHERE id > ? ORDER BY id LIMIT ?",
                (before, ROWS_MAX),
            ).fetchall()
            signs += [
                Sign(identifier, one_line(f"{table}: {', '.join(map(str, row))}")) for row in rows
            ]
        self._last = last
        return signs

    def close(self) -> None:
        """Nothing is open."""


class Smart:
    """What disks say of themselves, by smartctl. `run` runs a command and gives its output.

    smartctl is a program that is started, so it is asked rarely, and only while the host is well.
    """

    name = "SMART"
    interval_s = SMART_EVERY_S

    def __init__(
        self, run: Callable[[Sequence[str]], str], find: Callable[[], str | None],
        block: Path = BLOCK,
    ) -> None:  # fmt: skip
        self._run = run
        self._find = find
        self._block = block
        self._bad: frozenset[str] = frozenset()

    def look(self, patience_s: float) -> Sequence[Sign]:
        """Raises AbsentError, OSError."""
        del patience_s
        program = self._find()
        if program is None:
            raise AbsentError("smartctl is not installed (Debian: smartmontools)")
        disks = sorted(
            path.name
            for path in self._block.iterdir()
            if re.fullmatch(r"sd[a-z]{1,3}|nvme\d+n\d+", path.name)
        )[:DISKS_MAX]
        if not disks:
            raise AbsentError("no disk of this host could have SMART")
        signs, bad, refused = [], set(), list[str]()
        for disk in disks:
            # Status bits of smartctl are about the disk; what it says stands in its output.
            output = self._run([program, "--json", "-H", "-A", f"/dev/{disk}"])
            refused += smart_refused(output)
            problem = smart_problem(output)
            if problem:
                bad.add(disk)
                if disk not in self._bad:
                    signs.append(Sign(SignId.STORAGE_SMART, one_line(f"{disk}: {problem}")))
        self._bad = frozenset(bad)
        if len(refused) == len(disks):
            raise AbsentError(one_line(f"smartctl can ask no disk: {refused[0]}"))
        return signs

    def close(self) -> None:
        """Nothing is open."""


def smart_refused(output: str) -> list[str]:
    """Why smartctl could not ask a disk, from its JSON; nothing if it could. Raises ValueError."""
    match _said(output):
        # Bit 0: the command line is wrong; bit 1: the device was not opened, or refuses (exit
        # status in smartctl(8)).
        case {"smartctl": {"exit_status": int(status)} as about} if status & 3:
            match about.get("messages"):
                case [{"string": str(why)}, *_]:
                    return [why]
                case _:
                    return [f"it ends with status {status}"]
        case _:
            return []


def smart_problem(output: str) -> str:
    """What is wrong with a disk, from the JSON of smartctl; "" if nothing, or if that is not known.

    Raises ValueError for what is no JSON.
    """
    said = _said(output)
    match said.get("smart_status"):
        case {"passed": False}:
            return "SMART says that it is failing"
        case _:  # passed, or a disk without SMART
            pass
    match said.get("nvme_smart_health_information_log"):
        case {"critical_warning": int(warning)} if warning:
            return f"NVMe critical warning {warning:#x}"
        case _:  # no warning, or no NVMe
            return ""


def _said(output: str) -> dict[str, Any]:
    try:
        said = json.loads(output)
    except RecursionError as error:
        raise ValueError("smartctl's answer is nested too deeply") from error
    return said if isinstance(said, dict) else {}
