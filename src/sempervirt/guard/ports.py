"""What the guard reaches the world by; `adapters` and the agent have the real ones, tests
others.
"""

from __future__ import annotations

from typing import Protocol

from sempervirt.guard.presets import ModulePolicy
from sempervirt.guard.sources.module import ModuleCommand
from sempervirt.guard.state import BeginEvacuation, EvacuationEnded


class Evacuator(Protocol):
    """Moves the VMs of this host."""

    async def evacuate(self, order: BeginEvacuation) -> EvacuationEnded:
        """Returns when the outcome of every VM is known, soon after the order's deadline at the
        latest. What fails is in the answer; nothing is raised.
        """


class Module(Protocol):
    """The module, as far as it is told something."""

    async def tell(self, command: ModuleCommand) -> None:
        """Does not return when the host dies of it. Raises OSError: it is not loaded, or
        refuses.
        """

    async def load(self, policy: ModulePolicy) -> None:
        """Raises SempervirtError, whose text says what is missing."""


class Heard(Protocol):
    """Which events of the module were dealt with in this boot, also by agents before this one."""

    ns: int

    def keep(self, ns: int) -> None:
        """All up to that time. What fails is in the log: the next agent deals with them again."""


class Shutdown(Protocol):
    """The lock that holds an orderly shutdown, for `limit_s` at most; None: there is none."""

    limit_s: float | None

    def release(self) -> None:
        """The shutdown goes on. Never waits, and does nothing when none is held."""
