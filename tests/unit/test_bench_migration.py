"""What follows from the figures of moves: pairs, goals, documents; and what a heartbeat tells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.kept import KeptError
from bench.migration import show
from bench.migration.figures import Figures, Results, Sample, judgements
from bench.migration.program import main, parse
from bench.migration.pulse import Beat, gap_ms, jump_ms, steps_ms
from bench.sections import MIGRATE

FIGURES = Figures(
    wire_mb=100.0, total_s=2.0, migrate_s=1.5, blackout_ms=80.0, stopped_ms=20.0, echo_ms=90.0,
    cpu_s=3.0,
)  # fmt: skip
MS = 1_000_000


def made(*, wired_mb: float, wired_blackout_ms: float = 80.0) -> Results:
    """Three rounds on one link with two guests; multifd sends 50 MB, stock 100."""
    results = Results(
        machine={
            "date": "2026-11-22T20:00:00+00:00", "processor": "P", "processors": "2",
            "hypervisor": "kvm", "memory_mib": "2048", "kernel": "6.1", "qemu": "Q",
            "semper_blkd": "semper-blkd 0.1.0", "commit": "abc",
        },
        settings={
            "rounds": 3, "memory_mib": 512, "links": ["slow"], "guests": ["booted", "cached"],
            "ways": ["stock", "multifd-zstd", "wired"],
        },
        labels={
            "booted": "just booted", "cached": "page cache", "stock": "stock QEMU",
            "multifd-zstd": "multifd", "wired": "semper-wired",
        },
    )  # fmt: skip
    seen = {
        "stock": FIGURES,
        "multifd-zstd": replace(FIGURES, wire_mb=50.0),
        "wired": replace(FIGURES, wire_mb=wired_mb, blackout_ms=wired_blackout_ms),
    }
    for number in range(3):
        for guest in results.settings["guests"]:
            for way, figures in seen.items():
                results.samples.append(Sample(number, "slow", guest, way, 0.5, figures))
    return results


def reached(results: Results) -> list[tuple[str, str, bool]]:
    return [(one.goal.metric, one.guest, one.reached) for one in judgements(results)]


def test_goals_hold_for_the_guests_that_they_are_about() -> None:
    assert reached(made(wired_mb=10.0)) == [
        ("wire_mb", "cached", True),  # a fifth of the best other way's
        ("wire_mb", "booted", True),
        ("wire_mb", "cached", True),
        ("blackout_ms", "booted", True),  # stock's
        ("blackout_ms", "cached", True),
        ("blackout_ms", "booted", True),
        ("blackout_ms", "cached", True),
        ("total_s", "booted", True),
        ("total_s", "cached", True),
    ]


def test_the_best_other_way_is_found_for_each_metric_and_round() -> None:
    """A way of which one round failed is the best in the others; ours is never the best other."""
    results = made(wired_mb=10.0)
    for index, sample in enumerate(results.samples):
        if sample.way == "stock" and sample.figures is not None:
            quicker = replace(sample.figures, blackout_ms=40.0) if sample.round else None
            results.samples[index] = replace(sample, figures=quicker)
    assert results.values("slow", "booted", "best", "wire_mb") == {0: 50.0, 1: 50.0, 2: 50.0}
    assert results.values("slow", "booted", "best", "blackout_ms") == {0: 80.0, 1: 40.0, 2: 40.0}
    assert results.ratios("slow", "booted", "wired", "blackout_ms", "best") == [1.0, 2.0, 2.0]
    assert "2.00 (1.50–2.00)" in show.document(results)


def test_goals_are_missed_by_a_little() -> None:
    assert reached(made(wired_mb=10.1))[0] == ("wire_mb", "cached", False)
    assert [one for _, _, one in reached(made(wired_mb=51.6))] == [
        False, False, False, True, True, True, True, True, True,
    ]  # fmt: skip
    slow = reached(made(wired_mb=10.0, wired_blackout_ms=80.1))
    assert [one for metric, _, one in slow if metric == "blackout_ms"] == [False] * 4


def test_a_move_that_failed_is_shown_and_is_in_no_ratio() -> None:
    results = made(wired_mb=10.0)
    lost = Sample(1, "slow", "booted", "wired", 0.5, None, {}, "it did not arrive")
    results.samples[5] = lost
    document = show.document(replace(results, samples=[lost, *made(wired_mb=10.0).samples[:2]]))
    assert "- slow, booted, wired, round 1: it did not arrive" in document
    assert results.failures == [lost]


def test_the_tables_have_every_guest_and_way() -> None:
    document = show.document(made(wired_mb=10.0))
    assert document.count("| semper-wired |") == 2
    assert "0.20 (0.20–0.20)" in document
    assert "| a fifth of the bytes of the best other way (≤ 0.2) | 1 of 1 |" in document


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    results = made(wired_mb=10.0)
    results.write(tmp_path / "r.json")
    assert Results.read(tmp_path / "r.json") == results
    for text in ("{}", "[", '{"version": 0}'):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(KeptError):
            Results.read(tmp_path / "r.json")


def test_an_earlier_run_is_shown_again_and_put_into_a_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(wired_mb=10.0).write(tmp_path / "r.json")
    page = tmp_path / "page.md"
    page.write_text(f"head\n{MIGRATE.begin}\nold\n{MIGRATE.end}\ntail\n")
    given = ["--from", str(tmp_path / "r.json"), "--update", str(page)]
    assert main(given) == 0
    assert "old" not in page.read_text()
    assert "| just booted | semper-wired |" in page.read_text()
    assert "goals" in capsys.readouterr().out
    assert main(["--from", str(page)]) == 2
    assert "bench: error: " in capsys.readouterr().err


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    show.draw(made(wired_mb=10.0), tmp_path / "p.svg")
    assert (tmp_path / "p.svg").stat().st_size > 1000


def test_wrong_usage_is_refused() -> None:
    for wrong in (["--rounds=0"], ["--memory=1"], ["--link=thin"]):
        with pytest.raises(SystemExit):
            parse(wrong)


def test_a_gap_is_between_hosts_and_a_jump_between_clocks() -> None:
    """Beats every 5 ms, of which the one that arrives latest says least about the clock."""
    before = [Beat(at * MS + late, at * MS) for at, late in ((0, MS), (5, 0), (10, 3 * MS))]
    # Its clock was stopped for 40 ms, and then it was slow.
    after = [Beat(at * MS + 40 * MS + late, at * MS) for at, late in ((15, 9 * MS), (20, 0))]
    assert gap_ms(before, after) == 60 - 13
    assert jump_ms(before, after) == 40
    assert steps_ms(before, [3 * MS, 20 * MS], [55 * MS], after) == {
        "beat to stop": 7, "stop to run": 35, "run to beat": 5,
    }  # fmt: skip
    assert steps_ms(before, [], [55 * MS], after) == {}


@pytest.mark.parametrize("pace", [0.8, 1.0, 1.26, 10.8])
def test_a_clock_that_goes_wrong_jumps_by_no_more_than_it_was_stopped(pace: float) -> None:
    """As one does that was measured wrongly at boot; it gains seconds while the guest is moved."""
    seconds = range(0, 60_000, 5)
    before = [Beat(at * MS, int(at * MS * pace)) for at in seconds]
    stopped = 60_000 * MS
    after = [Beat(stopped + (at + 40) * MS, int((stopped + at * MS) * pace)) for at in seconds]
    assert jump_ms(before, after) == pytest.approx(40, abs=0.5)
    # The control: by the quickest beats of all, it is seconds.
    quickest = [min(beat.lag(1.0) for beat in beats) for beats in (before, after)]
    assert (abs(quickest[1] - quickest[0]) / 1e6 > 1000) is (pace != 1.0)
