"""What the tests of each mechanism may take, and what they took: a table at the end of a run.

Minutes are those of tests, added up. `make test` runs three at a time, so a third of the sum is
what it waits for. A test belongs to the first mechanism with a folder or module that it is in;
whoever brings a mechanism gives it its own line here, and CONTRIBUTING.md says why the numbers are
these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

import pytest

# Less than this was a choice of tests, of which a budget says nothing.
WHOLE_RUN_S = 300.0


@dataclass(frozen=True)
class Budget:
    """A mechanism, the modules of its tests as patterns of their paths, and its minutes."""

    mechanism: str
    minutes: float
    modules: tuple[str, ...]


BUDGETS = (
    Budget(
        "moves between hosts",
        18.0,
        (
            "tests/migration/*",
            "tests/unit/test_migration_*.py",
            "tests/integration/test_corruption.py",
            "tests/integration/test_disk_migration.py",
            "tests/integration/test_hosts.py",
            "tests/integration/test_rights.py",
            "tests/integration/test_store_*.py",
            "tests/integration/test_wired.py",
            "tests/system/test_migrate_bench.py",
        ),
    ),
    Budget(
        "restart of QEMU, saved states",
        2.0,
        ("tests/integration/test_restart_*.py", "tests/integration/test_saved_*.py"),
    ),
    Budget(
        "the death of a disk's backend",
        14.0,
        (
            "tests/integration/test_block_map.py",
            "tests/integration/test_debian_guest.py",
            "tests/integration/test_disk_*.py",
            "tests/integration/test_image_*.py",
            "tests/integration/test_mapped_*.py",
            "tests/scenarios/*",
            "tests/system/*",
        ),
    ),
    # To come: the first with guests that run twice, of the third guests that boot guests. Of the
    # second, the kernel's part takes 2 minutes and evacuation 3.
    Budget("warm standby", 12.0, ("tests/standby/*", "tests/*/test_standby*.py")),
    Budget(
        "guard and evacuation",
        9.0,
        ("tests/guard/*", "tests/*/test_guard*.py", "tests/*/test_evacuation*.py"),
    ),
    Budget("passthrough", 9.0, ("tests/passthrough/*", "tests/*/test_passthrough*.py")),
)
# Whatever belongs to none: units, the command line, the agent, the probe, the wheel.
REST = Budget("everything else", 9.0, ("*",))


def budget_of(test: str) -> Budget:
    """The mechanism of a test, by its id."""
    module = test.split("::", maxsplit=1)[0]
    for budget in BUDGETS:
        if any(fnmatch(module, pattern) for pattern in budget.modules):
            return budget
    return REST


def lines(seconds: Mapping[str, float]) -> list[str]:
    """The table: `seconds` are of each test, by its id."""
    spent = dict.fromkeys((*BUDGETS, REST), 0.0)
    for test, duration in seconds.items():
        spent[budget_of(test)] += duration / 60
    shown = [
        f"{budget.mechanism:31} {minutes:5.1f} of {budget.minutes:4.1f} min  "
        + ("within budget" if minutes <= budget.minutes else "OVER")
        for budget, minutes in spent.items()
        if minutes
    ]
    allowed = sum(budget.minutes for budget in spent)
    return [*shown, f"{'all':31} {sum(spent.values()):5.1f} of {allowed:4.1f} min"]


_seconds: dict[str, float] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Setting up and tearing down count as well."""
    _seconds[report.nodeid] = _seconds.get(report.nodeid, 0.0) + report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says it when the run was a whole one."""
    if sum(_seconds.values()) > WHOLE_RUN_S:
        terminalreporter.section("minutes of tests, by mechanism")
        for line in lines(_seconds):
            terminalreporter.line(line)
