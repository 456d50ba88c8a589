"""The migration bench in short: one guest, one round, no limit on the link."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.__main__ import main
from bench.migration.figures import Results

pytestmark = [pytest.mark.guest, pytest.mark.root]
MEMORY_MIB = 256
CLOCK_MS = 2000


def test_a_guest_moves_in_two_ways_and_the_bytes_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = ["--link=unlimited", "--guest=cached", "--rounds=1", f"--memory={MEMORY_MIB}"]
    # A steered one of the ways that QEMU has by itself; `make bench` has all of them.
    choice += [f"--way={way}" for way in ("stock-steered", "wired")]
    argv = ["bench", "--suite", "migrate", *choice, f"--output={tmp_path}"]
    monkeypatch.setattr("sys.argv", argv)
    assert main() == 0, capsys.readouterr()
    files = {path.suffix: path for path in tmp_path.iterdir()}
    assert sorted(files) == [".json", ".md", ".svg"]
    results = Results.read(files[".json"])
    figures = {sample.way: sample.figures for sample in results.samples}
    assert sorted(figures) == ["stock-steered", "wired"]
    for way, seen in figures.items():
        assert seen is not None
        # Another boot's clock, or another guest's, would be seconds off.
        assert -CLOCK_MS < seen.stopped_ms < seen.blackout_ms + CLOCK_MS, way
        assert 0 < seen.migrate_s <= seen.total_s, way
        assert seen.echo_ms > 0, way
        assert seen.cpu_s > 0, way
    stock, wired = (figures[way] for way in ("stock-steered", "wired"))
    assert stock is not None
    assert wired is not None
    # The guest's programs alone, without the package tree, are most of what it holds.
    assert wired.wire_mb < stock.wire_mb / 2.5
    told = next(sample.told for sample in results.samples if sample.way == "wired")["wired"]
    assert told["references"] > 10_000
    assert stock.wire_mb * 1e6 > told["stream_bytes"] * 0.8
    assert "| page cache full of packages | semper-wired |" in files[".md"].read_text()
