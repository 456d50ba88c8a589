"""Who may do what: one table, of roles and the operations of the API.

    admin        over the unix socket root and the agent's own user, who may name any file and
                 program; over TLS the same operations, within the bounds of `api.reach`
    operator     goes on with the VMs that are there: pauses, ends, restarts, moves them
    viewer       looks
    host         what a move needs, and another certificate of its own name; nothing else
    invitation   joins

An operation is a route, by its name. A route that is not in the table cannot be served
(`require_complete`), and an operation without an answer in `roles_for` is an error of types.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Annotated, assert_never

from fastapi import APIRouter, Depends, Request
from fastapi.routing import APIRoute

from sempervirt.api.reach import Caller
from sempervirt.core.errors import NotAllowed
from sempervirt.core.roles import Role


class Operation(Enum):
    """Every operation of the API: the names of the routes."""

    GET_AGENT = "get_agent"
    GET_HOST = "get_host"
    JOIN = "join"
    RENEW_CERTIFICATE = "renew_certificate"
    LIST_VMS = "list_vms"
    RUN_VM = "run_vm"
    GET_VM = "get_vm"
    FORGET_VM = "forget_vm"
    PAUSE_VM = "pause_vm"
    RESUME_VM = "resume_vm"
    STOP_VM = "stop_vm"
    KILL_VM = "kill_vm"
    RESTART_QEMU = "restart_qemu"
    SAVE_VM = "save_vm"
    RESTORE_VM = "restore_vm"
    GET_VM_LOG = "get_vm_log"
    LIST_DISKS = "list_disks"
    GET_DISK = "get_disk"
    UPGRADE_DISK = "upgrade_disk"
    RESIZE_DISK = "resize_disk"
    RESCUE_DISK = "rescue_disk"
    SNAPSHOT_VM = "snapshot_vm"
    GET_LAYERS = "get_layers"
    MERGE_LAYERS = "merge_layers"
    UNPIN_SNAPSHOT = "unpin_snapshot"
    EXPORT_SNAPSHOT = "export_snapshot"
    MOVE_QUEUES = "move_queues"
    GET_MAP = "get_map"
    VERIFY_MAP = "verify_map"
    EXPORT_MAP = "export_map"
    MIGRATION_SIDE = "migration_side"
    MIGRATION_OBSTACLES = "migration_obstacles"
    MIGRATE_VM = "migrate_vm"
    GET_MIGRATION = "get_migration"
    CANCEL_MIGRATION = "cancel_migration"
    RESOLVE_VM = "resolve_vm"
    PREPARE_ARRIVAL = "prepare_arrival"
    GET_ARRIVAL = "get_arrival"
    PROMISE_ARRIVAL = "promise_arrival"
    RECOVER_ARRIVAL = "recover_arrival"
    RUN_ARRIVAL = "run_arrival"
    ABORT_ARRIVAL = "abort_arrival"


_LOOK = frozenset({Role.VIEWER, Role.OPERATOR, Role.ADMIN})
_WORK = frozenset({Role.OPERATOR, Role.ADMIN})
_OWN = frozenset({Role.ADMIN})
_MOVE = frozenset({Role.HOST})
_JOIN = frozenset({Role.INVITATION})


def roles_for(operation: Operation) -> frozenset[Role]:
    """The roles that may do it."""
    match operation:
        case Operation.GET_AGENT:
            return _LOOK | _MOVE  # which version the other host has
        case (
            Operation.GET_HOST
            | Operation.LIST_VMS
            | Operation.GET_VM
            | Operation.LIST_DISKS
            | Operation.GET_DISK
            | Operation.GET_MAP
            | Operation.GET_LAYERS
            | Operation.GET_MIGRATION
        ):
            return _LOOK
        case (
            Operation.PAUSE_VM
            | Operation.RESUME_VM
            | Operation.STOP_VM
            | Operation.KILL_VM
            | Operation.RESTART_QEMU
            | Operation.GET_VM_LOG  # a guest's console may show what is not for everybody
            | Operation.UPGRADE_DISK
            | Operation.MOVE_QUEUES
            | Operation.VERIFY_MAP
            | Operation.EXPORT_MAP
            | Operation.SNAPSHOT_VM
            | Operation.MIGRATION_OBSTACLES  # gives images their ids
            | Operation.MIGRATE_VM
            | Operation.CANCEL_MIGRATION
        ):
            return _WORK
        case (
            Operation.RUN_VM
            | Operation.FORGET_VM
            | Operation.SAVE_VM
            | Operation.RESTORE_VM
            | Operation.RESIZE_DISK
            | Operation.RESCUE_DISK
            | Operation.MERGE_LAYERS  # gives snapshots up for good
            | Operation.UNPIN_SNAPSHOT
            | Operation.EXPORT_SNAPSHOT
            | Operation.RESOLVE_VM
        ):
            return _OWN
        case (
            Operation.RENEW_CERTIFICATE  # its own: that is in the certificate it shows
            | Operation.MIGRATION_SIDE
            | Operation.PREPARE_ARRIVAL
            | Operation.GET_ARRIVAL
            | Operation.PROMISE_ARRIVAL
            | Operation.RECOVER_ARRIVAL
            | Operation.RUN_ARRIVAL
            | Operation.ABORT_ARRIVAL
        ):
            return _MOVE
        case Operation.JOIN:
            return _JOIN
        case _:
            assert_never(operation)


def caller_of(request: Request) -> Caller:
    """Who asks. Raises NotAllowed for a request of which that is not known."""
    caller = request.scope.get("caller")
    if not isinstance(caller, Caller):
        raise NotAllowed("it is not known who asks")
    return caller


CallerHere = Annotated[Caller, Depends(caller_of)]


async def require_right(request: Request) -> None:
    """Raises NotAllowed unless the one who asks may do what the route of the request does."""
    caller, operation = caller_of(request), Operation(request.scope["route"].name)
    allowed = roles_for(operation)
    if caller.role in allowed:
        return
    if caller.role is Role.INVITATION:
        raise NotAllowed("an invitation is good for joining, and for nothing else")
    who = ", ".join(role.value for role in Role if role in allowed)
    raise NotAllowed(
        f"{caller.name} has the role {caller.role.value}, and {operation.value} is for: {who}",
        remedy="ask as one who has that role, or as root on the host itself",
    )


def require_complete(routers: Iterable[APIRouter]) -> None:
    """Raises ValueError unless the routes of `routers` are the operations, each once."""
    names = [
        route.name if isinstance(route, APIRoute) else repr(route)
        for router in routers
        for route in router.routes
    ]
    if sorted(names) != sorted(operation.value for operation in Operation):
        differing = {*names} ^ {operation.value for operation in Operation}
        raise ValueError(f"routes and operations differ: {differing or 'a name stands twice'}")
