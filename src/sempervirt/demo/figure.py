"""An empty picture, where the library that draws is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sempervirt.core.errors import Unavailable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """A picture of so many inches. Raises Unavailable without matplotlib."""
    try:
        # An extra that a host without people to look does not need.
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise Unavailable(
            "no picture was drawn: matplotlib is not installed",
            remedy='install it with: pip install "sempervirt[plot]"',
        ) from error
    return Figure(figsize=(width, height), layout="constrained")
