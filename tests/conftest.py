"""What all tests share: an owner that fails fails the test, where it would end the agent; and the
budgets of the mechanisms.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sempervirt.host import background

pytest_plugins = ("tests.budget",)
Crash = tuple[str, BaseException]


@pytest.fixture(autouse=True)
def crashes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Crash]]:
    """What would have ended the agent: the name of a task, and its exception.

    The test fails by it. A test that means it takes it out of the list.
    """
    seen: list[Crash] = []
    monkeypatch.setattr(background, "fail", lambda what, error: seen.append((what, error)))
    yield seen
    if seen:
        what, error = seen[0]
        raise AssertionError(f"{what} has failed, which would have ended the agent") from error
