"""How much of a certificate's life is left. A module apart: certificates take long to import."""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel, Field


class Age(Enum):
    """See `cluster.certificate`, which draws it."""

    FRESH = "fresh"
    DUE = "due"
    LATE = "late"
    ENDED = "ended"


def age(begins: float, ends: float, now: float) -> Age:
    """Of a certificate that is good from `begins` to `ends`; all in seconds since the epoch."""
    left, life = ends - now, ends - begins
    if left <= 0:
        return Age.ENDED
    if left <= life / 6:
        return Age.LATE
    return Age.DUE if left <= life / 3 else Age.FRESH


class Standing(BaseModel):
    """This host's certificate, as `semper host show` tells of it."""

    host: str
    ends: float | None = Field(description="seconds since the epoch; null: it cannot be read")
    age: Age
    failure: str = Field(description='why it is not renewed, and what to do; "": nothing is wrong')
