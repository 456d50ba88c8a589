"""Our own programs, which are installed beside the interpreter."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

from sempervirt.core.errors import Unavailable

_REMEDIES = {
    errno.ENOENT: "check that the program is installed",
    errno.EACCES: "make the file executable, and its file system one without noexec",
    errno.EPERM: "make the file executable, and its file system one without noexec",
    errno.ENOEXEC: "the file is no program for this machine: install it again",
    errno.ETXTBSY: "the file is being written: try again when it is whole",
    errno.EMFILE: "raise the limit of open files (LimitNOFILE= of semperd.service)",
    errno.ENFILE: "raise the host's limit of open files (fs.file-max)",
    errno.EAGAIN: "raise the limit of processes (TasksMax= of semperd.service)",
    errno.ENOMEM: "make memory free on this host",
}


def why_not_started(error: OSError) -> str:
    """What can be done where a program could not be opened or started, as an imperative."""
    number = error.errno or 0
    return _REMEDIES.get(number, f"look up what {errno.errorcode.get(number, number)} means here")


def variable_of(name: str) -> str:
    """What chooses another file for a program: SEMPERVIRT_BLKD for "semper-blkd"."""
    return f"SEMPERVIRT_{name.removeprefix('semper-').upper()}"


def find_program(name: str) -> str:
    """The first of: the variable, beside the interpreter, on the PATH. Raises Unavailable."""
    beside = Path(sys.executable).with_name(name)
    found = os.environ.get(variable_of(name)) or (
        str(beside) if beside.exists() else shutil.which(name)
    )
    if not found:
        raise Unavailable(
            f"{name} is not installed", remedy=f"run make setup, or set {variable_of(name)}"
        )
    return found
