"""What a run measured, as values and as a JSON file."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.cases import BY_NAME
from bench.load import Figures
from bench.ratios import Spread, paired, spread
from bench.verdicts import Metric

VERSION = 1


class ResultsError(Exception):
    """A file that does not hold results of this version."""


@dataclass(frozen=True)
class Sample:
    """One measurement, or why there is none."""

    round: int
    storage: str
    case: str
    backend: str
    load_average: float
    figures: Figures | None
    error: str | None = None


@dataclass
class Results:
    """All measurements of a run. `reference` names the backend that ratios refer to."""

    reference: str
    machine: dict[str, str]
    settings: dict[str, Any]
    labels: dict[str, str]
    samples: list[Sample] = field(default_factory=list)
    load_average: tuple[float, float] = (0.0, 0.0)

    @property
    def suite(self) -> str:
        """Which suite was measured."""
        return str(self.settings.get("suite", "peers"))

    @property
    def failures(self) -> list[Sample]:
        """Measurements that gave no figures."""
        return [sample for sample in self.samples if sample.figures is None]

    def rows(self) -> Iterator["Row"]:
        """One row for each storage, case and backend; the reference is the first of its case."""
        present = {(one.storage, one.case, one.backend) for one in self.samples}
        backends = sorted({one.backend for one in self.samples} - {self.reference})
        for storage in self.labels:
            for case in BY_NAME:
                for backend in (self.reference, *backends):
                    if (storage, case, backend) in present:
                        yield Row(self, storage, case, backend)

    def values(self, storage: str, case: str, backend: str, metric: str) -> dict[int, float]:
        """A metric of one row by round."""
        return {
            sample.round: float(getattr(sample.figures, metric))
            for sample in self.samples
            if (sample.storage, sample.case, sample.backend) == (storage, case, backend)
            and sample.figures is not None
        }

    def write(self, path: Path) -> None:
        """Write the file at once, or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n")
        new.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read what `write` wrote. Raises ResultsError if it is something else."""
        try:
            data = json.loads(path.read_text())
            if data.pop("version") != VERSION:
                raise ResultsError(f"{path} was written by another version of the bench")
            samples = [
                Sample(**{**one, "figures": one["figures"] and Figures(**one["figures"])})
                for one in data.pop("samples")
            ]
            before, after = data.pop("load_average")
            return cls(**data, samples=samples, load_average=(before, after))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResultsError(f"{path} holds no results: {error}") from error


@dataclass(frozen=True)
class Row:
    """A backend in a case on a storage."""

    results: Results
    storage: str
    case: str
    backend: str

    def absolute(self, metric: str) -> Spread | None:
        """The metric over the rounds; None without a measurement."""
        values = self.results.values(self.storage, self.case, self.backend, metric)
        return spread(list(values.values())) if values else None

    def ratios(self, metric: Metric) -> list[float]:
        """The ratio to the reference, round by round."""
        reference = self.results.reference
        return paired(
            self.results.values(self.storage, self.case, self.backend, metric),
            self.results.values(self.storage, self.case, reference, metric),
        )

    @property
    def is_reference(self) -> bool:
        """Whether ratios refer to this very row."""
        return self.backend == self.results.reference
