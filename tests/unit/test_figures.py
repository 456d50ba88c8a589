"""A claim has one figure: in SPECIFICATION, in the page behind it, in README, in --help."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from sempervirt.cli import manual
from tests.unit.test_docs import ROOT, anchor

SPECIFICATION = ROOT / "SPECIFICATION.md"
# `[26 ms, 56 ms](docs/reference/measurements/restarts.md#a-heading)`
BEHIND = re.compile(r"\[([^\]]*\d[^\]]*)\]\(([^)#]+\.md)(?:#([\w-]+))?\)")
NUMBER = re.compile(r"\d[\d.,]*\d|\d")
MEASURED = re.compile(r"\d[\d.,]* ?(?:ms|milliseconds|µs|×|%)(?!\w)")
# What help has by default, or as an example, is no claim.
GIVEN = re.compile(r"\[default: [^\]]*\]|for example [^.;]*|^Example: .*", re.MULTILINE)

# What several places tell; in each the expression has the figure as its groups.
REPEATED: dict[str, tuple[tuple[str, str], ...]] = {
    "kills of make demo": (
        ("README.md", r"boots a VM and kills its backend (\d+) times"),
        ("CONTRIBUTING.md", r"kills its disk's backend (\d+) times"),
        ("Makefile", r"kill its disk's backend (\d+) times"),
        ("src/sempervirt/cli/demo.py", r'How often the backend is killed\.", min=0\)\] = (\d+)'),
    ),
    "how long a host may take to go down": (
        ("packaging/sempervirt-guests.service", r"host down --deadline (\d+)m"),
        ("src/sempervirt/cli/down.py", r'\] = "(\d+)m"'),
        ("docs/operations.md", r"`semper host down`, in (\d+) minutes"),
    ),
    "how long a guest may take to power off then": (
        ("packaging/sempervirt-guests.service", r"host down .*--grace (\d+)s"),
        ("src/sempervirt/cli/down.py", r'\] = "(\d+)s"'),
        ("docs/operations.md", r"its QEMU is ended after (\d+) s"),
    ),
    "memory of a move that is ready": (
        ("src/sempervirt/daemon/main.py", r"for a host that dies \((\d+) MB each"),
        ("docs/operations.md", r"some (\d+) MB for each"),
    ),
    "a domain's disk whose backend is killed": (
        ("SPECIFICATION.md", r"\[(\d+) ms, (\d+) ms\]\(docs/libvirt\.md"),
        ("docs/libvirt.md", r"stalled for (\d+) ms \(median; (\d+) at most\)"),
    ),
    "what make test has to stay under": (
        ("SPECIFICATION.md", r"`make test` on a clean clone.*\| (\d+) minutes \|"),
        ("CONTRIBUTING.md", r"stay under (\d+) minutes"),
    ),
    "another QEMU under a running guest": (
        ("SPECIFICATION.md", r"QEMU is replaced under a running guest: median, most \| \[(\d+) ms"),
        ("README.md", r"another QEMU process.* stands still for some (\d+) ms"),
        (
            "docs/design/saved-states.md",
            r"in a row \(`make restarts`\), nothing else at work \| blackout \d+, (\d+) and",
        ),
    ),
}


def section(text: str, fragment: str | None) -> str:
    """What stands under a heading, up to the next one that is no smaller; all without a heading."""
    if not fragment:
        return text
    found: list[str] = []
    depth = 0
    for line in text.splitlines():
        heading = re.match(r"(#+) (.+)", line)
        if heading and depth and len(heading[1]) <= depth:
            break
        if heading and anchor(heading[2]) == fragment:
            depth = len(heading[1])
        if depth:
            found.append(line)
    return "\n".join(found)


def not_behind(text: str) -> Iterator[str]:
    """Figures of the specification that the page to which they lead does not have."""
    for told, page, fragment in BEHIND.findall(text):
        behind = section((ROOT / page).read_text(), fragment)
        there = {number.replace(",", "") for number in NUMBER.findall(behind)}
        for number in NUMBER.findall(told):
            if number.replace(",", "") not in there:
                yield f"{told}: {page}#{fragment} has no {number}"


def figures(name: str, expression: str) -> tuple[str, ...]:
    text = (ROOT / name).read_text()
    found = re.search(expression, text)
    assert found, f"{name} has no {expression}"
    return found.groups()


def test_the_page_behind_a_claim_has_its_figures() -> None:
    text = SPECIFICATION.read_text()
    assert len(BEHIND.findall(text)) > 10
    assert list(not_behind(text)) == []
    # The control.
    changed = text.replace("[26 ms, 56 ms]", "[27 ms, 56 ms]")
    assert [wrong.partition(":")[0] for wrong in not_behind(changed)] == ["27 ms, 56 ms"]


@pytest.mark.parametrize("claim", REPEATED)
def test_what_several_places_tell_is_the_same(claim: str) -> None:
    told = {name: figures(name, expression) for name, expression in REPEATED[claim]}
    assert len(told) > 1
    assert len(set(told.values())) == 1, told


def test_what_the_readme_measures_is_in_the_specification() -> None:
    known = SPECIFICATION.read_text()
    told = MEASURED.findall((ROOT / "README.md").read_text())
    assert told != []
    assert [figure for figure in told if figure not in known] == []


def test_help_leaves_measured_figures_to_the_specification() -> None:
    assert MEASURED.findall("stands still for some 50 to 300 milliseconds") == ["300 milliseconds"]
    for name, page in manual.pages().items():
        text = GIVEN.sub("", page.replace("\\-", "-"))
        assert MEASURED.findall(text) == [], name
