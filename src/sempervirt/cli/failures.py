"""How a command that failed tells that: a line for people, a JSON document for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import typer

from sempervirt.core.errors import InvalidRequest, SempervirtError, kind_of

# What the command line itself refuses: an unknown option, an argument that is missing.
_USAGE: type[Exception] = next(
    kind
    for kind in typer.BadParameter.__mro__
    if kind.__name__ == "ClickException" and issubclass(kind, Exception)
)
TOLD: tuple[type[Exception], ...] = (SempervirtError, _USAGE, typer.Abort)


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether the result is to be JSON; asked of the words, for the error may be in them."""
    for word, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if word == "--":
            return False
        if word in ("--output", "-o") and following == "json":
            return True
        if word in ("--output=json", "-ojson"):
            return True
    return False


def tell(error: BaseException, *, as_json: bool) -> int:
    """Writes to stderr what went wrong; the exit code."""
    if not isinstance(error, SempervirtError):
        if type(error).__name__ == "NoArgsIsHelpError":  # the help was printed
            return 2
        error = InvalidRequest(_words(error), remedy="see --help")
    kind = kind_of(error)
    if as_json:
        body = {"kind": kind.name, "message": error.message, "remedy": error.remedy}
        sys.stderr.write(json.dumps({"error": body}) + "\n")
        return kind.exit_code
    from rich.markup import escape

    from sempervirt.cli.output import err

    err.print(f"[bold red]semper: error:[/] {escape(error.message)}", highlight=False)
    if error.remedy:
        err.print(f"  {escape(error.remedy)}", highlight=False)
    return kind.exit_code


def _words(error: BaseException) -> str:
    say = getattr(error, "format_message", None)
    return str(say()) if callable(say) else "given up"
