"""What the writers of a probe say of a disk that did its guest no harm."""

from __future__ import annotations

from sempervirt.guest.reports import Stats


def assert_unharmed(stats: Stats) -> None:
    """No error, nothing hung, every block as it was written."""
    assert stats.io_error_count == 0, stats
    assert stats.hung == 0, stats
    assert stats.wrong.total == 0, stats
    assert stats.verified_final is not None
    assert stats.verified_final.complete, stats
    assert stats.verified_final.wrong == 0, stats
