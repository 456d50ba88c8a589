"""The least that is asked: not slower than the reference (what ``--check`` decides)."""

from collections.abc import Iterator

from bench.cases import PARITY
from bench.results import Results, Row
from bench.verdicts import Metric, Verdict, compare

STORAGES = ("tmpfs", "direct")
METRICS: tuple[Metric, ...] = ("iops", "p50_us")


def objections(results: Results, backend: str) -> Iterator[str]:
    """Why `backend` does not pass: slower beyond the noise, failed, or not measured."""
    for one in results.failures:
        yield f"{one.storage} {one.case}: {one.backend} failed in round {one.round}: {one.error}"
    for storage in STORAGES:
        for case in PARITY:
            row = Row(results, storage, case.name, backend)
            for metric in METRICS:
                ratios = row.ratios(metric)
                if not ratios:
                    yield f"{storage} {case.name}: not measured"
                    break
                if compare(ratios, metric) is Verdict.WORSE:
                    seen = ", ".join(f"{ratio:.2f}" for ratio in ratios)
                    yield f"{storage} {case.name}: {metric} is {seen} times the reference's"
