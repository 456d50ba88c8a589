"""What a kernel lacks of the walls is told, and nothing else."""

from __future__ import annotations

import pytest

from sempervirt.host.walls import landlock_version, missing_walls, walls_missing_here


@pytest.mark.parametrize(
    ("landlock", "seccomp", "why_not", "words"),
    [
        (7, True, ("", ""), []),
        (5, True, ("", ""), ["signals"]),
        (2, True, ("", ""), ["truncating", "TCP", "devices", "signals"]),
        (0, False, ("", ""), ["not in this kernel", "seccomp"]),
        (7, True, ("the agent is not root", ""), ["not root"]),
        (7, True, ("", "memory: none"), ["limits for each VM: memory: none"]),
    ],
)
def test_what_is_missing(
    landlock: int, seccomp: bool, why_not: tuple[str, str], words: list[str]
) -> None:
    missing = missing_walls(landlock, seccomp, *why_not)
    assert len(missing) == len(words)
    assert all(word in phrase for word, phrase in zip(words, missing, strict=True))


def test_this_kernel_is_asked() -> None:
    lacks = any(phrase.startswith("Landlock: not") for phrase in walls_missing_here("", ""))
    assert lacks == (landlock_version() == 0)
