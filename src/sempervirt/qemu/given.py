"""What a QEMU with a user of its own gets by descriptor, as it may not open it by its path.

A kernel, an initial RAM disk or a firmware that not everybody may read is given as a copy in
memory. The variables of the firmware are a file of the agent's, which is given to the user. The
image of a disk that QEMU itself serves is opened here, and so is a tap, which takes CAP_NET_ADMIN.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sempervirt.core.errors import Unavailable
from sempervirt.core.queue_map import DevicePlan
from sempervirt.host import tap
from sempervirt.host.lending import all_may_read
from sempervirt.qemu.command_line import FDSET, nic_id
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.spec import VmSpec


@dataclass
class Given:
    """Descriptors that QEMU inherits; `paths` are what it opens in the place of others, `taps` the
    files of the networks, by position. To be closed when it has been started.
    """

    paths: dict[Path, Path] = field(default_factory=dict)
    taps: dict[int, list[int]] = field(default_factory=dict)
    descriptors: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Closes ours."""
        while self.descriptors:
            os.close(self.descriptors.pop())

    def _give(self, path: Path, descriptor: int, places: str = "/proc/self/fd") -> None:
        self.descriptors.append(descriptor)
        self.paths[path] = Path(places, str(descriptor))


def give_files(spec: VmSpec, files: VmFiles, user: int) -> Given:
    """What `spec` names and that user cannot open. Touches storage. Raises Unavailable."""
    given = Given()
    path = files.vars
    try:
        if spec.firmware_vars is not None:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            given._give(path, descriptor)
            os.fchown(descriptor, user, user)
        for path in filter(None, (spec.kernel, spec.initrd, spec.firmware)):
            if not all_may_read(path):
                given._give(path, _copy(path))
        for disk in spec.disks:
            path = disk.image
            if disk.backend == "qemu" and path not in given.paths:
                flags = os.O_RDONLY if disk.read_only else os.O_RDWR
                flags |= os.O_DIRECT if disk.direct else 0
                given._give(path, os.open(path, flags | os.O_CLOEXEC), FDSET)
    except OSError as error:
        given.close()
        raise Unavailable(f"{path} cannot be given to QEMU: {error.strerror}") from error
    return given


def give_taps(given: Given, spec: VmSpec, plans: Mapping[str, DevicePlan]) -> None:
    """Adds the taps; the caller closes `given` also when this raises Unavailable."""
    for index, nic in enumerate(spec.nics):
        if nic.tap is None:
            continue
        pairs = plans[nic_id(index)].binding.queues
        like = tap.ORDINARY | (tap.MULTI_QUEUE if pairs > 1 else 0)
        given.taps[index] = []
        try:
            for _ in range(pairs):
                file = tap.open_file()
                given.descriptors.append(file)
                tap.serve(file, nic.tap, like)
                given.taps[index].append(file)
        except OSError as error:
            raise Unavailable(
                f"the tap {nic.tap} cannot be opened: {error.strerror}",
                remedy="does another program have it? The agent needs CAP_NET_ADMIN for it",
            ) from error


def _copy(path: Path) -> int:
    """A descriptor of memory with what the file holds; everybody who gets it may read it."""
    memory = os.memfd_create(path.name[:200], os.MFD_CLOEXEC)
    try:
        with path.open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            done = 0
            while done < size and (sent := os.sendfile(memory, source.fileno(), done, size - done)):
                done += sent
    except OSError:
        os.close(memory)
        raise
    return memory
