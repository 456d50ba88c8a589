"""The hosts and the operators of a cluster as they are printed."""

from __future__ import annotations

from pydantic import BaseModel

from sempervirt.cli.member_state import MemberState


class MemberView(BaseModel):
    """A host as it is printed. `certificate_ends` is in seconds since the epoch;
    `certificate_trouble` is what keeps its agent from renewing it, once that is late;
    `out_of_service` why no VM may come there, "" while VMs may.
    """

    name: str
    state: MemberState
    address: str
    certificate_ends: float
    certificate_trouble: str
    boot_id: str | None
    agent_pid: int | None
    out_of_service: str = ""


class OperatorView(BaseModel):
    """An operator as it is printed. `certificate_ends` is in seconds since the epoch."""

    name: str
    role: str
    certificate_ends: float
