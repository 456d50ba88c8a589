"""The guest of the guard's trial: a boot sector that counts (`counter.s`), and its reader.

A Linux guest takes minutes to boot where the host is itself emulated; this one counts within a
second. A count that is missing was lost, a count that comes twice ran twice, and another nonce is
another boot.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

SECTOR = 512
# `counter.s`, assembled; a test assembles it again.
CODE = bytes.fromhex(
    "fa31c08ed88ed0bc007cfb0f316689c66631db6643b043e83d006689f2e819006689dae81300b00ae82c0066"
    "a16c04f46639066c0474f8ebdab020e81900b9080066c1c20488d0240f04303c3976020407e80300e2ebc352"
    "50bafd03eca82074fb58baf803ee5ac3"
)
SIGNATURE = b"\x55\xaa"
# So long a tick of the timer takes, in which it counts once: 65536 / 1193182 s.
TICK_S = 65536 / 1193182
_LINE = re.compile(r"^C ([0-9A-F]{8}) ([0-9A-F]{8})$", re.MULTILINE)


def disk(size_bytes: int = 1 << 20) -> bytes:
    """An image that boots the counter."""
    sector = CODE.ljust(SECTOR - len(SIGNATURE), b"\0") + SIGNATURE
    return sector.ljust(size_bytes, b"\0")


@dataclass(frozen=True)
class Count:
    """One line of the guest."""

    nonce: int
    number: int


def read(text: str) -> list[Count]:
    """The whole lines in what the guest has written; half a line at the end is left out."""
    whole = text[: text.rfind("\n") + 1]
    return [Count(int(nonce, 16), int(number, 16)) for nonce, number in _LINE.findall(whole)]


def lost(here: str, there: str) -> str:
    """What is wrong with what the guest has said on one host and then on the other, or "".

    The first count there has to be the one after the last here, without a gap on either side, all
    of one boot. A line may have begun here and ended there: the guest is stopped between two bytes.
    """
    before, after = read(here), read(there)
    if not before or not after:
        return f"the guest was heard {len(before)} times here and {len(after)} times there"
    lines = (here + there).split("\n")[:-1]
    # Before its first count the firmware speaks, and nobody after that.
    first = next(number for number, line in enumerate(lines) if _LINE.match(line))
    for line in lines[first:]:
        if not _LINE.fullmatch(line):
            return f"a line is damaged: {line!r}"
    counts = read(here + there)
    if len({count.nonce for count in counts}) != 1:
        return "the guest has booted again"
    for one, other in itertools.pairwise(counts):
        if other.number != one.number + 1:
            return f"after {one.number} comes {other.number}"
    return ""
