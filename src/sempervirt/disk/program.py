"""Backend programs that stay startable while a disk needs them.

A package upgrade replaces or removes the file that a running backend was started from. What
is at the path then has not been tried, and must not become this disk's backend by accident,
least of all when one has just died. So the file is held open: while it is still what the path
leads to, it is started by its path, and afterwards through the open descriptor.

A program is named by a token: its path, "#", and the file's inode.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable

from sempervirt.core.errors import Unavailable
from sempervirt.host.programs import why_not_started


def path_of(token: str) -> str:
    """The path that a token was made from."""
    return token.rpartition("#")[0] or token


def is_installed(token: str, path: str) -> bool:
    """Whether the file at `path` is that program."""
    try:
        return token.rpartition("#")[2] == _inode(os.stat(path))  # noqa: PTH116
    except OSError:
        return False


class Programs:
    """The programs that one disk holds."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}

    def hold(self, path: str, *, opened_from: str | None = None) -> str:
        """Holds the program at `path` and returns its token.

        `opened_from` is another place where the file can be opened, as /proc/PID/exe. Raises
        Unavailable when the file cannot be opened.
        """
        found = shutil.which(path) or path
        try:
            descriptor = os.open(opened_from or found, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            text = f"cannot open the program {opened_from or found}: {error.strerror}"
            raise Unavailable(text, remedy=why_not_started(error)) from error
        token = f"{found}#{_inode(os.fstat(descriptor))}"
        if token in self._held:
            os.close(descriptor)
        else:
            self._held[token] = descriptor
        return token

    def hold_if_there(self, path: str, *, opened_from: str | None = None) -> str:
        """As `hold`; a program that cannot be opened now is started by its path, if ever."""
        try:
            return self.hold(path, opened_from=opened_from)
        except Unavailable:
            return f"{path}#"

    def executable(self, token: str) -> tuple[str, tuple[int, ...]]:
        """The path to execute, and the descriptors that the child needs to have for that."""
        path, descriptor = path_of(token), self._held.get(token)
        if descriptor is None or is_installed(token, path):
            return path, ()
        return f"/proc/self/fd/{descriptor}", (descriptor,)

    def keep_only(self, tokens: Iterable[str]) -> None:
        """Closes the files of all other programs."""
        for token in set(self._held) - set(tokens):
            os.close(self._held.pop(token))


def _inode(status: os.stat_result) -> str:
    return f"{status.st_dev:x}:{status.st_ino:x}"
