"""What all tests share: an owner that fails fails the test, where it would end the agent; and the
budgets of the mechanisms.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from sempervirt.host import background
from sempervirt.host.groups import OFF, VARIABLE

pytest_plugins = ("tests.budget",)
# A shell has what it starts in the background ignore Ctrl-C, and so would the programs under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# An agent that a test kills would leave control groups behind, each with a name of its own.
os.environ.setdefault(VARIABLE, OFF)
# How long an example takes says nothing on a machine with other work.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
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
