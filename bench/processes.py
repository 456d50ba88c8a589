"""What the kernel says that a process uses."""

import re
import time
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Footprint:
    """What one process holds. Memory in KiB, shared pages counted by their share (PSS).

    `anonymous` is its own alone; `file` is programs and libraries; `shared` is guest memory,
    in-flight regions and mapped images on tmpfs, as far as it has touched them.
    """

    anonymous: float
    file: float
    shared: float
    threads: int
    descriptors: int

    @property
    def pss(self) -> float:
        """All of its memory."""
        return self.anonymous + self.file + self.shared


def footprint(pid: int) -> Footprint:
    """What process `pid` holds now. Raises OSError if it is gone."""
    place = PROC / str(pid)
    text = (place / "smaps_rollup").read_text()
    sizes = {name: float(size) for name, size in re.findall(r"Pss_(\w+): +(\d+) kB", text)}
    return Footprint(
        anonymous=sizes["Anon"],
        file=sizes["File"],
        shared=sizes["Shmem"],
        threads=len(list((place / "task").iterdir())),
        descriptors=len(list((place / "fd").iterdir())),
    )


def processor_ns(pid: int) -> int:
    """Processor time of all threads of `pid` since it began, from its own clock.

    Raises OSError if it is gone.
    """
    # clock_getcpuclockid(3) of another process: the inverted number, and 2 for "scheduled".
    return time.clock_gettime_ns((~pid << 3) | 2)
