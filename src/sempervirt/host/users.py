"""A user of its own for each VM: a number that nobody else on the host has, in no list of users.

    STATE/users/2013265937        holds the path of the VM's records: whose number it is

The number is written down, on the medium, before anything runs as it, and stays the VM's until the
VM is taken off the list and no process or file of the number is left. Group and user have one
number. The first numbers of the range are groups of devices: who is in one may open that device.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.host.confinement import confinement_of
from sempervirt.host.procfs import PROC
from sempervirt.host.records import flush_directory, make_directory, read_file

log = logging.getLogger(__name__)

VARIABLE = "SEMPERVIRT_VM_USERS"
OFF = "off"
# What nobody else gives away: systemd's own numbers end below and begin above (its UIDS-GIDS), as
# do those that SSSD makes of Active Directory's (up to 2000200000) and those of containers.
FIRST, COUNT = 0x7800_0000, 1 << 24
# At the beginning of a range, for groups of devices.
_GROUPS = 16
_TRIES = 64
# Of a path (PATH_MAX of the kernel).
_OWNER_MAX_BYTES = 4096
# To give files away, to use what another user has made, to become another user with nothing, to end
# what runs as one, and to reach the memory and the taps of its QEMU (/proc/PID/fd, pidfd_getfd).
_NEEDED = ("chown", "dac_override", "kill", "setgid", "setuid", "setpcap", "sys_ptrace")


@dataclass(frozen=True)
class UserPool:
    """The numbers from `first` on, `count` of them, and the directory that says whose they are."""

    registry: Path
    first: int = FIRST
    count: int = COUNT

    @property
    def accelerators(self) -> int:
        """The group of those who may use KVM, and vhost for networks."""
        return self.first

    @property
    def page_faults(self) -> int:
        """The group of those who may take page faults (userfaultfd)."""
        return self.first + 1

    def take(self, owner: Path) -> int:
        """The number of the VM whose records are at `owner`; a new one if it has none yet.

        `keep` puts it on the medium. Raises Unavailable when that cannot be written down, or no
        number is free.
        """
        try:
            if (known := self.number_of(owner)) is not None:
                return known
            make_directory(self.registry, 0o700)
            many = self.count - _GROUPS
            begin = secrets.randbelow(many)
            # From there on one after the other, so that the last free one is found as well.
            for step in range(min(many, len(self._taken()) + _TRIES)):
                number = self.first + _GROUPS + (begin + step) % many
                if not has_processes(number) and self._note(number, owner):
                    return number
        except OSError as error:
            raise Unavailable(
                f"no user can be put on record for the VM: {self.registry}: {error.strerror}",
                remedy="make room there, or see why it cannot be written",
            ) from error
        raise Unavailable(
            f"no user is free for the VM between {self.first} and {self.first + self.count - 1}",
            remedy=f"choose a larger range, by {VARIABLE}",
        )

    def keep(self, number: int) -> None:
        """Returns when it is the VM's whatever happens to the host. Raises OSError."""
        note = os.open(self.registry / str(number), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(note)
        finally:
            os.close(note)
        flush_directory(self.registry)

    def number_of(self, owner: Path) -> int | None:
        """The number of the VM whose records are at `owner`, if it has one. Raises OSError."""
        return next((number for number, whose in self._taken() if whose == owner), None)

    def release(self, owner: Path, files: Iterable[Path]) -> None:
        """Gives the number of a VM back, unless a process of it lives, or one of `files`, which it
        may have owned, is left. Raises OSError.
        """
        number = self.number_of(owner)
        if number is None or has_processes(number) or any(map(os.path.lexists, files)):
            return
        (self.registry / str(number)).unlink(missing_ok=True)

    def _taken(self) -> list[tuple[int, Path]]:
        try:
            notes = [note for note in self.registry.iterdir() if note.name.isdecimal()]
        except FileNotFoundError:
            return []
        taken = []
        for note in notes:
            try:
                owner = read_file(note, _OWNER_MAX_BYTES)
            except FileNotFoundError:  # given back meanwhile
                continue
            except OSError as error:  # whose it is nobody knows: it is not given away
                log.warning("users %s cannot be read: %s", note, error.strerror)
                owner = b""
            taken.append((int(note.name), Path(os.fsdecode(owner))))
        return taken

    def _note(self, number: int, owner: Path) -> bool:
        """Whether the number was free: it is `owner`'s then."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            note = os.open(self.registry / str(number), flags, 0o600)
        except FileExistsError:
            return False
        try:
            os.write(note, os.fsencode(owner))
        except OSError:  # of nobody, it would be taken for ever
            (self.registry / str(number)).unlink()
            raise
        finally:
            os.close(note)
        return True


def has_processes(number: int) -> bool:
    """Whether a process of that user lives, in this pid namespace."""
    try:
        os.getpriority(os.PRIO_USER, number)
    except ProcessLookupError:
        return False
    return True


def pool_of(state_dir: Path, environment: Mapping[str, str] = os.environ) -> UserPool | str:
    """The users of this host's VMs, or why its VMs have none. Raises InvalidRequest for a setting
    that is none.
    """
    chosen = environment.get(VARIABLE, "")
    if os.geteuid() != 0:
        return "the agent is not root"
    if chosen == OFF:
        return f"{VARIABLE}={OFF}"
    own = confinement_of(os.getpid())
    lacking = [name for name in _NEEDED if own is None or name not in own.capabilities]
    if lacking:
        return f"the agent has no {' and no '.join(lacking)} (CapabilityBoundingSet= of its unit)"
    pool = UserPool(state_dir / "users", *_range(chosen))
    last = pool.first + pool.count - 1
    for kind in ("uid", "gid"):
        if not _is_mapped((PROC / f"self/{kind}_map").read_text(), pool.first, last):
            return (
                f"this user name space has no {pool.first} to {last} (/proc/self/{kind}_map); name "
                f"others by {VARIABLE}"
            )
    return pool


def _is_mapped(text: str, first: int, last: int) -> bool:
    """Whether one line of a map of users (user_namespaces(7)) has all these numbers."""
    lines = (tuple(map(int, line.split())) for line in text.splitlines())
    return any(begin <= first and last < begin + many for begin, _, many in lines)


def _range(chosen: str) -> tuple[int, int]:
    if not chosen:
        return FIRST, COUNT
    first, _, count = chosen.partition(":")
    if first.isdigit() and count.isdigit():
        begin, many = int(first), int(count)
        if begin >= 1 << 16 and many > _GROUPS and begin + many < 1 << 31:
            return begin, many
    raise InvalidRequest(
        f'{VARIABLE} is "{chosen}"',
        remedy=f"FIRST:COUNT, of numbers that nobody has ({FIRST}:{COUNT} by itself), or {OFF}",
    )
