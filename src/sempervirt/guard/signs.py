"""Signs that a host may die: their identifiers, and one sign as a value.

An identifier is what presets name: the source, a dot, what was seen. `module.*` come from
/dev/semper_guard, where the kernel's own death was put off; all others are seen without the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

EVIDENCE_CHARACTERS = 300


class SignId(Enum):
    """Every sign that a preset can give a meaning to."""

    MODULE_PANIC = "module.panic"
    MODULE_OUT_OF_MEMORY = "module.out-of-memory"
    MODULE_SOFT_LOCKUP = "module.soft-lockup"
    MODULE_HARD_LOCKUP = "module.hard-lockup"
    MODULE_NMI_PANIC = "module.nmi-panic"
    MODULE_WARNING = "module.warning"
    MODULE_CRASH_KEXEC = "module.crash-kexec"
    MODULE_RESTART = "module.restart"
    MODULE_UNREADABLE = "module.unreadable"
    LOG_OOPS = "log.oops"
    LOG_WARNING = "log.warning"
    LOG_SOFT_LOCKUP = "log.soft-lockup"
    LOG_HARD_LOCKUP = "log.hard-lockup"
    LOG_HUNG_TASK = "log.hung-task"
    LOG_RCU_STALL = "log.rcu-stall"
    LOG_MACHINE_CHECK = "log.machine-check"
    LOG_NMI = "log.nmi"
    LOG_PCI_ERROR = "log.pci-error"
    LOG_STORAGE_ERROR = "log.storage-error"
    LOG_FILE_SYSTEM = "log.file-system"
    LOG_OUT_OF_MEMORY = "log.out-of-memory"
    LOG_THERMAL = "log.thermal"
    LOG_WATCHDOG = "log.watchdog-pretimeout"
    COUNTER_OOPS = "counter.oops"
    COUNTER_WARNING = "counter.warning"
    COUNTER_MACHINE_CHECK = "counter.machine-check"
    TAINT_DIED = "taint.died"
    TAINT_MACHINE_CHECK = "taint.machine-check"
    TAINT_BAD_PAGE = "taint.bad-page"
    TAINT_SOFT_LOCKUP = "taint.soft-lockup"
    MEMORY_CORRECTED = "memory.corrected"
    MEMORY_UNCORRECTED = "memory.uncorrected"
    RASDAEMON_MEMORY = "rasdaemon.memory"
    RASDAEMON_MACHINE_CHECK = "rasdaemon.machine-check"
    RASDAEMON_PCI = "rasdaemon.pci"
    RASDAEMON_DISK = "rasdaemon.disk"
    PRESSURE_MEMORY = "pressure.memory"
    PRESSURE_IO = "pressure.io"
    PRESSURE_CPU = "pressure.cpu"
    THERMAL_HOT = "thermal.hot"
    THERMAL_CRITICAL = "thermal.critical"
    STORAGE_SMART = "storage.smart"
    HOST_SHUTDOWN = "host.shutdown"

    @property
    def of_module(self) -> bool:
        """Whether the module tells it."""
        return self.value.startswith("module.")


@dataclass(frozen=True)
class Sign:
    """Something that was seen once, or `count` times at once.

    `evidence` is one line of printable text: what was seen, in the words of who saw it. `broken`
    are the processes (thread groups) of which a thread will never run again: their VMs cannot be
    moved. `ns`: when the module has seen it, in nanoseconds since the boot; 0 for all other signs.
    """

    id: SignId
    evidence: str
    count: int = 1
    broken: tuple[int, ...] = ()
    simulated: bool = False
    ns: int = 0


def one_line(text: str) -> str:
    """`text` as evidence: printable, in one line, and not too long."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    shown = " ".join(shown.split())
    if len(shown) <= EVIDENCE_CHARACTERS:
        return shown
    return shown[: EVIDENCE_CHARACTERS - 1] + "…"
