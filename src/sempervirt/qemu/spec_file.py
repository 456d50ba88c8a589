"""Reads a VM file; every error names file, line and key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sempervirt.core.errors import InvalidRequest, SpecError
from sempervirt.core.names import suggest
from sempervirt.qemu.spec import HOST_DEVICE, OUR_DEVICE, PciSpec, VmSpec
from sempervirt.qemu.toml_lines import Key, find_line

_WHERE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


def load_spec(file: Path) -> VmSpec:
    """The VM that `file` describes; relative paths in it are relative to the file.

    Raises SpecError, or InvalidRequest when the file cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"the VM file {file} cannot be read: {error}", remedy="name a readable TOML file"
        ) from error
    return parse_spec(text, file)


def parse_spec(text: str, file: Path) -> VmSpec:
    """As `load_spec`, for a text that was read from `file`. Raises SpecError."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        where = _WHERE.search(str(error))
        line = int(where[1]) if where and where[1] else text.count("\n") + 1
        raise SpecError(f"not TOML: {_WHERE.sub('', str(error))}", file=file, line=line) from error
    try:
        return VmSpec.model_validate(_resolve(content, file.absolute().parent))
    except ValidationError as error:
        raise _spec_error(error, text, file) from error


def describe_errors(error: ValidationError, text: str = "") -> list[tuple[int, str, str]]:
    """Each error as line, key and message."""
    return [
        (find_line(text, _path(detail)), _dotted(_path(detail)), _message(detail))
        for detail in error.errors()
    ]


def _spec_error(error: ValidationError, text: str, file: Path) -> SpecError:
    found = describe_errors(error, text)
    line, key, message = found[0]
    more = [f"line {at}: {name}: {what}" for at, name, what in found[1:]]
    also = f" (and {'; '.join(more)})" if more else ""
    return SpecError(message + also, file=file, line=line, key=key)


def _path(detail: ErrorDetails) -> Sequence[Key]:
    return [part for part in detail["loc"] if part not in (OUR_DEVICE, HOST_DEVICE)]


def _dotted(path: Sequence[Key]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _message(detail: ErrorDetails) -> str:
    if detail["type"] == "extra_forbidden":
        known = PciSpec if HOST_DEVICE in detail["loc"] else None
        hint = suggest(str(detail["loc"][-1]), _known_keys(_path(detail)[:-1], known))
        return f"there is no such key{'; ' + hint if hint else ''}"
    if detail["type"] == "missing":
        return "is missing"
    message = detail["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:] if message[:2].istitle() else message


def _known_keys(path: Sequence[Key], known: type[BaseModel] | None) -> list[str]:
    """The keys of the table at `path`, or of the one that is `known`."""
    if known is not None:
        return list(known.model_fields)
    model: type[BaseModel] = VmSpec
    for part in path:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = next(_models(annotation))
    return list(model.model_fields)


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    """The tables that an annotation names, in its order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _resolve(content: dict[str, Any], directory: Path) -> dict[str, Any]:
    """`content` with its paths made absolute."""
    resolved = dict(content)
    for key in ("kernel", "initrd", "firmware", "firmware_vars"):
        if isinstance(resolved.get(key), str):
            resolved[key] = _absolute(resolved[key], directory)
    for key in ("disks", "passthrough"):
        if isinstance(resolved.get(key), list):
            resolved[key] = [
                {**disk, "image": _absolute(disk["image"], directory)}
                if isinstance(disk, dict) and isinstance(disk.get("image"), str)
                else disk
                for disk in resolved[key]
            ]
    return resolved


def _absolute(path: str, directory: Path) -> str:
    return str(directory / Path(path).expanduser())
