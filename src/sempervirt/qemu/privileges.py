"""What QEMU may do on the host beside what its user may."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sempervirt.host.landlock import Access, Ground
from sempervirt.host.storage_call import call_storage
from sempervirt.qemu.spec import VmSpec

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


# Programs and libraries with their data, what the host is, and who knows the names of others.
_READ = (
    *("/bin", "/gnu", "/lib", "/lib32", "/lib64", "/nix", "/opt", "/sbin", "/usr"),
    *("/etc", "/proc", "/sys"),
    *("/run/NetworkManager", "/run/resolvconf", "/run/systemd/resolve"),
)
_DEVICES = ("full", "kvm", "null", "random", "urandom", "userfaultfd", "vhost-net", "zero")


async def ground_of(spec: VmSpec, qemu: str, run_dir: Path, given: Mapping[Path, Path]) -> Ground:
    """What is left to a QEMU with a user of its own, below what that user may: to read programs and
    what the VM file names; to make files in `run_dir`, the agent's; TCP only where QEMU is the
    guest's network. `given` are paths in place of others (`qemu.given`). Raises Unavailable.
    """
    paths = {Path(path): Access.READ for path in _READ}
    paths |= {Path("/dev", name): Access.WRITE for name in _DEVICES}
    # Beside a program that is not installed is what belongs to it.
    beside = (await call_storage(Path(qemu), Path(qemu).resolve)).parent
    paths |= {beside.parent if beside.name == "bin" else beside: Access.READ}
    paths |= {run_dir: Access.MAKE}
    paths |= {path: Access.READ for path in (spec.kernel, spec.initrd, spec.firmware) if path}
    for path in given:  # whose storage may hang
        if await call_storage(path, path.is_symlink):
            paths[await call_storage(path, path.resolve)] = Access.WRITE
    return Ground(paths, tcp=any(nic.type == "user" for nic in spec.nics))
