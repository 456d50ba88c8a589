"""How a command that failed tells that: a line for people, a JSON document for programs."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Sequence

import typer

from sempervirt.core.errors import InvalidRequest, SempervirtError, Unavailable, kind_of
from sempervirt.core.remedies import of_system, remedy_of

# What the command line itself refuses: an unknown option, an argument that is missing.
_USAGE: type[Exception] = next(
    kind
    for kind in typer.BadParameter.__mro__
    if kind.__name__ == "ClickException" and issubclass(kind, Exception)
)
TOLD: tuple[type[Exception], ...] = (SempervirtError, _USAGE, typer.Abort, OSError)
# For whoever is told no other.
_FOR_KINDS = {
    "spec": "every key, with an example: docs/reference/vm-file.md",
    "invalid": "what is taken: --help of this command",
    "not-found": "what there is: semper vm list, semper disk list",
}


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
    if type(error).__name__ == "NoArgsIsHelpError":  # the help was printed
        return 2
    if isinstance(error, BrokenPipeError):  # whoever reads wants no more
        return 1
    told = error if isinstance(error, SempervirtError) else _named(error)
    kind = kind_of(told)
    remedy = remedy_of(told) or _FOR_KINDS.get(kind.name, "")
    if as_json:
        body = {"kind": kind.name, "message": told.message, "remedy": remedy}
        sys.stderr.write(json.dumps({"error": body}) + "\n")
        return kind.exit_code
    from rich.markup import escape

    from sempervirt.cli.output import err

    err.print(
        f"[bold red]semper: error:[/] {escape(told.message)}", highlight=False, soft_wrap=True
    )
    if remedy:
        err.print(f"  {escape(remedy)}", highlight=False, soft_wrap=True)
    return kind.exit_code


def finish() -> SempervirtError | None:
    """Writes what was printed and is still to be written. Why that failed, if it did; nobody tries
    again then, and a reader that wants no more (`| head`) is no failure.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        if error.errno != errno.EPIPE:
            return Unavailable(
                f"the output cannot be written: {error.strerror}", remedy=of_system(error)
            )
    return None


def _named(error: BaseException) -> SempervirtError:
    """What is no error of ours, named by its remedy."""
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{error.filename}: "
        return Unavailable(f"{where}{error.strerror or error}", remedy=of_system(error))
    if isinstance(error, typer.Abort):
        return SempervirtError("given up; nothing was done", remedy="answer the question with y")
    path = getattr(getattr(error, "ctx", None), "command_path", "semper")
    say = getattr(error, "format_message", str)
    return InvalidRequest(str(say() if say is not str else error), remedy=f"see: {path} --help")
