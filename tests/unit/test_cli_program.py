"""The program itself, apart from what its commands do."""

from typer.testing import CliRunner

import sempervirt
from sempervirt.cli.program import app


def test_the_version_is_told_as_option_and_as_command() -> None:
    option, command = (CliRunner().invoke(app, [word]) for word in ("--version", "version"))
    assert option.exit_code == command.exit_code == 0
    assert option.stdout == command.stdout == f"semper {sempervirt.__version__}\n"


def test_nothing_asked_shows_what_can_be_asked() -> None:
    shown = CliRunner().invoke(app, [])
    assert "Begin with: semper host show" in shown.output
