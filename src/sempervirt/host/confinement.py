"""What holds a process back, as the kernel tells it (proc_pid_status(5), capabilities(7)).

Landlock is not among it: the kernel shows nobody which rules a process has.
"""

from __future__ import annotations

import pwd
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from sempervirt.host.groups import is_of_a_vm
from sempervirt.host.procfs import PROC

# By number, from 0 (include/uapi/linux/capability.h).
CAPABILITIES = [
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
]


class Seccomp(Enum):
    """Which system calls a process may make; the kernel's numbers are the places in this order."""

    ANY = "any"
    FOUR = "four"
    FILTERED = "filtered"


@dataclass(frozen=True)
class Confinement:
    """What one process may do. `capabilities` are those in effect, `obtainable` those that it can
    still get by executing a program, which `new_privileges` allows.
    """

    user: str
    capabilities: tuple[str, ...]
    obtainable: tuple[str, ...]
    new_privileges: bool
    system_calls: Seccomp
    own_network: bool
    limited: bool

    @property
    def findings(self) -> list[str]:
        """What would be more than a process of a VM needs, if it were taken over."""
        found = []
        if self.user == "root":
            found.append("it is root")
        if self.capabilities:
            found.append(f"it has {_counted(self.capabilities)}")
        if self.new_privileges:
            found.append("it may gain privileges by executing a program")
        if self.system_calls is Seccomp.ANY:
            found.append("every system call is open to it")
        if not self.own_network:
            found.append("it has the host's network")
        if not self.limited:
            found.append("it may take all processors and memory (it is in no group of a VM)")
        return found


def confinement_of(pid: int) -> Confinement | None:
    """What holds `pid` back; None when it is gone. Raises PermissionError: it is not for this user
    to know.
    """
    try:
        status = dict(_lines((PROC / str(pid) / "status").read_text()))
        network = (PROC / str(pid) / "ns/net").readlink()
        groups = (PROC / str(pid) / "cgroup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Confinement(
        user=_user(int(status["Uid"].split()[1])),
        capabilities=_names(status["CapEff"]),
        obtainable=_names(status["CapBnd"]),
        new_privileges=status["NoNewPrivs"] == "0",
        system_calls=list(Seccomp)[int(status["Seccomp"])],
        own_network=network != (PROC / "self/ns/net").readlink(),
        limited=any(map(is_of_a_vm, groups)),
    )


def _lines(text: str) -> list[tuple[str, str]]:
    pairs = (line.partition(":") for line in text.splitlines())
    return [(name, value.strip()) for name, _, value in pairs]


def _names(mask: str) -> tuple[str, ...]:
    bits = int(mask, 16)
    known = [name for number, name in enumerate(CAPABILITIES) if bits >> number & 1]
    later = range(len(CAPABILITIES), bits.bit_length())
    return (*known, *(str(number) for number in later if bits >> number & 1))


def _user(uid: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


def _counted(capabilities: tuple[str, ...]) -> str:
    if len(capabilities) <= 3:
        return " and ".join(capabilities)
    return f"{len(capabilities)} capabilities"
