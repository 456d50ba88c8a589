"""Names of VMs and disks, and suggestions for one that was mistyped."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Short: a name is part of unix socket paths, which the kernel limits to 107 bytes.
NAME_MAX = 40
_NAME = re.compile(rf"[a-z0-9](?:[a-z0-9._-]{{0,{NAME_MAX - 1}}})", re.IGNORECASE)


def check_name(name: str) -> str:
    """`name`, if a VM or a disk can be called so. Raises ValueError with the rule otherwise."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f'"{name}" is not a name; use at most {NAME_MAX} letters, digits, ".", "_" or "-", '
            "and begin with a letter or a digit"
        )
    return name


def is_name(name: str) -> bool:
    """Whether a VM or a disk can be called so."""
    return _NAME.fullmatch(name) is not None


def split_disk_name(name: str) -> tuple[str, str]:
    """("web", "root") of "web/root". Raises ValueError when it has not two parts."""
    vm, slash, disk = name.partition("/")
    if not slash or not vm or not disk or "/" in disk:
        raise ValueError(f'"{name}" does not name a disk; write VM/DISK, for example web/root')
    return vm, disk


def suggest(name: str, known: Iterable[str]) -> str:
    """`did you mean "…"?` for the known name nearest to `name`, or an empty string."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f'did you mean "{nearest[0]}"?' if nearest else ""
