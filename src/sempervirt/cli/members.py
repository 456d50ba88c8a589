"""The hosts of a cluster as they are printed."""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel


class MemberState(Enum):
    """Whether a host's agent is heard, and whether the host still belongs to the cluster."""

    ALIVE = "alive"
    SILENT = "silent"
    REVOKED = "revoked"


class MemberView(BaseModel):
    """A host as it is printed. `certificate_ends` is in seconds since the epoch;
    `certificate_trouble` is what keeps its agent from renewing it, once that is late.
    """

    name: str
    state: MemberState
    address: str
    certificate_ends: float
    certificate_trouble: str
    boot_id: str | None
    agent_pid: int | None
