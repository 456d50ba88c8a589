"""What QEMU may do on the host beside what its user may."""

from __future__ import annotations

from pathlib import Path

# Since Linux 6.1; QEMU 8.0 and later open it.
_USERFAULTFD = Path("/dev/userfaultfd")


def capabilities() -> tuple[str, ...]:
    """Names of the capabilities that each QEMU is started with, if the agent has them:

    ```text
    dac_override  a kernel, a firmware or a disc that belongs to another user
    net_admin     a tap that QEMU opens by its name
    sys_ptrace    faults of memory that is still to come (postcopy), without /dev/userfaultfd
    ```
    """
    needed = ("dac_override", "net_admin")
    return needed if _USERFAULTFD.exists() else (*needed, "sys_ptrace")
