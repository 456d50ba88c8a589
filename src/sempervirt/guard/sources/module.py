"""/dev/semper_guard: what the module has put off, and what it is told.

One line of JSON for each event, of less than 1,024 bytes, with a version "v":

    {"v":1,"seq":0,"incident":0,"lost":0,"ns":…,"kind":"panic","verdict":"park","reason":…,"tgid":790,
     "owner":0,"comm":"CPU 1/KVM","message":"Fatal exception",…}

The whole list of members is in docs/design/guard.md. `v` grows when a member changes its meaning;
such a line is unreadable to us, and a sign of its own. Further members are ignored.
"""

from __future__ import annotations

import os
import platform
import select
import stat
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sempervirt.guard.signs import Sign, SignId, one_line
from sempervirt.guard.sources.source import AbsentError

DEVICE = Path("/dev/semper_guard")
PARAMETERS = Path("/sys/module/semper_guard/parameters")
# What the module itself would refuse; see `unsupported` in kernel/semper_guard/main.c.
TRIED = ("6.1", "6.12")
VERSION = 1
LINE_BYTES_MAX = 1024
# At one look: a storm is told in parts, so that the first of them is heard at once.
LINES_MAX = 64
PID_MAX = 1 << 22


class ModuleCommand(Enum):
    """What the module can be told."""

    EVACUATED = "evacuated"
    """The VMs are out: the panic that was put off happens now, or the shutdown goes on."""
    ALLOW = "allow"
    """Nothing is put off from now on."""


class ModuleEvent(BaseModel):
    """One line of the device, as far as it is used here."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    v: int
    seq: int = Field(ge=0)
    lost: int = Field(ge=0)
    ns: int = Field(ge=0, lt=1 << 63)
    kind: str = Field(max_length=40)
    verdict: str = Field(max_length=40)
    reason: str = Field(max_length=40)
    context: str = Field(max_length=40)
    cpu: int
    pid: int = Field(ge=0, le=PID_MAX)
    tgid: int = Field(ge=0, le=PID_MAX)
    owner: int = Field(ge=0, le=PID_MAX)
    comm: str = Field(max_length=64)
    message: str = Field(max_length=LINE_BYTES_MAX)


# These leave a thread behind that never runs again.
PARKED = ("park", "redirect")


def read_line(line: bytes) -> Sign:
    """The sign that a line of the device tells. A line without a meaning is a sign as well."""
    try:
        event = ModuleEvent.model_validate_json(line[:LINE_BYTES_MAX])
        kind = SignId(f"module.{event.kind}")
    except (ValidationError, ValueError, RecursionError) as error:
        return Sign(SignId.MODULE_UNREADABLE, one_line(f"{_why(error)}: {_shown(line)}"))
    if event.v != VERSION:
        said = f"an event of version {event.v}, and this agent knows {VERSION}: {_shown(line)}"
        return Sign(SignId.MODULE_UNREADABLE, one_line(said))
    lost = f"; {event.lost} events before it are lost" if event.lost else ""
    evidence = (
        f"event {event.seq}: {event.kind} in {event.context} on cpu {event.cpu} by "
        f"{event.comm}[{event.pid}], {event.verdict} ({event.reason}): {event.message}{lost}"
    )
    broken = (event.tgid, event.owner) if event.verdict in PARKED else ()
    seen = tuple(pid for pid in broken if pid > 1)
    return Sign(kind, one_line(evidence), broken=seen, ns=event.ns)


def _why(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
    return str(error)


def _shown(line: bytes) -> str:
    return line[:120].decode(errors="replace")


def unsupported(release: str) -> str:
    """Why there is no module for a kernel, "" if there is one. Pure."""
    if ".".join(release.split(".")[:2]) in TRIED:
        return ""
    return f"there is no module for kernel {release}, only for {' and '.join(TRIED)}"


class ModuleDevice:
    """The device as a source. It comes and goes with the module."""

    name = "module"
    interval_s = 0.0

    def __init__(self, path: Path = DEVICE) -> None:
        self._path = path
        self._file: int | None = None

    def look(self, patience_s: float) -> Sequence[Sign]:
        """Waits for an event. Raises AbsentError while the module is not loaded, OSError."""
        file = self._open()
        waiting = select.poll()
        waiting.register(file, select.POLLIN)
        if not waiting.poll(patience_s * 1000):
            if not self._path.exists():
                # The module was unloaded and its name removed: only a new file has new events.
                self.close()
            return ()
        signs: list[Sign] = []
        try:
            while len(signs) < LINES_MAX:
                signs += [self._read(file)]
        except BlockingIOError:
            return signs
        except OSError:
            self.close()
            raise
        return signs

    def _read(self, file: int) -> Sign:
        line = os.read(file, LINE_BYTES_MAX)
        if not line:
            raise OSError("the device has no more events")
        return read_line(line)

    def _open(self) -> int:
        if self._file is not None:
            return self._file
        try:
            file = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            why = unsupported(platform.release())
            said = f"the module is not loaded: {why or 'semper guard install'}"
            raise AbsentError(said) from error
        except OSError as error:
            raise AbsentError(f"{self._path} cannot be opened: {error.strerror}") from error
        if not stat.S_ISCHR(os.fstat(file).st_mode):
            os.close(file)
            raise AbsentError(f"{self._path} is not the module's device")
        self._file = file
        return file

    def close(self) -> None:
        """Closes the device."""
        if self._file is not None:
            with suppress(OSError):
                os.close(self._file)
            self._file = None


def tell(command: ModuleCommand, path: Path = DEVICE) -> None:
    """Tells the module something; does not return when the panic that was put off happens now.

    Raises OSError.
    """
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(file, command.value.encode())
    finally:
        os.close(file)


def parameters(folder: Path = PARAMETERS) -> dict[str, str]:
    """The module's parameters as they are in force; none while it is not loaded."""
    found = {}
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            found[path.name] = path.read_text(errors="replace").strip()[:80]
    return found
