"""Leaving a cluster: this host's side. What it had is put aside, not deleted."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from sempervirt.cluster.cluster import Cluster, forget, read_settings
from sempervirt.core.errors import StateConflict, Unavailable
from sempervirt.host.places import Places
from sempervirt.trust.authority import Authority

# All that a cluster leaves in the state directory; the settings go first.
KEPT = ("cluster.json", "trust", "store.db", "store.db-wal", "store.db-shm")


@dataclass(frozen=True)
class Left:
    """The cluster that was left, as whom, and where what it had is now."""

    cluster: str
    host: str
    aside: Path


async def leave_cluster(config: Places, *, force: bool) -> Left:
    """Makes this host one of no cluster; also one of which `host init` has failed midway. To be
    called with the agent's lock held.

    Raises StateConflict while VMs are on record here, and, without `force`, while this host has the
    authority that other hosts need; Unavailable, without `force`, when the store does not say
    whether there are any. Raises RecordDamaged for settings that cannot be read.
    """
    settings = read_settings(config)
    # What is left after an init, or a leaving, that failed midway.
    remains = [name for name in KEPT if (config.state_dir / name).exists()]
    if settings is None and not remains:
        raise StateConflict(
            "this host belongs to no cluster, so there is nothing to leave",
            remedy="begin one: semper host init NAME; or join one: semper host join",
        )
    _require_no_vms(config)
    if settings is not None and Authority.is_in(config.trust_dir) and not force:
        await _require_alone(config, settings.host)
    forget(config)
    aside = config.state_dir / f"left-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    try:
        aside.mkdir(mode=0o700)
        for name in KEPT:
            path = config.state_dir / name
            if path.exists():
                path.rename(aside / name)
        _flush(config.state_dir)
    except OSError as error:
        raise Unavailable(
            f"what belongs to the cluster cannot be put aside: {error}", remedy="repeat the command"
        ) from error
    if settings is None:
        return Left("", "", aside)
    return Left(settings.cluster, settings.host, aside)


def _require_no_vms(config: Places) -> None:
    """The store says whose each VM is: one that is on record would belong to nobody."""
    names = sorted({path.parent.name for path in config.vm_records()})
    if names:
        raise StateConflict(
            f"VMs are on record here: {', '.join(names[:10])}",
            remedy="move them away, or end them and take them off the list: semper vm remove NAME; "
            "standbys: semper standby disable NAME",
        )


async def _require_alone(config: Places, host: str) -> None:
    try:
        async with Cluster.opened(config) as cluster:
            members = await cluster.members()
    except Unavailable as error:
        raise Unavailable(
            f"the store does not say whether other hosts need this one: {error.message}",
            remedy="leave all the same: --force",
        ) from error
    others = [
        member.host.name for member in members if member.host.name != host and not member.revoked
    ]
    if others:
        raise StateConflict(
            f"this host has the authority that renews the certificates of {', '.join(others)}",
            remedy="those leave first, or are revoked; or give the cluster up: --force",
        )


def _flush(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
