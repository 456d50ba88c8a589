"""The parts of a document that a program writes: what stands between two markers."""

from dataclasses import dataclass
from pathlib import Path


class MarkersError(Exception):
    """A document without the two markers of a section."""


@dataclass(frozen=True)
class Section:
    """One such part; `command` says to readers of the document what writes it."""

    name: str
    command: str

    @property
    def begin(self) -> str:
        """The line before it."""
        return f"<!-- {self.name}: begin ({self.command} --update writes this part) -->"

    @property
    def end(self) -> str:
        """The line after it."""
        return f"<!-- {self.name}: end -->"

    def write(self, path: Path, text: str) -> None:
        """Replace what stands between the markers in `path`.

        Raises MarkersError if they are not there, once each and in order.
        """
        whole = path.read_text()
        begin, end = self.begin, self.end
        in_order = whole.count(begin) == whole.count(end) == 1
        if not in_order or whole.index(begin) > whole.index(end):
            raise MarkersError(f"{path} needs the lines {begin!r} and {end!r}, once each")
        head, tail = whole.split(begin)[0], whole.split(end)[1]
        path.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}")


BENCH = Section("bench", "python -m bench")
COST = Section("cost", "python -m bench")
LOOK = Section("look", "python -m bench")
COLD = Section("cold", "python -m bench --suite cold")
LAYERS = Section("layers", "python -m bench --suite layers")
MIGRATE = Section("migrate", "python -m bench --suite migrate")
IDLE = Section("idle", "python -m bench.idle")
SCALE = Section("scale", "python -m bench.scale")
