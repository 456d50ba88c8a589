"""The guard's decision and its table in docs/design/guard.md agree, over all combinations."""

from __future__ import annotations

import ctypes
import itertools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "kernel/semper_guard/decision.c"
TABLE = ROOT / "docs/design/guard.md"
HEADING = "| kind | context | when | verdict | reason |"
MAX_EVENTS = 2


class State(ctypes.Structure):
    """`struct sg_state`."""

    _fields_ = (
        ("policy", ctypes.c_int),
        ("kind", ctypes.c_int),
        ("context", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("depth", ctypes.c_uint),
        ("bh_off", ctypes.c_bool),
        ("known_lock", ctypes.c_bool),
        ("rcu_depth", ctypes.c_uint),
        ("reachable", ctypes.c_bool),
        ("restartable", ctypes.c_bool),
        ("oom_lock", ctypes.c_bool),
        ("nested", ctypes.c_bool),
        ("allowed", ctypes.c_bool),
        ("crash_kernel_first", ctypes.c_bool),
        ("before", ctypes.c_uint),
        ("max_events", ctypes.c_uint),
    )


class Decision(ctypes.Structure):
    """`struct sg_decision`."""

    _fields_ = (("verdict", ctypes.c_int), ("reason", ctypes.c_int))


class Library:
    """The decision as it is in the module, compiled for user space."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._decide = library.sg_decide
        self._decide.restype = Decision
        self._names = {}
        for what in ("kind", "context", "thread", "policy", "verdict", "reason"):
            function = library[f"sg_{what}_name"]
            function.restype = ctypes.c_char_p
            names = (function(number).decode() for number in itertools.count())
            self._names[what] = list(itertools.takewhile(lambda name: name != "?", names))

    def names(self, what: str) -> list[str]:
        """The names of an enumeration, in order."""
        return self._names[what]

    def decide(self, state: State) -> tuple[str, str]:
        """Verdict and reason."""
        decision = self._decide(ctypes.byref(state))
        return self._names["verdict"][decision.verdict], self._names["reason"][decision.reason]


# What a row's third column may ask, a bit each. Policies come after these, in their order.
CONDITIONS = ("allowed", "nested", "crash-kernel-first", "max-events", "idle", "per-cpu", "locks",
              "oom-lock", "reachable", "restartable")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of the table: what fits, and what follows."""

    kinds: frozenset[str]
    contexts: frozenset[str]
    asked: int
    wanted: int
    answer: tuple[str, str]

    @classmethod
    def parse(cls, line: str, bits: dict[str, int]) -> Row:
        kinds, contexts, when, verdict, reason = (cell.strip() for cell in line.split("|")[1:-1])
        words = [word.strip() for word in when.split(",") if word.strip()]
        return cls(
            frozenset(kinds.split(", ")),
            frozenset(contexts.split(", ")),
            sum(bits[word.removeprefix("not ")] for word in words),
            sum(bits[word] for word in words if not word.startswith("not ")),
            (verdict, reason),
        )

    def concerns(self, kind: str, context: str) -> bool:
        return bool(self.kinds & {kind, "any"}) and bool(self.contexts & {context, "any"})


def bits_of(library: Library) -> dict[str, int]:
    """Which bit stands for which condition."""
    names = [*CONDITIONS, *(f"policy={name}" for name in library.names("policy"))]
    return {name: 1 << number for number, name in enumerate(names)}


def rows(text: str, bits: dict[str, int]) -> list[Row]:
    """The rows of the decision's table."""
    lines = text.splitlines()
    begin = lines.index(HEADING) + 2
    return [Row.parse(line, bits) for line in itertools.takewhile(bool, lines[begin:])]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    target = tmp_path_factory.mktemp("guard") / "decision.so"
    subprocess.run(
        ["gcc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", target, SOURCE], check=True
    )
    return Library(target)


FLAGS = ("bh_off", "known_lock", "reachable", "restartable", "oom_lock", "nested", "allowed",
         "crash_kernel_first")  # fmt: skip


def flagged(bits: dict[str, int]) -> list[tuple[State, int]]:
    """Every combination of what is no enumeration, with its bits; numbers around their bounds."""
    found = []
    for depth, before in itertools.product((0, 1), (MAX_EVENTS - 1, MAX_EVENTS)):
        for flags in itertools.product((False, True), repeat=len(FLAGS)):
            state = State(depth=depth, before=before, max_events=MAX_EVENTS,
                          **dict(zip(FLAGS, flags, strict=True)))  # fmt: skip
            facts = {
                "allowed": state.allowed,
                "nested": state.nested,
                "crash-kernel-first": state.crash_kernel_first,
                "max-events": before >= MAX_EVENTS,
                "locks": bool(depth or state.bh_off or state.known_lock),
                "oom-lock": state.oom_lock,
                "reachable": state.reachable,
                "restartable": state.restartable,
            }
            found.append((state, sum(bits[name] for name, is_so in facts.items() if is_so)))
    return found


def compare(library: Library) -> tuple[set[Row], list[str]]:
    """The rows that decided something, and what does not agree (the first few)."""
    bits = bits_of(library)
    table = rows(TABLE.read_text(), bits)
    inner = flagged(bits)
    used: set[Row] = set()
    wrong: list[str] = []
    enumerations = [library.names(what) for what in ("policy", "kind", "context", "thread")]
    for numbers in itertools.product(*(range(len(names)) for names in enumerations)):
        policy, kind, context, thread = (
            names[number] for names, number in zip(enumerations, numbers, strict=True)
        )
        concerned = [row for row in table if row.concerns(kind, context)]
        outer = bits[f"policy={policy}"] | bits.get(thread, 0)
        for state, facts in inner:
            state.policy, state.kind, state.context, state.thread = numbers
            here = facts | outer
            row = next(row for row in concerned if here & row.asked == row.wanted)
            used.add(row)
            answer = library.decide(state)
            if answer != row.answer and len(wrong) < 5:
                wrong.append(f"{policy}, {kind} in {context}, {thread}: {answer}, table: {row}")
    return used, wrong


def test_the_function_is_the_table(library: Library) -> None:
    used, wrong = compare(library)
    table = rows(TABLE.read_text(), bits_of(library))
    assert wrong == []
    assert used == set(table), "a row that never decides"
    assert {row.answer[1] for row in table} == set(library.names("reason"))


def test_every_name_is_in_the_document(library: Library) -> None:
    text = TABLE.read_text()
    for what in ("kind", "context", "policy", "verdict", "reason"):
        assert [name for name in library.names(what) if not re.search(rf"\b{name}\b", text)] == []
