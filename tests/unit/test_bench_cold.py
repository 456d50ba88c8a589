"""The first second of a backend: what a series of completions says, and what is asked for."""

from pathlib import Path

import pytest

from bench.cold import show
from bench.cold.figures import Effort, Figures, Results, Sample, figures, objections

MACHINE = {
    "date": "2026-11-29T09:00:00+00:00", "processor": "P", "processors": "2",
    "hypervisor": "kvm", "memory_mib": "2048", "kernel": "6.1", "qemu": "Q",
    "semper_blkd": "semper-blkd 0.1.0", "commit": "abc",
}  # fmt: skip
FULL = [1000] * 160
"""Intervals of 10 ms: 100,000 requests in a second, until the kill after 1.6 s."""


def results(first_us: float, storage: str = "tmpfs", share: float = 1.0) -> Results:
    """Five rounds; `auto` serves `share` of 100,000 IOPS at first, and then all of them."""
    seen = Results(MACHINE, {"rounds": 5}, {storage: storage})
    for number in range(5):
        for engine, cost, at_first in (("auto", first_us, share), ("sync", 2.0, 1.0)):
            figures = Figures(1e5 * at_first, 1e5, 1e5, 1e5, 1e5 * at_first, 1e5, 1e5, 2.0, 30.0)
            effort = Effort(cost, min(cost, 2.0), 0.5)
            sample = Sample(number, storage, "randread", engine, 0.0, figures, effort)
            seen.samples.append(sample)
    return seen


def test_the_first_moments_are_told_from_the_rest() -> None:
    start = [100] * 10 + FULL[10:]
    over = [0] * 3 + [200] * 20 + [1000] * 100
    seen = figures([*start, *over], killed_ms=1600, resumed_ms=1625)
    assert (seen.start_100, seen.start_half, seen.steady) == (10_000, 100_000, 100_000)
    assert (seen.over_100, seen.over_half, seen.stall_ms) == (20_000, 100_000, 25)
    assert seen.start_second == pytest.approx(91_000)
    # The first window of 50 ms with nine tenths begins 230 ms after the kill.
    assert seen.back_ms == 230


def test_a_throughput_that_does_not_come_back_is_told() -> None:
    seen = figures([*FULL, 0, *[800] * 130], killed_ms=1600, resumed_ms=1605)
    assert seen.back_ms is None
    later = figures([*FULL, *[1000] * 130], killed_ms=1600, resumed_ms=1605)
    assert later.back_ms == 10


def test_a_cold_start_that_is_slow_is_objected_to() -> None:
    assert list(objections(results(first_us=1.9))) == []
    dear = list(objections(results(first_us=7.3)))
    assert [one.split(" is ")[0] for one in dear] == ["tmpfs randread: speed to sync, first_us"]
    slow = list(objections(results(first_us=1.9, share=0.3)))
    assert [one.split(" is ")[0] for one in slow] == [
        "tmpfs randread: start_100",
        "tmpfs randread: over_100",
    ]


def test_a_sparse_image_is_held_against_the_best_other_engine() -> None:
    assert list(objections(results(first_us=2.1, storage="tmpfs-sparse"))) == []
    slow = list(objections(results(first_us=24.0, storage="tmpfs-sparse", share=0.1)))
    assert len(slow) == 3


def test_what_was_measured_is_kept_and_shown(tmp_path: Path) -> None:
    seen = results(first_us=1.9)
    error = Sample(5, "tmpfs", "randread", "sync", 0.0, None, None, "it fell over")
    seen.samples.append(error)
    seen.write(tmp_path / "cold.json")
    again = Results.read(tmp_path / "cold.json")
    assert again.samples == seen.samples
    text = show.document(again)
    assert "| read | auto | 100 000 | 1.00 (1.00–1.00) |" in text
    assert "Failed: tmpfs randread sync, round 5: it fell over" in text
    assert any("it fell over" in one for one in objections(again))
