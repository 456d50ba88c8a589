"""What each sign means: the shipped presets, and an operator's file above them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from sempervirt.core.errors import InvalidRequest
from sempervirt.core.names import suggest
from sempervirt.guard.signs import SignId

OPERATORS_FILE = Path("/etc/sempervirt/guard.toml")
SHIPPED = "presets.toml"
VERSION = 1
FILE_BYTES_MAX = 256 << 10
# Nobody waits for longer than a day, nor counts so many signs.
SECONDS_MAX = 86400.0
TIMES_MAX = 1000


class Meaning(Enum):
    """What a sign means."""

    IGNORE = "ignore"
    WATCH = "watch"
    EVACUATE = "evacuate"
    LET_DIE = "let-die"


class ModulePolicy(Enum):
    """What the module survives; see docs/design/guard.md."""

    OBSERVE = "observe"
    STRICT = "strict"
    LENIENT = "lenient"
    IRQ_RESTART = "irq-restart"


class Afterwards(Enum):
    """What becomes of the host once nothing is left to be saved."""

    LET_GO = "let-go"
    STAY = "stay"


@dataclass(frozen=True)
class Rule:
    """The meaning of one sign, which takes effect when it was seen `at_least` times in `within_s`
    seconds. With `load_module` each one also has the module loaded.
    """

    meaning: Meaning
    at_least: int = 1
    within_s: float = 3600.0
    load_module: bool = False


@dataclass(frozen=True)
class Presets:
    """Every sign has its rule. `files` are those that were read, the strongest last."""

    rules: Mapping[SignId, Rule]
    deadline_s: float
    retry_after_s: float
    attempts: int
    hold_s: float
    module_policy: ModulePolicy
    afterwards: Afterwards
    files: tuple[str, ...]


EnumT = TypeVar("EnumT", bound=Enum)


@dataclass(frozen=True)
class _Place:
    """A key of a file, for messages."""

    file: str
    key: str

    def wrong(self, message: str, remedy: str = "") -> InvalidRequest:
        """The error of this key."""
        return InvalidRequest(f"{self.file}: {self.key}: {message}", remedy=remedy)

    def of(self, key: str) -> _Place:
        """A key of this table."""
        return _Place(self.file, f"{self.key}.{key}" if self.key else key)

    def word(self, value: object, words: type[EnumT]) -> EnumT:
        """One of the words of an enum."""
        try:
            return words(value)
        except ValueError as error:
            known = ", ".join(str(word.value) for word in words)
            raise self.wrong(f"{value!r} is none of: {known}") from error

    def number(self, value: object, least: float, most: float) -> float:
        """A number between bounds; no boolean, and neither an infinity nor NaN."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(f"{value!r} is no number")
        if not least <= value <= most:
            raise self.wrong(f"{value!r} is not between {least:g} and {most:g}")
        return float(value)

    def whole(self, value: object, least: int, most: int) -> int:
        """A whole number between bounds."""
        if not isinstance(value, int):
            raise self.wrong(f"{value!r} is no whole number")
        return int(self.number(value, least, most))

    def truth(self, value: object) -> bool:
        """true or false."""
        if not isinstance(value, bool):
            raise self.wrong(f"{value!r} is neither true nor false")
        return value

    def table(self, value: object, known: Iterable[str]) -> dict[str, Any]:
        """A table that has no other keys than these."""
        if not isinstance(value, dict):
            raise self.wrong(f"{value!r} is no table")
        names = list(known)
        for key in value:
            if key not in names:
                hint = suggest(key, names)
                raise self.of(f'"{key}"').wrong("there is no such key", hint)
        return value


def load(operators: Path | None = OPERATORS_FILE) -> Presets:
    """The shipped presets with those of an operator's file above them, if there is such a file.

    Raises InvalidRequest, which names file, key and value.
    """
    presets = shipped()
    text = None if operators is None else _read(operators)
    return presets if text is None else above(presets, text, str(operators))


def shipped() -> Presets:
    """Those of this release; every sign has a rule in them."""
    text = resources.files("sempervirt.guard").joinpath(SHIPPED).read_text(encoding="utf-8")
    base = Presets(
        rules={}, deadline_s=0.0, retry_after_s=0.0, attempts=0, hold_s=0.0,
        module_policy=ModulePolicy.STRICT, afterwards=Afterwards.LET_GO, files=(),
    )  # fmt: skip
    presets = above(base, text, SHIPPED)
    missing = sorted(sign.value for sign in SignId if sign not in presets.rules)
    if missing:
        raise InvalidRequest(f"{SHIPPED}: no meaning for: {', '.join(missing)}")
    return presets


def above(presets: Presets, text: str, file: str) -> Presets:
    """`presets` with what a file's text says instead. Raises InvalidRequest."""
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidRequest(f"{file}: not TOML: {error}") from error
    top = _Place(file, "")
    top.table(content, ("version", "signs", "evacuation", "shutdown", "module"))
    if content.get("version") != VERSION:
        raise top.of("version").wrong(f"{content.get('version')!r}", f"write version = {VERSION}")
    presets = replace(presets, files=(*presets.files, file))
    presets = _with_signs(presets, content.get("signs", {}), top.of("signs"))
    presets = _with_evacuation(presets, content.get("evacuation", {}), top.of("evacuation"))
    place = top.of("shutdown")
    shutdown = place.table(content.get("shutdown", {}), ("hold_s",))
    if "hold_s" in shutdown:
        held = place.of("hold_s").number(shutdown["hold_s"], 0, SECONDS_MAX)
        presets = replace(presets, hold_s=held)
    return _with_module(presets, content.get("module", {}), top.of("module"))


def _with_signs(presets: Presets, value: object, place: _Place) -> Presets:
    table = place.table(value, (sign.value for sign in SignId))
    rules = dict(presets.rules)
    for name, written in table.items():
        rules[SignId(name)] = _rule(written, place.of(f'"{name}"'))
    return replace(presets, rules=rules)


def _rule(value: object, place: _Place) -> Rule:
    if isinstance(value, str):
        return Rule(place.word(value, Meaning))
    table = place.table(value, ("meaning", "at_least", "within_s", "load_module"))
    if "meaning" not in table:
        raise place.of("meaning").wrong("is missing")
    rule = Rule(place.of("meaning").word(table["meaning"], Meaning))
    if "at_least" in table:
        times = place.of("at_least").whole(table["at_least"], 1, TIMES_MAX)
        rule = replace(rule, at_least=times)
    if "within_s" in table:
        rule = replace(
            rule, within_s=place.of("within_s").number(table["within_s"], 1, SECONDS_MAX)
        )
    if "load_module" in table:
        rule = replace(rule, load_module=place.of("load_module").truth(table["load_module"]))
    return rule


def _with_evacuation(presets: Presets, value: object, place: _Place) -> Presets:
    table = place.table(value, ("deadline_s", "retry_after_s", "attempts"))
    if "deadline_s" in table:
        number = place.of("deadline_s").number(table["deadline_s"], 1, SECONDS_MAX)
        presets = replace(presets, deadline_s=number)
    if "retry_after_s" in table:
        number = place.of("retry_after_s").number(table["retry_after_s"], 1, SECONDS_MAX)
        presets = replace(presets, retry_after_s=number)
    if "attempts" in table:
        times = place.of("attempts").whole(table["attempts"], 1, TIMES_MAX)
        presets = replace(presets, attempts=times)
    return presets


def _with_module(presets: Presets, value: object, place: _Place) -> Presets:
    table = place.table(value, ("policy", "afterwards"))
    if "policy" in table:
        word = place.of("policy").word(table["policy"], ModulePolicy)
        presets = replace(presets, module_policy=word)
    if "afterwards" in table:
        afterwards = place.of("afterwards").word(table["afterwards"], Afterwards)
        presets = replace(presets, afterwards=afterwards)
    return presets


def _read(path: Path) -> str | None:
    """None where there is no such file."""
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
        text = content.decode()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from error
    if len(content) > FILE_BYTES_MAX:
        raise InvalidRequest(f"{path} is longer than {FILE_BYTES_MAX >> 10} KiB")
    return text
