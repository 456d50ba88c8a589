"""The line of a key in a TOML text, which the standard library's parser does not tell.

Only the shape of the text is read: tables, arrays of tables, keys at the beginning of a line
and the extent of multi-line values. The text is known to be valid TOML.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

Key = str | int
_HEADER = re.compile(r"\s*\[(\[)?\s*(?P<path>[^\[\]]+?)\s*\](?(1)\])\s*(?:#.*)?")
_PAIR = re.compile(r"""\s*(?P<key>(?:"[^"]*"|'[^']*'|[\w-]+)(?:\s*\.\s*(?:"[^"]*"|[\w-]+))*)\s*=""")
_PART = re.compile(r""""([^"]*)"|'([^']*)'|([\w-]+)""")
_STRING_OR_COMMENT = re.compile(r"""\"(?:\\.|[^"\\])*\"|'[^']*'|\#.*""")


def find_line(text: str, path: Sequence[Key]) -> int:
    """The 1-based line of the longest leading part of `path` that stands in the file; 0 for none.

    `path` is as pydantic gives it: ("disks", 0, "image").
    """
    best_line, best_length = 0, 0
    for line, written in _keys(text):
        length = _shared(written, path)
        if length > best_length and length == len(written):
            best_line, best_length = line, length
    return best_line


def _shared(written: Sequence[Key], path: Sequence[Key]) -> int:
    for count, (one, other) in enumerate(zip(written, path, strict=False)):
        if one != other:
            return count
    return min(len(written), len(path))


def _keys(text: str) -> Iterator[tuple[int, tuple[Key, ...]]]:
    table: tuple[Key, ...] = ()
    counts: dict[str, int] = {}
    closing, depth = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if closing:  # within a multi-line string
            closing = "" if closing in line else closing
            continue
        if depth > 0:  # within a multi-line array
            depth += _depth(line)
            continue
        if header := _HEADER.fullmatch(line):
            table = _table_path(header["path"], counts, array=header[1] is not None)
            yield number, table
        elif pair := _PAIR.match(line):
            yield number, (*table, *_parts(pair["key"]))
            value = line[pair.end() :]
            closing = _opened_string(value)
            depth = 0 if closing else _depth(value)


def _parts(key: str) -> tuple[str, ...]:
    return tuple("".join(groups) for groups in _PART.findall(key))


def _table_path(text: str, counts: dict[str, int], *, array: bool) -> tuple[Key, ...]:
    """The path of a table; the last component of an array of tables gets its index."""
    path: list[Key] = []
    parts = _parts(text)
    for count, part in enumerate(parts, start=1):
        path.append(part)
        name = ".".join(parts[:count])
        if count == len(parts) and array:
            counts[name] = counts.get(name, -1) + 1
        if name in counts:
            path.append(counts[name])
    return tuple(path)


def _opened_string(value: str) -> str:
    """The quotes that end a multi-line string which begins in `value`."""
    start = value.strip()[:3]
    if start in ('"""', "'''") and value.strip().count(start) % 2:
        return start
    return ""


def _depth(text: str) -> int:
    bare = _STRING_OR_COMMENT.sub("", text)
    return sum(bare.count(c) for c in "[{") - sum(bare.count(c) for c in "]}")
