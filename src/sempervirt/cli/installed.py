"""What `semper guard install` prints."""

from __future__ import annotations

from pydantic import BaseModel


class InstalledView(BaseModel):
    """What an installation has done, or what is missing for it."""

    release: str
    missing: list[str]
    remedies: list[str]
    module: str
    loaded: bool
    written: list[str]
