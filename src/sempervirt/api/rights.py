"""Who may do what: one table, of roles and the operations of the API.

    admin        over the unix socket root and the agent's own user, who may name any file and
                 program; over TLS the same operations, within the bounds of `api.reach`
    operator     goes on with the VMs that are there: pauses, ends, restarts, moves them
    viewer       looks
    host         what a move needs, and standbys on another host, and another certificate of its
                 own name; nothing else
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
    GET_METRICS = "get_metrics"
    GET_HOST = "get_host"
    JOIN = "join"
    RENEW_CERTIFICATE = "renew_certificate"
    LIST_VMS = "list_vms"
    RUN_VM = "run_vm"
    START_VM = "start_vm"
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
    GUARD_DISK = "guard_disk"
    UNGUARD_DISK = "unguard_disk"
    UPGRADE_DISK = "upgrade_disk"
    RESIZE_DISK = "resize_disk"
    RESCUE_DISK = "rescue_disk"
    SNAPSHOT_VM = "snapshot_vm"
    GET_LAYERS = "get_layers"
    MERGE_LAYERS = "merge_layers"
    UNPIN_SNAPSHOT = "unpin_snapshot"
    EXPORT_SNAPSHOT = "export_snapshot"
    LIST_STANDBYS = "list_standbys"
    GET_STANDBY = "get_standby"
    LIST_LOSSES = "list_losses"
    ENABLE_STANDBY = "enable_standby"
    FAILOVER_STANDBY = "failover_standby"
    DISABLE_STANDBY = "disable_standby"
    TEST_STANDBY = "test_standby"
    CANCEL_STANDBY = "cancel_standby"
    KEEP_STANDBY = "keep_standby"
    GET_FIRST = "get_first"
    SNAPSHOT_FIRST = "snapshot_first"
    GIVE_UP_FIRST = "give_up_first"
    END_FIRST = "end_first"
    TAKE_OVER_KEPT = "take_over_kept"
    MOVE_QUEUES = "move_queues"
    GET_MAP = "get_map"
    VERIFY_MAP = "verify_map"
    EXPORT_MAP = "export_map"
    LIST_DEVICES = "list_devices"
    GET_DEVICE = "get_device"
    MIGRATION_SIDE = "migration_side"
    MIGRATION_OBSTACLES = "migration_obstacles"
    MIGRATE_VM = "migrate_vm"
    GET_MIGRATION = "get_migration"
    CANCEL_MIGRATION = "cancel_migration"
    RESOLVE_VM = "resolve_vm"
    PREPARE_ARRIVAL = "prepare_arrival"
    GET_ARRIVAL = "get_arrival"
    PROMISE_ARRIVAL = "promise_arrival"
    REPLAY_DEVICES = "replay_devices"
    RECEIVE_DEVICES = "receive_devices"
    RECOVER_ARRIVAL = "recover_arrival"
    RUN_ARRIVAL = "run_arrival"
    ABORT_ARRIVAL = "abort_arrival"
    LIST_EVENTS = "list_events"
    GET_GUARD = "get_guard"
    LIST_GUARD_EVENTS = "list_guard_events"
    SIMULATE_SIGN = "simulate_sign"
    LIST_PLACES = "list_places"
    SURVEY_HOST = "survey_host"
    GET_CAPACITY = "get_capacity"
    PLAN_EVACUATION = "plan_evacuation"
    EVACUATE_HOST = "evacuate_host"
    GET_EVACUATION = "get_evacuation"
    CANCEL_EVACUATION = "cancel_evacuation"
    RETURN_HOST = "return_host"


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
        case Operation.GET_STANDBY:
            return _LOOK | _MOVE  # the host of the VM shows what another one keeps
        case (
            Operation.GET_HOST
            | Operation.GET_METRICS
            | Operation.LIST_VMS
            | Operation.GET_VM
            | Operation.LIST_DISKS
            | Operation.GET_DISK
            | Operation.LIST_DEVICES
            | Operation.GET_DEVICE
            | Operation.GET_MAP
            | Operation.GET_LAYERS
            | Operation.LIST_STANDBYS
            | Operation.LIST_LOSSES
            | Operation.GET_MIGRATION
            | Operation.LIST_EVENTS
            | Operation.GET_GUARD
            | Operation.LIST_GUARD_EVENTS
            | Operation.GET_EVACUATION
        ):
            return _LOOK
        case (
            Operation.START_VM  # as an admin has described it
            | Operation.PAUSE_VM
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
            | Operation.FAILOVER_STANDBY
            | Operation.TEST_STANDBY
            | Operation.CANCEL_STANDBY
            | Operation.MIGRATION_OBSTACLES  # gives images their ids
            | Operation.MIGRATE_VM
            | Operation.CANCEL_MIGRATION
            | Operation.SIMULATE_SIGN  # may move every VM
            | Operation.LIST_PLACES  # the same
            | Operation.GET_CAPACITY  # the same, on every host
            | Operation.PLAN_EVACUATION  # gives images their ids
            | Operation.EVACUATE_HOST
            | Operation.CANCEL_EVACUATION
            | Operation.RETURN_HOST
        ):
            return _WORK
        case (
            Operation.RUN_VM
            | Operation.FORGET_VM
            | Operation.SAVE_VM
            | Operation.RESTORE_VM
            | Operation.GUARD_DISK
            | Operation.UNGUARD_DISK
            | Operation.RESIZE_DISK
            | Operation.RESCUE_DISK
            | Operation.MERGE_LAYERS  # gives snapshots up for good
            | Operation.UNPIN_SNAPSHOT
            | Operation.EXPORT_SNAPSHOT
            | Operation.ENABLE_STANDBY  # copies disks
            | Operation.DISABLE_STANDBY
            | Operation.RESOLVE_VM
        ):
            return _OWN
        case (
            Operation.RENEW_CERTIFICATE  # its own: that is in the certificate it shows
            | Operation.MIGRATION_SIDE
            | Operation.SURVEY_HOST
            | Operation.PREPARE_ARRIVAL
            | Operation.GET_ARRIVAL
            | Operation.PROMISE_ARRIVAL
            | Operation.REPLAY_DEVICES
            | Operation.RECEIVE_DEVICES
            | Operation.RECOVER_ARRIVAL
            | Operation.RUN_ARRIVAL
            | Operation.ABORT_ARRIVAL
            | Operation.KEEP_STANDBY  # of a VM of its own, by the store
            | Operation.TAKE_OVER_KEPT  # the same
            | Operation.GET_FIRST  # and these of VMs of which the store says that it keeps standbys
            | Operation.SNAPSHOT_FIRST
            | Operation.GIVE_UP_FIRST
            | Operation.END_FIRST
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


async def _caller(request: Request) -> Caller:
    """As `caller_of`, without a thread."""
    return caller_of(request)


CallerHere = Annotated[Caller, Depends(_caller)]


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


def may_still(request: Request, operation: Operation) -> bool:
    """Whether the one who asked may do that now: an answer may outlive the right to have it."""
    now = request.scope["caller_now"]()
    return isinstance(now, Caller) and now.role in roles_for(operation)


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
