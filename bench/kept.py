"""Measurements as a JSON file."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

VERSION = 1


class KeptError(Exception):
    """A file that holds no such measurements."""


@dataclass
class Kept:
    """What a run measured; a dataclass of dataclasses."""

    machine: dict[str, str]
    settings: dict[str, Any]
    load_average: tuple[float, float] = field(default=(0.0, 0.0), kw_only=True)

    def write(self, path: Path) -> None:
        """Write the file at once, or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n")
        new.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote. Raises KeptError if it is something else."""
        try:
            data = json.loads(path.read_text())
            if data.pop("version") != VERSION:
                raise KeptError(f"{path} was written by another version of the bench")
            return TypeAdapter(cls).validate_python(data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            raise KeptError(f"{path} holds no measurements of this kind: {error}") from error
