"""The variables of a UEFI firmware: each VM has a file of its own, STATE/firmware/NAME.fd.

A VM file names the firmware's code and a template of its variables (Debian's package ovmf has
both). The template is copied at the VM's first start; the guest's firmware keeps its boot entries
and keys in the copy from then on. QEMU holds the contents in the guest's memory as well, writes
what changes through to the file, and after a load of a state the whole: so a VM that moves, or is
restored or cloned, brings its variables along, and the file of the new QEMU is only a place.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import stat
from pathlib import Path

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.host.records import flush_directory, make_directory
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.config import AgentConfig

# QEMU's own limit for the firmware of a PC is 8 MiB.
LARGEST_BYTES = 8 << 20


def vars_path(config: AgentConfig, name: str) -> Path:
    """Where the variables of a VM are."""
    return config.state_dir / "firmware" / f"{name}.fd"


def prepare_vars(config: AgentConfig, spec: VmSpec, files: VmFiles) -> None:
    """Makes the VM's own file from the template that `spec` names, unless it is there, and a way to
    it for QEMU.

    Raises InvalidRequest for a template that is none, or a file that does not fit it; Unavailable.
    """
    template = spec.firmware_vars
    assert template is not None
    own = vars_path(config, spec.name)
    size_bytes = _size_of(template)
    try:
        if own.exists():
            _check_size(own, template, size_bytes)
        else:
            _copy(template, own)
        files.vars.unlink(missing_ok=True)
        files.vars.symlink_to(own)
    except OSError as error:
        raise Unavailable(
            f"the variables of VM {spec.name}'s firmware cannot be kept in {own}: {error.strerror}",
            remedy=f"look at {own.parent}",
        ) from error


def remove_vars(config: AgentConfig, name: str) -> None:
    """Removes the file of a VM that is taken off the list, if there is one."""
    with contextlib.suppress(OSError):
        vars_path(config, name).unlink()


def _size_of(template: Path) -> int:
    try:
        told = template.stat()
        if not stat.S_ISREG(told.st_mode) or not 0 < told.st_size <= LARGEST_BYTES:
            raise InvalidRequest(
                f"{template} is not a file of at most 8 MiB with the variables of a firmware",
                remedy="name for example /usr/share/OVMF/OVMF_VARS_4M.fd (Debian's package ovmf)",
            )
    except OSError as error:
        raise InvalidRequest(
            f"the firmware's variables {template} cannot be read: {error.strerror}",
            remedy="correct firmware_vars; Debian's are in the package ovmf, in /usr/share/OVMF",
        ) from error
    return told.st_size


def _check_size(own: Path, template: Path, size_bytes: int) -> None:
    there = own.stat().st_size
    if there == size_bytes:
        return
    backup = own.with_suffix(".old")
    raise InvalidRequest(
        f"the VM's own variables {own} have {there} bytes and their template {template} has "
        f"{size_bytes}: they belong to another firmware",
        remedy="name the firmware that the VM had; or, to begin with new variables: mv -n "
        f"{shlex.quote(str(own))} {shlex.quote(str(backup))}",
    )


def _copy(template: Path, own: Path) -> None:
    make_directory(own.parent, 0o700)
    scratch = own.with_suffix(f".{os.getpid()}")
    try:
        shutil.copyfile(template, scratch)
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.chmod(0o600)
        scratch.replace(own)
    finally:
        scratch.unlink(missing_ok=True)
    flush_directory(own.parent)
