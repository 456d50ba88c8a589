"""The forms of a file that a disk is written to."""

from __future__ import annotations

from enum import Enum


class ImageFormat(Enum):
    """Of the file that is made. The values stand in the API."""

    RAW = "raw"
    QCOW2 = "qcow2"
