"""Help, and the manual pages that are made of it: every command has an example that it takes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from sempervirt.cli import manual, program
from sempervirt.core.errors import KINDS
from tests.unit.test_docs import ROOT

# Ctrl-C, and what is no error.
OTHERS = {0, 130}


def commands() -> Iterator[tuple[str, Any]]:
    """Every command, also one that help does not name, with its words."""
    yield from walked(get_command(program.app), "semper")
    for noun in program.NOUNS:
        yield from walked(program.load(noun), f"semper {noun}")


def walked(command: Any, words: str) -> Iterator[tuple[str, Any]]:
    below = getattr(command, "commands", {})
    is_noun = words.removeprefix("semper ") in program.NOUNS
    if getattr(command, "invoke_without_command", False) or not (below or is_noun):
        yield words, command
    for name, one in below.items():
        yield from walked(one, f"{words} {name}")


ALL = dict(commands())


def example_of(command: Any) -> str:
    """The example in the help of a command; empty when it has none."""
    found = re.match(r"Example: (semper .+)", command.epilog or "")
    return found[1] if found else ""


def taken(example: str) -> bool:
    """Whether `semper` knows the options of a command, which is not carried out."""
    words = shlex.split(example)
    return CliRunner().invoke(program.app, [*words[1:], "--help"]).exit_code == 0


def test_there_are_commands() -> None:
    assert len(ALL) > 60
    assert {"semper vm run", "semper demo", "semper events"} <= set(ALL)


@pytest.mark.parametrize("words", ALL)
def test_every_command_has_an_example_that_it_takes(words: str) -> None:
    example = example_of(ALL[words])
    assert f"{example} ".startswith(f"{words} "), f"help of {words} needs epilog='Example: …'"
    assert taken(example), example


def test_an_example_with_an_option_that_there_is_not_is_found() -> None:
    assert not taken("semper vm stop web --graze 30")
    assert example_of(type("Command", (), {"epilog": "See there."})) == ""


def test_every_command_has_a_page_with_its_example_and_all_of_its_options() -> None:
    pages = manual.pages()
    for words, command in ALL.items():
        if command.hidden:
            continue
        page = pages[words.replace(" ", "-")].replace("\\-", "-").replace("\\e", "\\")
        assert example_of(command) in page, words
        for parameter in command.params:
            if not getattr(parameter, "hidden", False) and parameter.param_type_name == "option":
                assert all(option in page for option in parameter.opts), (words, parameter.opts)


def test_the_pages_tell_all_exit_codes_and_so_do_the_documents() -> None:
    assert {kind.exit_code for kind in KINDS} | OTHERS == set(manual.EXIT_STATUS)
    operations = (ROOT / "docs/operations.md").read_text()
    codes = re.findall(r"^\| (\d+) \|", operations.partition("## Exit codes")[2], re.MULTILINE)
    assert {int(code) for code in codes} == set(manual.EXIT_STATUS)


@pytest.mark.skipif(
    not os.environ.get("CI") and not shutil.which("man"), reason="needs man (man-db)"
)
def test_man_shows_every_page_without_a_warning(tmp_path: Path) -> None:
    manual.write(tmp_path)
    pages = sorted(tmp_path.iterdir())
    assert len(pages) > 60
    assert warnings(pages) == ""
    # The control.
    wrong = tmp_path / "wrong.1"
    wrong.write_text(pages[0].read_text() + ".XYZ\n")
    assert "XYZ" in warnings([wrong])


def warnings(pages: list[Path]) -> str:
    command = ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", *map(str, pages)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return shown.stderr
