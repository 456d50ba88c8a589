"""The documents lead where they say: links, headings, files of this repository, and the map."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAP = ROOT / "docs/README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "bench/README.md"])
# What a reader of the map is led to.
MAPPED = sorted(
    path
    for path in (*PAGES, *ROOT.glob("docs/**/*.json"), *ROOT.glob("docs/**/*.feature"))
    if path != MAP and path.is_relative_to(ROOT / "docs")
)
# A file is named from the root, or from the package or crate that a document is about.
PLACES = (ROOT, ROOT / "src/sempervirt", ROOT / "crates", ROOT / "tests", ROOT / "docs")
SUFFIXES = ("py", "rs", "md", "json", "toml", "feature")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(rf"`((?:[\w.-]+/)+(?:[\w.-]+\.(?:{'|'.join(SUFFIXES)}))?)`")
FILE = re.compile(r"`(test_[\w-]+\.py|[\w-]+\.(?:py|rs))(?:::\w+)?`")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
# `file.py` (`name`): the file has that name in it.
NAMED = re.compile(r"`([\w./-]+\.(?:py|rs))` \(`(\w+)`")
# `tests/unit/test_docs.py::test_places` is a test of that name.
TEST = re.compile(r"`([\w./-]+\.(?:py|rs))::(\w+)`")
FAULTS = ROOT / "docs/reference/faults-tried.md"
# What is made here or at the agent, and is not in a clone.
MADE = ("dist/", "results/", "STATE_DIR/")


def prose(path: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchor(heading: str) -> str:
    """The anchor of a heading, as it is made by the usual viewers of Markdown."""
    kept = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
    return kept.strip().replace(" ", "-")


def broken_links(path: Path) -> Iterator[str]:
    for target in LINK.findall(prose(path)):
        if "://" in target:
            continue
        name, _, fragment = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        if not page.exists():
            yield f"no file: {target}"
        elif fragment and fragment not in map(anchor, HEADING.findall(page.read_text())):
            yield f"no heading: {target}"


def found(name: str) -> Path | None:
    """Where a file or folder is that a document names."""
    return next((place / name for place in PLACES if (place / name).exists()), None)


def missing_files(path: Path) -> Iterator[str]:
    for name in PATH.findall(path.read_text()):
        if not name.startswith(MADE) and found(name) is None:
            yield f"no file: {name}"
    for name, word in NAMED.findall(path.read_text()):
        place = found(name)
        if place is not None and not re.search(rf"\b{word}\b", place.read_text()):
            yield f"no {word} in {name}"


def missing_tests(text: str) -> Iterator[str]:
    """Tests that a document names as `file::function`, and that are not there."""
    for name, function in TEST.findall(text):
        path = ROOT / name
        kind = "fn" if name.endswith(".rs") else "def"
        if not path.is_file():
            yield f"no file: {name}"
        elif not re.search(rf"^\s*(?:async )?{kind} {function}\b", path.read_text(), re.MULTILINE):
            yield f"no {function} in {name}"


def untested(text: str) -> Iterator[str]:
    """Rows of tables of faults that name no test, or no control."""
    for row in text.splitlines():
        cells = row.strip("|").split("|")
        if row.startswith("|") and len(cells) == 4 and cells[0].strip() not in ("fault", "---"):
            if not TEST.search(cells[2]):
                yield f"no test: {cells[0].strip()}"
            if not cells[3].strip():
                yield f"no control: {cells[0].strip()}"


def unknown_names(path: Path, known: set[str]) -> Iterator[str]:
    return (f"no file: {name}" for name in FILE.findall(path.read_text()) if name not in known)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_leads_where_it_says(path: Path) -> None:
    assert [*broken_links(path), *missing_files(path)] == []


def test_files_that_are_named_without_a_folder_exist() -> None:
    folders = ("src", "crates", "tests", "lab", "bench", "fuzz")
    known = {
        path.name
        for folder in folders
        for suffix in ("py", "rs")
        for path in (ROOT / folder).rglob(f"*.{suffix}")
    }
    known.add("setup.py")
    wrong = {str(path.relative_to(ROOT)): [*unknown_names(path, known)] for path in PAGES}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_the_map_leads_to_every_document() -> None:
    linked = {
        (MAP.parent / target.partition("#")[0]).resolve() for target in LINK.findall(prose(MAP))
    }
    assert [str(path.relative_to(ROOT)) for path in MAPPED if path not in linked] == []
    top = {path for path in PAGES if path.parent == ROOT}
    assert [path.name for path in top if path not in linked] == []


def test_each_test_that_a_document_names_is_there() -> None:
    wrong = {str(path.relative_to(ROOT)): [*missing_tests(path.read_text())] for path in PAGES}
    assert {path: names for path, names in wrong.items() if names} == {}
    text = FAULTS.read_text()
    assert len(TEST.findall(text)) > 100
    assert [*untested(text)] == []


def test_a_test_that_is_not_there_is_seen() -> None:
    here = "tests/unit/test_docs.py"
    rows = (
        f"| fault | now | test | control |\n|---|---|---|---|\n"
        f"| one | a | `{here}::test_of_nobody`, `tests/gone.py::test_it` | in it |\n"
        f"| two | a | `{here}::missing_tests` |  |\n| three | a | nobody | in it |\n"
    )
    assert [*missing_tests(rows)] == [f"no test_of_nobody in {here}", "no file: tests/gone.py"]
    assert [*untested(rows)] == ["no control: two", "no test: three"]


def test_what_leads_nowhere_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `word`\n[a](#one-word) [b](#two) [c](gone.md) `vm/gone.py` `vm/vm.py` (`nobody`)\n"
    )
    assert [*broken_links(page)] == ["no heading: #two", "no file: gone.md"]
    assert [*missing_files(page)] == ["no file: vm/gone.py", "no nobody in vm/vm.py"]
    assert [*unknown_names(page, {"a.py"})] == []
