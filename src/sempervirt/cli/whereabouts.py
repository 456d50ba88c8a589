"""Where a VM is during and after a migration: in one sentence, and as the end of a command.

Each function names all phases, so that mypy refuses a phase that nobody has a word for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from sempervirt.core.errors import OutcomeUnknown, StateConflict, StateLost, Unavailable

if TYPE_CHECKING:
    from sempervirt.api.schemas import VmView
    from sempervirt.migration.messages import MigrationView


def sentence(view: MigrationView) -> str:
    """Where the VM is now, and what is waited for."""
    from sempervirt.vm.phases import Phase

    source, destination = view.source, view.destination
    match view.phase:
        case Phase.PREPARE:
            return f"{destination} prepares for the VM, which runs on {source}"
        case Phase.PRECOPY:
            return f"the VM runs on {source}, which sends its memory to {destination}"
        case Phase.SWITCHOVER:
            return f"the guest stands still until {destination} has everything"
        case Phase.COMMIT:
            return f"the guest stands still until the store has given the VM to {destination}"
        case Phase.POSTCOPY:
            return (
                f"the VM runs on {destination}, and part of its memory is still on {source}: until "
                "all has arrived, the loss of either host loses the VM"
            )
        case Phase.DONE:
            return f"the VM has moved to {destination}"
        case Phase.ABANDONED:
            return f"the VM stays on {source}: {view.why}"
        case Phase.UNKNOWN:
            return (
                f"nothing runs the VM, because whether {source} or {destination} owns it is not "
                f"known: {view.why}"
            )
        case Phase.LOST:
            return (
                f"the VM is lost, because part of its memory was on each host ({view.why}); what "
                f"is left are its disks, and {destination} owns them"
            )
        case _:
            assert_never(view.phase)


def why(view: VmView) -> str:
    """Why a VM is in its state, for a column: what a migration has made of it says the most."""
    from sempervirt.vm.phases import Phase

    migration = view.migration
    if migration is None:
        return view.why
    match migration.phase:
        case Phase.PREPARE | Phase.PRECOPY:
            return view.why or f"moves to {migration.destination}"
        case Phase.POSTCOPY | Phase.LOST:
            return sentence(migration)
        case Phase.SWITCHOVER | Phase.COMMIT | Phase.UNKNOWN | Phase.DONE | Phase.ABANDONED:
            return view.why
        case _:
            assert_never(migration.phase)


def judge(view: MigrationView) -> None:
    """Ends a command that asked for a migration.

    Raises Unavailable when the VM stays, OutcomeUnknown when nobody knows who owns the VM, and
    StateLost when nobody has it any more. A migration that still goes on is no failure.
    """
    from sempervirt.vm.phases import Phase

    vm, source, destination = view.vm, view.source, view.destination
    match view.phase:
        case Phase.DONE:
            return
        case Phase.PREPARE | Phase.PRECOPY | Phase.SWITCHOVER | Phase.COMMIT | Phase.POSTCOPY:
            return
        case Phase.ABANDONED:
            raise Unavailable(f"VM {vm} stays on {source}: {view.why}")
        case Phase.UNKNOWN:
            raise OutcomeUnknown(
                f"whether {destination} owns VM {vm} is not known, and nothing runs it: {view.why}",
                remedy="the hosts settle it when the store answers again; "
                f"see: semper vm show {vm}; if a host is gone for good: semper vm resolve {vm}",
            )
        case Phase.LOST:
            raise StateLost(
                f"VM {vm} is lost: part of its memory was on {source} and part on {destination} "
                f"({view.why})",
                remedy="what is left are its disks, as after a power failure, and "
                f"{destination} owns them; there: semper vm kill {vm}, then semper vm run FILE",
            )
        case _:
            assert_never(view.phase)


def judge_cancelled(view: MigrationView) -> None:
    """Ends a command that asked for the VM to stay.

    Raises StateConflict when that came too late, otherwise as `judge`.
    """
    from sempervirt.vm.phases import Phase

    vm, destination = view.vm, view.destination
    match view.phase:
        case Phase.ABANDONED:
            return
        case Phase.DONE | Phase.POSTCOPY:
            raise StateConflict(
                f"it was too late to cancel: {sentence(view)}",
                remedy=f"to have it back, on {destination}: "
                f"semper vm migrate {vm} --to {view.source}",
            )
        case Phase.UNKNOWN | Phase.LOST:
            judge(view)
        case Phase.PREPARE | Phase.PRECOPY | Phase.SWITCHOVER | Phase.COMMIT:
            raise OutcomeUnknown(
                f"VM {vm} was asked to stay, and has not settled yet: {sentence(view)}",
                remedy=f"see where it is: semper vm show {vm}",
            )
        case _:
            assert_never(view.phase)
