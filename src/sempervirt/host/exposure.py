"""Who else than its owner may open a file for reading: by its mode, and the directories above.

Whoever may read an image may hold a lock on it: the kernel asks for no more, and neither our locks
nor QEMU's can be had beside some of those (`crates/block/src/lock.rs`).
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path

ACCESS_LIST = "system.posix_acl_access"


def readers(path: Path) -> list[str]:
    """In words, those who may, beside root and the owner; [] when nobody else may, or when the file
    is not there. A list for access counts as one that lets somebody in.
    """
    try:
        found = path.resolve(strict=True)
        info, above = found.stat(), [(one, one.stat()) for one in found.parents]
    except OSError:
        return []
    listed = {one for one, _ in above if _has_list(one)}
    mode = info.st_mode
    words = []
    if mode & stat.S_IROTH and all(s.st_mode & stat.S_IXOTH or d in listed for d, s in above):
        words.append("everybody")
    if _has_list(found):
        words.append("those in its access list (getfacl)")
    elif mode & stat.S_IRGRP and "everybody" not in words:
        group, members = _group(info.st_gid, info.st_uid)
        within = all(
            s.st_mode & stat.S_IXOTH
            or (s.st_mode & stat.S_IXGRP and s.st_gid == info.st_gid)
            or d in listed
            for d, s in above
        )
        if members and within:
            words.append(f"the group {group} ({', '.join(members)})")
    return words


def finding(image: Path, who: list[str]) -> str:
    """What it means that those may read an image that a VM writes, and what to do."""
    return (
        f"{' and '.join(who)} may read it, and whoever reads it may lock it: no backend takes it "
        f"over then, and the VM does not start again; chmod o-r,g-r {image}; or close a directory "
        "above it"
    )


def _has_list(path: Path) -> bool:
    try:
        os.getxattr(path, ACCESS_LIST)
    except OSError:  # none, or a file system without
        return False
    return True


def _group(gid: int, owner: int) -> tuple[str, list[str]]:
    """The name of a group, and who is in it beside root and `owner`."""
    try:
        found = grp.getgrgid(gid)
        name, members = found.gr_name, set(found.gr_mem)
    except KeyError:
        name, members = str(gid), set()
    for user in pwd.getpwall():
        if user.pw_gid == gid:
            members.add(user.pw_name)
        if user.pw_uid in {0, owner}:
            members.discard(user.pw_name)
    return name, sorted(members)
