"""The bench of layers does what it says: a short run, of which the times say nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent


@pytest.mark.timeout(120)
def test_everything_is_measured(tmp_path: Path) -> None:
    blkd = PROGRAMS / "semper-blkd"
    command = [
        sys.executable, "-m", "bench", "--suite", "layers", "--quick",
        f"--program={blkd}", f"--load={PROGRAMS / 'semper-load'}",
        # Also in the place of a build without layers, which the tests have not.
        f"--bare={blkd}", f"--output={tmp_path}",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    written = json.loads(next(tmp_path.glob("*.json")).read_text())
    seen = {(one["part"], one["what"], one["by"]) for one in written["seen"]}
    assert {
        ("plain", "write 4×d32", "bare"),
        ("chain", "rewrite d32", "four layers"),
        ("chain", "first d32", "qcow2"),
        ("chain", "64k read, alternating", "one layer"),
        ("pause", "snapshots", "blkd"),
        ("pause", "map", "blkd"),
        ("merge", "layers left", "blkd"),
    } <= seen
    flushes = [one for one in written["seen"] if one["what"] == "flush, new"]
    assert all(one["figures"]["flush_us"] > 0 for one in flushes)
    left = [one for one in written["seen"] if one["what"] == "layers left"]
    assert [one["figures"]["count"] for one in left] == [1.0]
