"""What a run measured, as values and as a JSON file."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.cases import BY_NAME
from bench.kept import Kept
from bench.load import Figures
from bench.ratios import Spread, paired, spread
from bench.verdicts import Metric


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
class Results(Kept):
    """All measurements of a run. `reference` names the backend that ratios refer to."""

    reference: str
    labels: dict[str, str]
    samples: list[Sample] = field(default_factory=list)

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
