"""Damage, from a seed: what a disk error, a full file system, another release or a person may leave
in the place of a file that outlives a process.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# How many damaged files each test tries; `make records` asks for 100,000.
MUTATIONS = int(os.environ.get("SEMPERVIRT_MUTATIONS", "60"))
SPARSE_BYTES = 1 << 30
DEPTH = 100_000

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 2**64, -(2**70), 0.5, -0.0, 1e308, "", "a", "web",
    "other", "\0", "a\0b", "/", "..", "../../etc", "é", "\ud800", "1", "x" * 5000, [], {}, [[]],
    [0], [1, 2], ["a"], {"a": 1}, {"version": 2}, "active", "spare", "running", "stopped",
)  # fmt: skip
_TEXTS = (
    b"", b"\0", b"\0" * 4096, b"{", b"[]", b"{}", b"null", b"1", b'"a"',
    b"\xff\xfe\x00", b"\xed\xa0\x80",
    b'{"version": NaN}', b'{"version": Infinity}', b'{"version": 1e400}', b'{"version": true}',
    b'{"version": 1}', b'{"version": 2}', b'{"version": 3}', b'{"version": 1.0}',
    b'{"version": ' + b"9" * 5000 + b"}", b"[" * DEPTH, b'{"a":' * DEPTH, b"\xef\xbb\xbf{}",
    b"SQLite format 3\0" + b"\0" * 100,
)  # fmt: skip


def damage(path: Path, sound: Sequence[bytes], seed: int) -> str:
    """Puts something else in the place of the file `path`, made from one of `sound`; in words."""
    dice = random.Random(seed)
    clear(path)
    kind, mutate = dice.choices(_KINDS, weights=[weight for weight, _, _ in _WEIGHED])[0]
    mutate(path, dice.choice(sound), dice)
    return f"seed {seed}: {kind}"


def clear(path: Path) -> None:
    """Removes whatever stands at `path`."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _bytes(path: Path, sound: bytes, dice: random.Random) -> None:
    content = bytearray(sound)
    for _ in range(dice.choice((1, 1, 1, 2, 5, 40))):
        at = dice.randrange(len(content) + 1)
        piece = slice(at, at + dice.choice((1, 1, 2, 8, 64, 4096)))
        match dice.randrange(6):
            case 0:
                content[piece] = bytes(len(content[piece]))
            case 1:
                content[piece] = dice.randbytes(len(content[piece]))
            case 2:
                del content[piece]
            case 3:
                content[at:at] = content[piece]
            case 4:
                content[at:at] = dice.choice(
                    (b"0", b"9", b'"', b",", b"{", b"-", b"\\u0000", b"e9")
                )
            case _:
                if at < len(content):
                    content[at] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def _cut(path: Path, sound: bytes, dice: random.Random) -> None:
    path.write_bytes(sound[: dice.randrange(len(sound) + 1)])


def _text(path: Path, _: bytes, dice: random.Random) -> None:
    path.write_bytes(dice.choice(_TEXTS))


def _tree(path: Path, sound: bytes, dice: random.Random) -> None:
    """Values of other types, keys that are missing or twice, subtrees in other places."""
    try:
        content = json.loads(sound)
    except ValueError:
        _bytes(path, sound, dice)
        return
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        places = list(_places(content))
        holder, key = dice.choice(places)
        match dice.randrange(4):
            case 0:
                del holder[key]
            case 1:
                other, its_key = dice.choice(places)
                with contextlib.suppress(KeyError, IndexError, TypeError):
                    holder[key] = json.loads(json.dumps(other[its_key]))
            case 2 if isinstance(holder, dict):
                holder[dice.choice(("a", "", "work", "end", "qemu", "name"))] = _value(dice)
            case _:
                holder[key] = _value(dice)
        if not list(_places(content)):
            break
    path.write_bytes(json.dumps(content).encode(errors="surrogatepass"))


def _value(dice: random.Random) -> Any:
    """A value of its own, since the next change may be inside it."""
    return json.loads(json.dumps(dice.choice(_VALUES)))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree."""
    found: list[tuple[Any, Any]] = []
    match tree:
        case dict():
            keys: list[Any] = list(tree)
        case list():
            keys = list(range(len(tree)))
        case _:
            return found
    for key in keys:
        found.append((tree, key))
        found += _places(tree[key])
    return found


def _gone(path: Path, _: bytes, __: random.Random) -> None:
    clear(path)


def _other_file(path: Path, sound: bytes, dice: random.Random) -> None:
    """Something that is no regular file, or one that is far too large."""
    match dice.randrange(8):
        case 0:
            path.mkdir()
        case 1:
            path.mkdir()
            (path / "file").write_bytes(sound)
        case 2:
            os.mkfifo(path)
        case 3:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
        case 4:
            path.symlink_to(path.name)
        case 5:
            path.symlink_to(dice.choice(("/dev/zero", f"{path}.elsewhere", "/proc/self/mem", "/")))
        case 6:
            path.write_bytes(sound)
            os.truncate(path, SPARSE_BYTES)
        case _:
            path.write_bytes(sound)
            path.chmod(0)


_WEIGHED: tuple[tuple[int, str, Callable[[Path, bytes, random.Random], None]], ...] = (
    (40, "another tree", _tree),
    (30, "other bytes", _bytes),
    (10, "cut off", _cut),
    (8, "another text", _text),
    (2, "gone", _gone),
    (10, "another kind of file", _other_file),
)
_KINDS = [(name, mutate) for _, name, mutate in _WEIGHED]
