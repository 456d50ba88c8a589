"""Landlock around a program that is no program of ours, before it is started (landlock(7)).

    create_ruleset({handled_access_fs u64, handled_access_net u64, scoped u64}, size, 0) -> file
    add_rule(file, PATH_BENEATH, {allowed_access u64, parent_fd s32}, 0)
    restrict_self(file, 0)         the calling thread, and what it starts

What is handled and that no rule allows is refused, whatever the program's user may do. Our own
programs raise walls by themselves (`crates/walls`).
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from sempervirt.host.walls import landlock_version

# The same numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PATH_BENEATH = 1
_RULE = struct.Struct("=Qi")

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_FILE, _MAKE_REG, _MAKE_SOCK, _TRUNCATE = 1 << 5, 1 << 8, 1 << 9, 1 << 14
# All there are, by the version that knows them; not the commands of devices (version 5).
_FILES = {1: (1 << 13) - 1, 2: 1 << 13, 3: _TRUNCATE}
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_TCP = 0b11  # to listen, to connect; version 4
_SCOPED = 0b11  # abstract sockets, signals; version 6


class Access(Enum):
    """What is allowed with a file, or with a directory and all that is in it."""

    READ = _EXECUTE | _READ_FILE | _READ_DIR
    WRITE = _READ_FILE | _WRITE_FILE | _TRUNCATE
    MAKE = _READ_FILE | _READ_DIR | _WRITE_FILE | _TRUNCATE | _MAKE_REG | _MAKE_SOCK | _REMOVE_FILE


@dataclass(frozen=True)
class Ground:
    """What is left to a program. What is not there needs no way to it."""

    paths: Mapping[Path, Access] = field(default_factory=dict)
    tcp: bool = False

    def enclose(self) -> None:
        """Holds the calling thread, which gains no privileges any more, and what it starts. Does
        nothing where the kernel has no Landlock. Raises OSError.
        """
        version = landlock_version()
        if version == 0:
            return
        handled = sum(bits for since, bits in _FILES.items() if since <= version)
        tcp = _TCP if version >= 4 and not self.tcp else 0
        words = [handled, tcp, _SCOPED][: 1 if version < 4 else 2 if version < 6 else 3]
        ruleset = _call(_CREATE_RULESET, struct.pack(f"={len(words)}Q", *words), 8 * len(words), 0)
        try:
            for path, access in self.paths.items():
                _allow(ruleset, path, access.value & handled)
            _call(_RESTRICT_SELF, ruleset, 0)
        finally:
            os.close(ruleset)


def _allow(ruleset: int, path: Path, access: int) -> None:
    try:
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(found).st_mode):
            access &= _OF_FILES
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, _RULE.pack(access, found), 0)
    finally:
        os.close(found)


def _call(number: int, *arguments: int | bytes) -> int:
    """Integers and pointers, both as wide as a register. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    wide = (one if isinstance(one, bytes) else ctypes.c_long(one) for one in arguments)
    answer = int(libc.syscall(ctypes.c_long(number), *wide))
    if answer < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return answer
