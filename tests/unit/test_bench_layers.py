"""What the bench of layers makes of its figures."""

from bench.layers import show
from bench.layers.figures import Results, Seen, answers

MACHINE = {
    "date": "2026-11-29T09:00:00+00:00", "processor": "P", "processors": "2",
    "hypervisor": "kvm", "memory_mib": "2048", "kernel": "6.1", "qemu": "Q",
    "semper_blkd": "semper-blkd 0.1.0", "commit": "abc",
}  # fmt: skip


def results(*rows: tuple[str, str, str, str, dict[str, float]]) -> Results:
    """Two rounds of each row."""
    seen = Results(MACHINE, {"rounds": 2, "size_mib": 16, "seconds": 0.1})
    for number in range(2):
        seen.seen += [Seen(*row[:4], number, row[4]) for row in rows]
    return seen


def kept(seen: Results) -> dict[tuple[str, str], bool]:
    """By load and figure, whether the bound is kept."""
    return {(one.case[2], one.asked.figure): one.kept for one in answers(seen)}


def test_a_ratio_is_of_one_round_and_one_place() -> None:
    seen = results(
        ("chain", "tmpfs mmap", "read d1", "no layer", {"p50_us": 10.0, "cpu_us": 10.0}),
        ("chain", "tmpfs mmap", "read d1", "four layers", {"p50_us": 10.9, "cpu_us": 11.6}),
        # Another place, with nothing to hold it against.
        ("chain", "direct uring", "read d1", "four layers", {"p50_us": 99.0, "cpu_us": 99.0}),
    )
    assert kept(seen) == {("read d1", "p50_us"): True, ("read d1", "cpu_us"): False}


def test_a_first_write_may_cost_more_where_a_page_has_to_be_found() -> None:
    for place, wanted in (("tmpfs mmap", True), ("cached mmap", False)):
        seen = results(
            ("chain", place, "first d1", "no layer", {"p50_us": 10.0}),
            ("chain", place, "first d1", "four layers", {"p50_us": 20.0}),
        )
        assert kept(seen) == {("first d1", "p50_us"): wanted}


def test_of_iops_more_is_better_and_a_bound_may_stand_alone() -> None:
    seen = results(
        ("chain", "tmpfs mmap", "read d32", "qcow2", {"iops": 10.0}),
        ("chain", "tmpfs mmap", "read d32", "four layers", {"iops": 29.0}),
        ("pause", "tmpfs mmap", "snapshots", "blkd", {"beyond_ms": 4.9}),
    )
    assert kept(seen) == {("read d32", "iops"): False, ("snapshots", "beyond_ms"): True}


def test_the_document_says_what_was_missed_and_what_failed() -> None:
    seen = results(
        ("merge", "cached mmap", "write d32", "at rest", {"p99_us": 10.0}),
        ("merge", "cached mmap", "write d32", "merging", {"p99_us": 16.0}),
        ("pause", "cached mmap", "growth", "blkd", {"memory": 1.0}),
    )
    seen.seen.append(Seen("chain", "direct uring", "all", "blkd", 0, {}, "no room"))
    text = show.document(seen)
    assert "1.60 (1.60–1.60) | ≤ 1.5 | **missed**" in text
    assert "- cached mmap, growth: memory 1" in text
    assert "Failed: direct uring all blkd: no room" in text
