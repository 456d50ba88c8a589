"""Our own programs, which are installed beside the interpreter."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from sempervirt.core.errors import Unavailable


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
