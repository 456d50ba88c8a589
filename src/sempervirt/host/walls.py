"""What this kernel has of the walls around our programs (docs/design/walls.md)."""

from __future__ import annotations

import ctypes
from pathlib import Path

# landlock_create_ruleset(2); the same number on every architecture.
_CREATE_RULESET = 444
_VERSION = 1  # LANDLOCK_CREATE_RULESET_VERSION
# What Landlock does not refuse before a version, as in crates/walls/src/landing.rs.
_SINCE = {
    3: "truncating files by path",
    4: "ports of TCP",
    5: "the commands of devices",
    6: "signals and abstract sockets",
}
_SECCOMP_ACTIONS = Path("/proc/sys/kernel/seccomp/actions_avail")


def landlock_version() -> int:
    """The version of the kernel's Landlock; 0 where there is none."""
    libc = ctypes.CDLL(None)
    libc.syscall.restype = ctypes.c_long
    found: int = libc.syscall(
        ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION)
    )
    return max(found, 0)


def missing_walls(landlock: int, seccomp: bool, no_users: str, no_groups: str) -> list[str]:
    """What the programs of a VM have to do without here, each as a phrase; empty when they have
    every wall that there is. `landlock` is a version as of `landlock_version`, `no_users` why VMs
    have no users of their own, `no_groups` what they are not limited in; "" when nothing is.
    """
    missing = []
    if landlock == 0:
        missing.append("Landlock: not in this kernel (CONFIG_SECURITY_LANDLOCK, lsm=landlock)")
    else:
        missing += [
            f"Landlock {landlock} does not refuse {what} (since {version})"
            for version, what in _SINCE.items()
            if landlock < version
        ]
    if not seccomp:
        missing.append("seccomp: not in this kernel")
    if no_users:
        missing.append(f"a user for each VM: {no_users}")
    if no_groups:
        missing.append(f"limits for each VM: {no_groups}")
    return missing


def walls_missing_here(no_users: str, no_groups: str) -> list[str]:
    """As `missing_walls`, of this host."""
    return missing_walls(landlock_version(), _SECCOMP_ACTIONS.exists(), no_users, no_groups)
