"""On which machine, with which software, figures were seen."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from sempervirt.disk.backend import Blkd


def load_average() -> float:
    """Runnable tasks, the mean of the last minute."""
    return round(os.getloadavg()[0], 2)


def fingerprint(blkd: str | None) -> dict[str, str]:
    """What a reader needs to judge the figures; a thing that cannot be found is `unknown`."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _in_file("/proc/cpuinfo", r"model name\s*:\s*(.+)"),
        "processors": str(os.cpu_count()),
        "hypervisor": _hypervisor(),
        "memory_mib": str(_memory_mib()),
        "kernel": platform.release(),
        "qemu": _first_line(["qemu-storage-daemon", "--version"]),
        "semper_blkd": _first_line([blkd, "--version"]) if blkd else "unknown",
        "commit": _commit(),
    }


def _memory_mib() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def _hypervisor() -> str:
    if not re.search(r"\bhypervisor\b", _text("/proc/cpuinfo")):
        return "none"
    vendor = _first_line(["systemd-detect-virt", "--vm"])
    return vendor if vendor != "unknown" else "yes"


def _commit() -> str:
    commit = _first_line(["git", "rev-parse", "--short=12", "HEAD"])
    changed = _first_line(["git", "status", "--porcelain", "--untracked-files=no"])
    return commit if changed == "unknown" else f"{commit} with changes"


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _in_file(path: str, pattern: str) -> str:
    found = re.search(pattern, _text(path))
    return found[1].strip() if found else "unknown"


def _first_line(command: list[str]) -> str:
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
    except OSError:
        return "unknown"
    lines = result.stdout.strip().splitlines()
    return lines[0] if lines else "unknown"


def fleet_fingerprint() -> dict[str, str]:
    """The same for a run in which the agent starts the semper-blkd that is installed."""
    return fingerprint(Blkd().binary())
