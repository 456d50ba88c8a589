"""Devices that the users of VMs may open: a group is put into a device's access list (acl(5)).

    a_version                                     u32, 2
    entries: a_tag u16, a_perm u16, a_id u32      in ascending order of tag and id

As logind does it for whoever sits at the machine: the device's owner, group and mode stay. The list
lasts until the host is started anew.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from functools import reduce
from operator import or_
from pathlib import Path

from sempervirt.host.exposure import ACCESS_LIST

_VERSION = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_MASKED = (_USER, _GROUP_OBJ, _GROUP)
_NOBODY = 0xFFFF_FFFF
_READ_WRITE = 6


def admit(device: Path, group: int) -> None:
    """Lets those in `group` read and write a device. Raises OSError."""
    mode = device.stat().st_mode
    if mode & (stat.S_IROTH | stat.S_IWOTH) == stat.S_IROTH | stat.S_IWOTH:
        return
    entries = _entries(device, mode)
    if entries.get((_GROUP, group), 0) & _READ_WRITE == _READ_WRITE:
        return
    entries[_GROUP, group] = _READ_WRITE
    masked = (may for (tag, _), may in entries.items() if tag in _MASKED)
    entries[_MASK, _NOBODY] = reduce(or_, masked)
    packed = b"".join(_ENTRY.pack(tag, entries[tag, who], who) for tag, who in sorted(entries))
    os.setxattr(device, ACCESS_LIST, _VERSION + packed)


def _entries(device: Path, mode: int) -> dict[tuple[int, int], int]:
    """The permissions that are in effect, by tag and id: of the device's list, or of its mode."""
    try:
        held = os.getxattr(device, ACCESS_LIST)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return {
            (_USER_OBJ, _NOBODY): mode >> 6 & 7,
            (_GROUP_OBJ, _NOBODY): mode >> 3 & 7,
            (_OTHER, _NOBODY): mode & 7,
        }
    found = {(tag, who): may for tag, may, who in _ENTRY.iter_unpack(held[len(_VERSION) :])}
    mask = found.pop((_MASK, _NOBODY), 7)
    return {(tag, who): may & mask if tag in _MASKED else may for (tag, who), may in found.items()}
