"""The file that a copy of a disk becomes: there when it is whole, and never over another one."""

from __future__ import annotations

import os
from pathlib import Path

from sempervirt.core.errors import InvalidRequest, StateConflict
from sempervirt.host.records import flush_directory


def require_free(target: Path) -> None:
    """Raises InvalidRequest when there is no directory for it, StateConflict when it is there."""
    if not target.parent.is_dir():
        raise InvalidRequest(f"there is no directory {target.parent}", remedy="make it first")
    if os.path.lexists(target):
        raise there_already(target)


def put_in_place(partial: Path, target: Path) -> None:
    """Gives a file that was flushed its name, unless something has that name by now, and flushes
    the name. `partial` may be there afterwards. Raises StateConflict, OSError.
    """
    try:
        target.hardlink_to(partial)
    except FileExistsError as error:
        raise there_already(target) from error
    except OSError:  # a file system without hard links
        partial.rename(target)
    flush_directory(target.parent)


def there_already(target: Path) -> StateConflict:
    """Nothing is overwritten."""
    return StateConflict(
        f"{target} is there already, and nothing is overwritten", remedy="name another path"
    )
