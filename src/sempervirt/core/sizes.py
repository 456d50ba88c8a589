"""Sizes in bytes, as people write them: "512M", "4G", "1.5T" (powers of 1024)."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str | int) -> int:
    """Bytes of `text`: a number with K, M, G, T or P (also KiB, KB), or bytes without a unit.

    Raises ValueError, with a message fit for the user, for anything else.
    """
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise ValueError(f'a size such as "512M" is wanted, not {text!r}')
    if isinstance(text, int):
        if text < 0:
            raise ValueError("a size cannot be negative")
        return text
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f'"{text}" is not a size; write for example "512M" or "4G"')
    number, unit = match.groups()
    letter = re.sub(r"(?i)(?<=[KMGTP])(i?b)$", "", unit).upper()
    if letter not in _UNITS:
        raise ValueError(f'"{unit}" is not a unit of size; use K, M, G, T or P')
    size = float(number) * _UNITS[letter]
    if size != int(size):
        raise ValueError(f'"{text}" is not a whole number of bytes')
    return int(size)


def format_size(size_bytes: int) -> str:
    """`size_bytes` in the largest unit of which there is at least one: "512M", "1.5G", "17"."""
    for unit in ("P", "T", "G", "M", "K"):
        if size_bytes >= _UNITS[unit]:
            return f"{size_bytes / _UNITS[unit]:.1f}".removesuffix(".0") + unit
    return str(size_bytes)
