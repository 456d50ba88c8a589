"""Puts VM descriptions, directories and programs together."""

from __future__ import annotations

from dataclasses import replace

from sempervirt.agent.config import AgentConfig
from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.disk.backend import DiskOptions
from sempervirt.disk.running import DiskFiles
from sempervirt.disk.setup import DiskSetup
from sempervirt.disk.volume import Volume, inspect
from sempervirt.host.sockets import check_socket_path
from sempervirt.vm.spec import DiskSpec, VmSpec


def prepare_directories(config: AgentConfig) -> None:
    """Makes the state and run directories, for the owner only. Raises Unavailable."""
    for directory in (config.state_dir, config.run_dir):
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise Unavailable(
                f"cannot make {directory}: {error.strerror}",
                remedy="choose others by SEMPERVIRT_STATE_DIR and SEMPERVIRT_RUN_DIR",
            ) from error


def disk_setup(
    config: AgentConfig, spec: VmSpec, disk: DiskSpec, *, adopted: bool = False
) -> DiskSetup:
    """How a disk is served. Raises InvalidRequest when its image cannot be.

    The image of an adopted disk is not judged again: its guest runs already.
    """
    command = config.backend
    files = DiskFiles(config.vm_run_dir(spec.name), disk.name)
    check_socket_path(files.control(10**9))
    return DiskSetup(
        name=f"{spec.name}/{disk.name}",
        volume=_volume(disk, adopted=adopted),
        options=DiskOptions(
            image=disk.image,
            read_only=disk.read_only,
            queues=disk.queues,
            engine=disk.engine,
            direct=disk.direct,
            block_size=disk.block_size,
            serial=disk.serial,
        ),
        command=command,
        policy=replace(config.policy, standby=config.policy.standby and command.has_standby),
        files=files,
        record=config.vm_state_dir(spec.name) / f"disk-{disk.name}.json",
    )


def _volume(disk: DiskSpec, *, adopted: bool) -> Volume | None:
    try:
        return inspect(disk.image, read_only=disk.read_only)
    except InvalidRequest:
        if adopted:
            return None
        raise
