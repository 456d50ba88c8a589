"""The user of one VM (`host.users`): its QEMU runs as it, without capabilities.

    RUN/vm/NAME/        root and the VM's group, 0750    what QEMU connects to, and reads
    RUN/vm/NAME/qN/     root and the VM's group, 1770    what the N-th QEMU makes

The programs of sempervirt itself (backends, ends of moves, mediators) have walls of their own and
stay with the agent's user. Where a VM cannot have a user, it runs as before, and says why.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from sempervirt.core.errors import Unavailable
from sempervirt.host import device_access, lending
from sempervirt.host.landlock import Ground
from sempervirt.host.privileges import SETPRIV, Identity
from sempervirt.host.sockets import check_socket_path
from sempervirt.host.users import UserPool, pool_of
from sempervirt.qemu.accel import AcceleratorKind
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.firmware import vars_path

log = logging.getLogger(__name__)

# A program that says its version takes milliseconds.
ANSWER_S = 5.0
KVM, VHOST_NET, PAGE_FAULTS = Path("/dev/kvm"), Path("/dev/vhost-net"), Path("/dev/userfaultfd")


@dataclass(frozen=True)
class VmUser:
    """Of one VM, as it stands in its record. Without a `number` it is the agent's, and `why` says
    so. `groups` are those of the devices that its QEMU may open.
    """

    number: int | None
    why: str = ""
    groups: tuple[int, ...] = ()

    def identity(self, ground: Ground) -> Identity | None:
        """What its QEMU is started as, with no more than `ground`; None: as the agent."""
        return None if self.number is None else Identity(self.number, self.groups, ground)


def with_users(config: AgentConfig) -> AgentConfig:
    """The same, with the users that the VMs of this agent have. Raises InvalidRequest."""
    return replace(config, users=pool_of(config.state_dir), users_top=config.run_dir)


def why_no_users(config: AgentConfig) -> str:
    """Why the VMs of this host have no users of their own; "" when they have."""
    if isinstance(config.users, str):
        return config.users
    return _unreachable(config)


def user_of(
    config: AgentConfig, spec: VmSpec, qemu: str, accelerator: AcceleratorKind, *, arrives: bool
) -> VmUser:
    """The user that a VM is to have, which is on record from then on. `arrives`: its memory may
    follow after its guest. Raises Unavailable.
    """
    pool = config.users
    if isinstance(pool, str):
        return VmUser(None, pool)
    if why := _unreachable(config):
        return VmUser(None, why)
    if why := _why_none_becomes(shutil.which(SETPRIV)):
        return VmUser(None, why)
    if not lending.all_may_execute(Path(qemu)):
        return VmUser(None, f"{qemu} cannot be executed by another user")
    groups, why = _groups(pool, spec, accelerator, arrives=arrives)
    if why:
        return VmUser(None, why)
    return VmUser(pool.take(config.vm_state_dir(spec.name)), groups=groups)


def _why_none_becomes(setpriv: str | None) -> str:
    """Why that program makes nobody another user; "" when it does. BusyBox has one of that name
    that does not know how.
    """
    if setpriv is None:
        return f"{SETPRIV} (util-linux) is not installed"
    try:
        said = _version(setpriv)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{setpriv} does not answer: {error}"
    return "" if b"util-linux" in said else f"{setpriv} is not the one of util-linux"


@cache
def _version(program: str) -> bytes:
    """What it says; it is asked once. Raises OSError, TimeoutExpired."""
    done = subprocess.run(
        [program, "--version"], capture_output=True, timeout=ANSWER_S, check=False
    )
    return done.stdout


def _unreachable(config: AgentConfig) -> str:
    """Directories of the agent are opened for users that go through; those above are not its."""
    for above in config.users_top.absolute().parents:
        if not lending.all_may_execute(above):
            return f"its run directory cannot be reached by another user: chmod o+x {above}"
    return ""


def _groups(
    pool: UserPool, spec: VmSpec, accelerator: AcceleratorKind, *, arrives: bool
) -> tuple[tuple[int, ...], str]:
    """The groups that its QEMU needs, or why they do not help."""
    wanted = [(KVM, pool.accelerators)] if accelerator == "kvm" else []
    if VHOST_NET.exists() and any(nic.tap is not None for nic in spec.nics):
        wanted.append((VHOST_NET, pool.accelerators))
    if arrives and PAGE_FAULTS.exists():
        wanted.append((PAGE_FAULTS, pool.page_faults))
    elif arrives:
        return (
            (),
            f"there is no {PAGE_FAULTS}, so that postcopy takes a capability (Linux 6.1 has it)",
        )
    for device, group in wanted:
        try:
            device_access.admit(device, group)
        except OSError as error:
            return (), f"{device} cannot be opened to it: {error.strerror}"
    return tuple(sorted({group for _, group in wanted})), ""


def keep_user(config: AgentConfig, user: VmUser) -> None:
    """Returns when the number is on the medium, as it has to be before anything runs as it. Raises
    Unavailable.
    """
    if user.number is None or not isinstance(config.users, UserPool):
        return
    try:
        config.users.keep(user.number)
    except OSError as error:
        raise Unavailable(
            f"user {user.number} cannot be put on record for the VM: {error.strerror}",
            remedy=f"see why {config.users.registry} cannot be written",
        ) from error


def prepare_run_dir(config: AgentConfig, files: VmFiles, spec: VmSpec, user: VmUser) -> VmFiles:
    """Prepares the run directory of a VM that has a user of its own; where its first QEMU makes its
    sockets. Links lead there, until the sockets are put into their places (`launch.wait_started`).

    Raises Unavailable, InvalidRequest when a socket's path would be too long.
    """
    number = user.number
    if number is None:
        return files
    own = files.successor(1)
    for path in own.sockets(spec):
        check_socket_path(path)
    try:
        lending.open_way(files.directory.parent, config.users_top)
        lending.make_passage(files.directory, number)
        make_workplace(files, 1, number)
        for path, made in zip(files.sockets(spec), own.sockets(spec), strict=True):
            path.symlink_to(made.relative_to(files.directory))
    except OSError as error:
        raise Unavailable(
            f"{files.directory} cannot be prepared for user {number}: {error.strerror}",
            remedy="see why; or let VMs have no users: SEMPERVIRT_VM_USERS=off",
        ) from error
    return own


def make_workplace(files: VmFiles, number: int, group: int) -> None:
    """What the QEMU of that number makes files in, and the log of the console, which it opens and
    could not make. Raises OSError.
    """
    lending.make_workplace(files.successor(number).directory, group)
    files.console_log.touch(mode=0o600)
    lending.lend(files.console_log, group)


def renew_run_dir(files: VmFiles, user: VmUser | None, number: int, users_top: Path) -> None:
    """Makes the run directory of a VM that runs, if somebody has removed it, or those above: what
    its QEMU, the one of that number, goes through and makes files in. Raises OSError.
    """
    if user is None or user.number is None:
        files.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        return
    lending.open_way(files.directory.parent, users_top)
    lending.make_passage(files.directory, user.number)
    make_workplace(files, number, user.number)


def release_user(config: AgentConfig, name: str, records: Path, run_dir: Path) -> None:
    """Gives the user of a VM that is off the list back, unless a file of that user may be left."""
    if isinstance(config.users, UserPool):
        try:
            config.users.release(records, (run_dir, vars_path(config, name)))
        except OSError as error:  # it stays that VM's
            log.error("users vm=%s keeps its number: %s", name, error)  # noqa: TRY400
