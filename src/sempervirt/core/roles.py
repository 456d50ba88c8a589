"""Roles: what those who ask an agent for something may be. What each may do: `api.rights`."""

from __future__ import annotations

from enum import Enum


class Role(Enum):
    """What one who asks is to the agent."""

    ADMIN = "admin"
    OPERATOR = "operator"
    VIEWER = "viewer"
    HOST = "host"
    INVITATION = "invitation"


# The roles that people have.
OPERATORS = (Role.ADMIN, Role.OPERATOR, Role.VIEWER)
