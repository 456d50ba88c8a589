"""Manual pages of `semper`, one for each command: `python -m sempervirt.cli.manual DIRECTORY`.

What they say is what --help says. click-man does not know typer's own commands, which are no
longer click's. The other programs have pages by help2man (`scripts/deb`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from typer.main import get_command

import sempervirt
from sempervirt.cli import program

ELSEWHERE = ("semperd(8)", "semper-blkd(8)")
# As docs/operations.md has them.
EXIT_STATUS = {
    0: "done",
    1: "failed in a way that has no code of its own",
    2: "the request is wrong",
    4: "nothing has that name",
    5: "a right request at the wrong moment; or another program holds the image",
    6: "certainly not done; also: no agent answers",
    7: "perhaps done: nobody knows",
    8: "failed, and what had begun could not be undone",
    9: "not allowed",
    10: "a VM is lost: nobody can have its memory back",
    130: "Ctrl-C",
}
_OPTION = re.compile(r"(?<![\w-])(--?[a-zA-Z][\w-]*)")


def pages() -> dict[str, str]:
    """The text of each page, by its name without the section: "semper-vm-run"."""
    root = get_command(program.app)
    commands = {**_commands(root), **{name: program.load(name) for name in program.NOUNS}}
    found = {"semper": _page(root, ("semper",), commands)}
    for name, command in commands.items():
        words = ("semper", name)
        found["-".join(words)] = _page(command, words, _commands(command))
        for below, one in _commands(command).items():
            found["-".join((*words, below))] = _page(one, (*words, below), {})
    return found


def write(directory: Path) -> None:
    """Writes each page as a file of section 1."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (directory / f"{name}.1").write_text(text, encoding="utf-8")


def _commands(group: Any) -> Mapping[str, Any]:
    """The commands of a group that its help names."""
    found = getattr(group, "commands", {})
    return {name: one for name, one in found.items() if not one.hidden}


def _page(command: Any, words: tuple[str, ...], below: Mapping[str, Any]) -> str:
    name = "-".join(words)
    paragraphs = _paragraphs(command)
    context = command.make_context(" ".join(words), [], resilient_parsing=True)
    lines = [
        f'.TH "{name.upper()}" 1 "" "sempervirt {sempervirt.__version__}" "sempervirt"',
        ".SH NAME",
        f"{_plain(name)} \\- {_plain(paragraphs[0].rstrip('.'))}",
        ".SH SYNOPSIS",
        *_synopsis(command, words, context),
        ".SH DESCRIPTION",
        *_described(paragraphs),
        *_parameters(command, context),
    ]
    if below:
        lines.append(".SH COMMANDS")
        for one, of in sorted(below.items()):
            page = f"\\fB{_plain('-'.join((*words, one)))}\\fR(1)"
            lines += [".TP", page, _plain(_paragraphs(of)[0])]
    if command.epilog:
        lines += _epilog(command.epilog)
    lines.append(".SH EXIT STATUS")
    for code, meaning in EXIT_STATUS.items():
        lines += [".TP", str(code), _plain(meaning)]
    upper = ["-".join(words[:-1]) + "(1)"] if words[1:] else []
    lines += [".SH SEE ALSO", ", ".join(f"\\fB{_plain(one)}\\fR" for one in (*upper, *ELSEWHERE))]
    return "\n".join(lines) + "\n"


def _paragraphs(command: Any) -> list[str]:
    return [" ".join(part.split()) for part in (command.help or "").split("\n\n")]


def _synopsis(command: Any, words: tuple[str, ...], context: Any) -> list[str]:
    pieces = " ".join(command.collect_usage_pieces(context)).replace("{", "").replace("}", "")
    return [f"\\fB{_plain(' '.join(words))}\\fR {_plain(pieces)}"]


def _described(paragraphs: list[str]) -> Iterator[str]:
    for paragraph in paragraphs:
        yield ".PP"
        yield _emphasised(paragraph)


def _parameters(command: Any, context: Any) -> list[str]:
    """Arguments, then options, each with what help says of it."""
    lines: list[str] = []
    for title, kind in (("ARGUMENTS", "argument"), ("OPTIONS", "option")):
        found = [
            one.get_help_record(context)
            for one in command.get_params(context)
            if one.param_type_name == kind and not getattr(one, "hidden", False)
        ]
        told = [record for record in found if record is not None]
        if told:
            lines.append(f".SH {title}")
        for term, text in told:
            lines += [".TP", _emphasised(term), _emphasised(" ".join(text.split()))]
    return lines


def _epilog(text: str) -> list[str]:
    """An example is one line that can be copied."""
    title, colon, example = text.partition(": ")
    if colon and title == "Example":
        return [".SH EXAMPLE", ".EX", _plain(example), ".EE"]
    return [".PP", _emphasised(text)]


def _plain(text: str) -> str:
    """As it is, for roff: no escapes, no requests, and hyphens that can be copied."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped[:1] in (".", "'") else escaped


def _emphasised(text: str) -> str:
    """With options in bold."""
    parts = _OPTION.split(text)
    shown = "".join(
        f"\\fB{_plain(part)}\\fR" if at % 2 else part.replace("\\", "\\e")
        for at, part in enumerate(parts)
    )
    return f"\\&{shown}" if shown[:1] in (".", "'") else shown


if __name__ == "__main__":
    write(Path(sys.argv[1]))
