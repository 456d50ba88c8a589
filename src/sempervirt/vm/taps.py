"""The taps of VMs that this host has lost: they leave their bridges, and go back when the VM comes
here again.

Which bridge a tap was taken from stands in the run directory, for taps do not outlive a boot
either. A tap that somebody has made a port of a bridge meanwhile is left as it is.
"""

from __future__ import annotations

import logging
from pathlib import Path

from sempervirt.host import tap as taps
from sempervirt.host.records import RecordDamaged, read_record, remove_record, write_record
from sempervirt.qemu.spec import VmSpec

log = logging.getLogger(__name__)

_VERSION = 1


def leave_bridges(run_dir: Path, spec: VmSpec) -> list[str]:
    """Takes the VM's taps from their bridges; returns what was done, a sentence for each. In the
    caller's own thread, and so in the caller's network namespace.
    """
    said = []
    for nic in spec.nics:
        if nic.tap is None:
            continue
        try:
            bridge = taps.bridge_of(nic.tap)
            if bridge is None:
                continue
            _write(run_dir, {**_read(run_dir), nic.tap: bridge})
            taps.leave(nic.tap, bridge)
        except OSError as error:
            said.append(f"tap {nic.tap} stays on its bridge: {error.strerror}")
            continue
        text = f"tap {nic.tap} was taken from the bridge {bridge}, until the VM comes here again"
        said.append(text)
    return said


def return_to_bridges(run_dir: Path, spec: VmSpec) -> list[str]:
    """Puts those of the VM's taps back that `leave_bridges` took away; returns what was done."""
    said, before = [], _read(run_dir)
    left = dict(before)
    for nic in spec.nics:
        if nic.tap is None or (bridge := left.pop(nic.tap, None)) is None:
            continue
        try:
            if taps.bridge_of(nic.tap) is not None:
                continue
            taps.join(nic.tap, bridge)
        except OSError as error:
            remedy = f"ip link set {nic.tap} master BRIDGE"
            text = f"tap {nic.tap} is on no bridge, and not on {bridge} again: {error.strerror}"
            said.append(f"{text}; add it: {remedy}")
            continue
        said.append(f"tap {nic.tap} is on the bridge {bridge} again")
    if left != before:
        _write(run_dir, left)
    return said


def _path(run_dir: Path) -> Path:
    return run_dir / "taps.json"


def _read(run_dir: Path) -> dict[str, str]:
    try:
        record = read_record(_path(run_dir), _VERSION) or {}
    except RecordDamaged as error:
        log.error("taps %s", error)  # noqa: TRY400
        return {}
    left = record.get("left")
    if not isinstance(left, dict):
        return {}
    return {tap: bridge for tap, bridge in left.items() if isinstance(bridge, str)}


def _write(run_dir: Path, left: dict[str, str]) -> None:
    """The tap leaves its bridge in any case: two guests on one address are worse than none."""
    try:
        if left:
            write_record(_path(run_dir), _VERSION, {"left": left})
        else:
            remove_record(_path(run_dir))
    except OSError as error:
        log.warning("taps path=%s not written: %s", _path(run_dir), error.strerror)
