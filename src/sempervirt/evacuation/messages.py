"""An evacuation as the API takes it and tells of it; the command line prints the same."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from enum import Enum

from pydantic import BaseModel, Field

from sempervirt.evacuation.capacity import Capacity
from sempervirt.evacuation.placement import Places
from sempervirt.evacuation.plan import Absent, Left, Plan
from sempervirt.evacuation.values import (
    CONCURRENCY,
    CONCURRENCY_MAX,
    DEADLINE_S,
    Cause,
    EvacuationOrder,
    Fate,
    Outcome,
    Reason,
    Report,
)

DEADLINE_MAX_S = 86400.0
HOSTS_MAX = 1000


class Asker(Enum):
    """Who asks by way of the API; the guard is a part of the agent."""

    OPERATOR = "operator"
    SHUTDOWN = "shutdown"


class EvacuateRequest(BaseModel):
    """Empty this host. Under `shutdown` what cannot move falls to its warm standby."""

    cause: Asker = Asker.OPERATOR
    why: str = Field(default="an operator asked for it", min_length=1, max_length=500)
    to: list[str] = Field(
        default=[], max_length=HOSTS_MAX, description="hosts; none: all that are in service"
    )
    deadline_s: float = Field(default=DEADLINE_S, gt=0, le=DEADLINE_MAX_S)
    concurrency: int = Field(default=CONCURRENCY, ge=1, le=CONCURRENCY_MAX)
    without_records: bool = Field(
        default=False, description="go on when the disk of this host takes no records any more"
    )

    def order(self) -> EvacuationOrder:
        """The same for the agent."""
        return EvacuationOrder(
            Cause(self.cause.value),
            self.why,
            tuple(self.to),
            self.deadline_s,
            self.concurrency,
            self.without_records,
        )


class MoveView(BaseModel):
    """One move of a plan. Times count from the beginning, as reckoned from what a gigabit link
    carries; null: the guest changes memory too fast for that.
    """

    vm: str
    host: str
    priority: int
    bytes: int = Field(description="of memory that has to be sent at least once")
    begins_s: float
    ends_s: float | None
    late: bool = Field(description="it is not reckoned to end by the deadline")


class LeftView(BaseModel):
    """A VM that cannot go."""

    vm: str
    reason: Reason
    why: str


class AbsentView(BaseModel):
    """A host that takes no VMs."""

    host: str
    why: str


class PlanView(BaseModel):
    """What would be done, in this order, and what would stay."""

    moves: list[MoveView]
    left: list[LeftView]
    absent: list[AbsentView]
    ends_s: float
    deadline_s: float


class PointsView(BaseModel):
    """A part of a host's score, and what it is given for."""

    points: float
    reason: str


class PlaceView(BaseModel):
    """A host for a VM: what stands in the way of it there; of one that fits, its score and what
    that adds up from. A point is a GiB of memory left beside the VM.
    """

    host: str
    fits: bool
    score: float
    points: list[PointsView]
    against: list[str]


class PlacesView(BaseModel):
    """All hosts of the cluster for one VM, the best first."""

    hosts: list[PlaceView]
    stuck: str = Field(description='why the VM can go to none of them now; "" if it can')


class LossView(BaseModel):
    """Hosts that may be lost together, how many VMs they have, and which would stay down."""

    hosts: list[str]
    vms: int
    down: list[LeftView]


class CapacityView(BaseModel):
    """Whether the VMs of the cluster have room when hosts are lost."""

    fits: bool = Field(description="every VM has a place, whichever of `losses` comes")
    whole: bool = Field(description="all sets of hosts were looked at, and all hosts answered")
    losses: list[LossView] = Field(description="those first that leave the most VMs down")
    sets: int = Field(description="how many sets of so many hosts there are")
    absent: list[AbsentView] = Field(description="hosts of whose VMs nothing is known")


class OutcomeView(BaseModel):
    """One VM. `remaining_bytes` of its memory are still to be sent, while it moves."""

    vm: str
    fate: Fate
    host: str
    reason: Reason | None
    why: str
    began_s: float | None = Field(description="after the order; null: not yet")
    ended_s: float | None = Field(description="after the order; null: not yet")
    remaining_bytes: int | None = None


class EvacuationView(BaseModel):
    """An evacuation of this host, while it goes on and afterwards."""

    cause: Cause
    why: str
    to: list[str]
    began: float
    elapsed_s: float
    deadline_s: float
    concurrency: int
    over: bool
    emptied: bool = Field(description="it is known that no VM is left here and that none was lost")
    failure: str
    vms: list[OutcomeView]


class ReturnRequest(BaseModel):
    """Put this host into service again. `after_shutdown`: only if a shutdown has emptied it."""

    after_shutdown: bool = False


class ServiceView(BaseModel):
    """Whether a host is in service now. `away`: VMs that were moved away since it went out of
    service, and where to.
    """

    in_service: bool
    away: dict[str, str]


def places_view(found: Places) -> PlacesView:
    """Hosts for a VM, for others."""
    return PlacesView(
        hosts=[
            PlaceView(
                host=one.host,
                fits=one.fits,
                score=one.score,
                points=[PointsView(points=part.points, reason=part.reason) for part in one.points],
                against=list(one.against),
            )
            for one in found.hosts
        ],
        stuck=found.stuck,
    )


def capacity_view(found: Capacity) -> CapacityView:
    """What there is room for, for others."""
    return CapacityView(
        fits=found.fits,
        whole=found.is_whole,
        losses=[
            LossView(hosts=list(loss.hosts), vms=loss.vms, down=_left_views(loss.down))
            for loss in found.losses
        ],
        sets=found.sets,
        absent=_absent_views(found.absent),
    )


def _left_views(left: Iterable[Left]) -> list[LeftView]:
    return [LeftView(vm=one.vm, reason=one.reason, why=one.why) for one in left]


def _absent_views(absent: Iterable[Absent]) -> list[AbsentView]:
    return [AbsentView(host=one.host, why=one.why) for one in absent]


def plan_view(made: Plan, order: EvacuationOrder) -> PlanView:
    """A plan, for others."""
    return PlanView(
        moves=[
            MoveView(
                vm=move.vm,
                host=move.host,
                priority=move.priority,
                bytes=move.sent_bytes,
                begins_s=move.begins_s,
                ends_s=move.ends_s,
                late=move.late,
            )
            for move in made.moves
        ],
        left=_left_views(made.left),
        absent=_absent_views(made.absent),
        ends_s=made.ends_s,
        deadline_s=order.deadline_s,
    )


def evacuation_view(report: Report, remaining: Mapping[str, int]) -> EvacuationView:
    """An evacuation, for others. `remaining` bytes of the memory of VMs are still to be sent."""
    order = report.order
    return EvacuationView(
        cause=order.cause,
        why=order.why,
        to=list(order.destinations),
        began=report.began,
        elapsed_s=(report.ended or time.time()) - report.began,
        deadline_s=order.deadline_s,
        concurrency=order.concurrency,
        over=report.over,
        emptied=report.emptied,
        failure=report.failure,
        vms=[_outcome_view(one, remaining.get(one.vm)) for one in report.outcomes],
    )


def _outcome_view(one: Outcome, remaining: int | None) -> OutcomeView:
    return OutcomeView(
        vm=one.vm,
        fate=one.fate,
        host=one.host,
        reason=one.reason,
        why=one.why,
        began_s=one.began_s,
        ended_s=one.ended_s,
        remaining_bytes=remaining if one.fate is Fate.MOVES else None,
    )
