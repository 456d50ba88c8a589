"""What the agent makes of what semper-saved says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sempervirt.core.errors import InvalidRequest, SempervirtError, StateConflict, Unavailable
from sempervirt.qemu import saved

FIGURES = {"memory": 8, "file": 7, "zero_pages": 1, "block_pages": 2, "data_pages": 3}


def stand_in(place: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = place / "saved"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("SEMPERVIRT_SAVED", str(program))


async def test_progress_is_passed_on_and_the_last_line_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"done": 1, "of": 4}, {"done": 3, "of": 4}, FIGURES]
    stand_in(tmp_path, monkeypatch, "\n".join(f"echo '{json.dumps(line)}'" for line in lines))
    told: list[tuple[int, int]] = []
    figures = await saved.save(
        3, tmp_path, tmp_path, {}, tmp_path, lambda done, of: told.append((done, of))
    )
    assert told == [(1, 4), (3, 4)]
    assert figures == saved.Figures(**FIGURES)


@pytest.mark.parametrize(
    ("code", "kind"), [(3, StateConflict), (4, InvalidRequest), (1, Unavailable)]
)
async def test_a_failure_is_told_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[SempervirtError]
) -> None:
    stand_in(tmp_path, monkeypatch, f"echo 'semper-saved: error: so it is' >&2; exit {code}")
    with pytest.raises(kind) as caught:
        await saved.show(tmp_path)
    assert caught.value.message == "so it is"
