"""`semper` answers at once, ends at once at Ctrl-C, and says to programs what went wrong."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

# What takes long to import, and no help needs.
HEAVY = {"cryptography", "fastapi", "httpx", "jeepney", "qemu.qmp", "uvicorn"}
OURS_MOST = 80
# Of the processor time that it would take with the whole agent imported: a quarter of it.
HELP_SHARE = 0.6

EVERY_HELP = """
import json, sys
from sempervirt.cli import program
from sempervirt.cli.main import main

def run(*words):
    sys.argv = ["semper", *words]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, (words, end.code)

run("--version")
run("-h")
for noun in program.NOUNS:
    run(noun, "-h")  # builds all its commands
run("vm", "run", "--help")
print(json.dumps(sorted(sys.modules)))
"""
INTERRUPTED_AT = """
import os, signal, sys

MODULE = sys.argv.pop(1)

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == MODULE:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from sempervirt.cli.main import main
main()
"""


def run_python(code: str, *words: str, place: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "SEMPERVIRT_STATE_DIR": str(place / "state"),
        "SEMPERVIRT_RUN_DIR": str(place / "run"),
    }
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )


Semper = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def semper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Semper]:
    """Runs the program in this process: its exit code, and what it wrote to stdout and stderr."""
    from sempervirt.cli import main

    monkeypatch.setenv("SEMPERVIRT_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SEMPERVIRT_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setattr("sempervirt.cli.output.err", Console(stderr=True, width=200))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    handler = signal.getsignal(signal.SIGINT)

    def _run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["semper", *words])
        with pytest.raises(SystemExit) as end:
            main.main()
        shown = capsys.readouterr()
        return int(end.value.code or 0), shown.out, shown.err

    yield _run
    signal.signal(signal.SIGINT, handler)


def test_no_help_imports_the_agent(tmp_path: Path) -> None:
    shown = run_python(EVERY_HELP, place=tmp_path)
    assert shown.returncode == 0, shown.stderr
    modules = json.loads(shown.stdout.splitlines()[-1])
    assert HEAVY & set(modules) == set()
    ours = [name for name in modules if name.startswith("sempervirt.")]
    assert not [name for name in ours if name.startswith(("sempervirt.agent", "sempervirt.api"))]
    assert len(ours) < OURS_MOST


def test_what_asks_the_agent_does_import_it(tmp_path: Path) -> None:
    """The control: the same list of modules names what a command has needed."""
    code = EVERY_HELP.replace("== 0", "== 6").replace('run("--version")', 'run("vm", "list")')
    code = code[: code.index('run("-h")')] + code[code.index("print(") :]
    modules = json.loads(run_python(code, place=tmp_path).stdout.splitlines()[-1])
    assert {"asyncio", "httpx", "sempervirt.api.client"} <= set(modules)


def test_a_help_takes_little_processor_time(tmp_path: Path) -> None:
    """Beside that of the same help with all that it does without."""

    def used_s(imported: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        code = f"import {imported}; from sempervirt.cli.main import main; main()"
        assert run_python(code, "vm", "run", "--help", place=tmp_path).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert used_s("sys") < HELP_SHARE * used_s("sempervirt.api.app")


@pytest.mark.parametrize(
    "module", ["sempervirt.cli.program", "sempervirt.cli.vm", "sempervirt.api.client"]
)
def test_ctrl_c_ends_the_program_without_a_traceback(module: str, tmp_path: Path) -> None:
    """At any time: here in the middle of an import, which is most of what a command does."""
    ended = run_python(INTERRUPTED_AT, module, "vm", "list", place=tmp_path)
    assert ended.returncode in (130, -2)  # a shell shows both as 130
    assert ended.stderr.strip() == ""


def test_without_ctrl_c_the_same_command_says_what_is_missing(tmp_path: Path) -> None:
    ended = run_python(INTERRUPTED_AT, "nothing", "vm", "list", place=tmp_path)
    assert ended.returncode == 6
    assert "error" in ended.stderr


@pytest.mark.parametrize(
    ("words", "kind", "code"),
    [
        (("vm", "list", "--output", "json"), "no-agent", 6),
        (("vm", "run", "there-is-no-such.toml", "-o", "json"), "invalid", 2),
        (("vm", "show", "--output=json"), "invalid", 2),
        (("vm", "list", "--outptu", "json", "-o", "json"), "invalid", 2),
    ],
)
def test_errors_are_json_where_results_are(
    words: tuple[str, ...], kind: str, code: int, semper: Semper
) -> None:
    ended, out, err = semper(*words)
    assert (ended, out) == (code, "")
    error = json.loads(err)["error"]
    assert error["kind"] == kind
    assert error["message"]


def test_nothing_asked_is_no_error_of_the_program(semper: Semper) -> None:
    code, out, err = semper()
    assert (code, err) == (2, "")
    assert "Begin with" in out


def test_errors_are_a_line_for_people_otherwise(semper: Semper) -> None:
    code, _, err = semper("vm", "list")
    assert code == 6
    assert err.startswith("semper: error: ")


def test_a_saved_state_is_not_replaced_unasked(semper: Semper, tmp_path: Path) -> None:
    file = tmp_path / "web.saved"
    file.write_text("the only copy")
    code, _, err = semper("vm", "save", "web", str(file))
    assert code == 5
    assert "--force" in err
    # The agent would be asked; there is none.
    assert semper("vm", "save", "web", str(file), "--force")[0] == 6
    assert semper("vm", "save", "web", str(tmp_path / "new.saved"))[0] == 6
    assert file.read_text() == "the only copy"


def test_what_a_noun_is_for_is_said_in_one_way() -> None:
    from sempervirt.cli import program

    for name, noun in program.NOUNS.items():
        help_text = str(program.load(name).help)
        assert help_text.splitlines()[0] == noun.help, name
