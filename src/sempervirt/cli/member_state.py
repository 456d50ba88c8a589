"""How a host of the cluster stands."""

from __future__ import annotations

from enum import Enum


class MemberState(Enum):
    """Whether a host's agent is heard and takes VMs, and whether the host still belongs to the
    cluster.
    """

    ALIVE = "alive"
    SILENT = "silent"
    OUT_OF_SERVICE = "out of service"
    REVOKED = "revoked"
