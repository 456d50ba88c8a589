"""What is printed, and who may read it."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

SAY = "from sempervirt.cli.output import echo_secret; echo_secret('the secret')"


def test_a_secret_makes_the_file_that_it_goes_to_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "token"
    with file.open("wb") as output:
        file.chmod(0o644)
        subprocess.run([sys.executable, "-c", SAY], stdout=output, check=True)
    assert file.read_text() == "the secret\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_secret_goes_through_a_pipe() -> None:
    said = subprocess.run([sys.executable, "-c", SAY], stdout=subprocess.PIPE, check=True)
    assert said.stdout == b"the secret\n"
