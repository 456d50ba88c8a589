"""The budgets of the mechanisms are those that CONTRIBUTING.md tells, and together they fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.budget import BUDGETS, REST, Budget, budget_of, lines

ROOT = Path(__file__).resolve().parents[2]
# Of `make test` with every mechanism: all but the building, two tests at a time.
WHOLE_MIN = 35.0
BUILD_MIN = 8.0
TESTS_AT_A_TIME = 3


@pytest.mark.parametrize("budget", [*BUDGETS, REST], ids=lambda budget: budget.mechanism)
def test_a_budget_is_written_down(budget: Budget) -> None:
    row = f"| {budget.mechanism} | {budget.minutes:g} |"
    assert row in (ROOT / "CONTRIBUTING.md").read_text()


def test_all_budgets_fit_into_the_whole() -> None:
    minutes = sum(budget.minutes for budget in (*BUDGETS, REST))
    assert BUILD_MIN + minutes / TESTS_AT_A_TIME <= WHOLE_MIN


@pytest.mark.parametrize(
    ("module", "mechanism"),
    [
        ("tests/migration/test_kills.py", "moves between hosts"),
        ("tests/integration/test_disk_migration.py", "moves between hosts"),
        ("tests/integration/test_disk_tune.py", "the death of a disk's backend"),
        ("tests/system/test_torture.py", "the death of a disk's backend"),
        ("tests/unit/test_api.py", "everything else"),
    ],
)
def test_a_module_belongs_to_one_mechanism(module: str, mechanism: str) -> None:
    assert budget_of(f"{module}::test_it[case]").mechanism == mechanism


def test_what_takes_too_long_is_told() -> None:
    limit_s = BUDGETS[0].minutes * 60
    first, *_, last = lines(
        {"tests/migration/test_a.py::test_it": limit_s, "tests/migration/test_b.py::test_it": 1.0}
    )
    assert first.endswith("OVER")
    assert last.startswith("all ")
    (within, _) = lines({"tests/migration/test_a.py::test_it": limit_s})
    assert within.endswith("within budget")
