"""Statistics of paired measurements: no I/O, nothing of benches in particular."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A sample by its median, quartiles and extremes."""

    count: int
    median: float
    q1: float
    q3: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Describe at least one value. Quartiles are interpolated between the values themselves.

    Raises ValueError without values.
    """
    if not values:
        raise ValueError("no values to describe")
    if len(values) == 1:
        q1 = q3 = values[0]
    else:
        q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(len(values), statistics.median(values), q1, q3, min(values), max(values))


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> list[float]:
    """The ratio to the reference in each round that has both; a reference of zero has no ratio."""
    return [
        values[number] / reference[number]
        for number in sorted(values.keys() & reference.keys())
        if reference[number] > 0
    ]


def sign_test(values: Sequence[float], beyond: float = 1.0) -> float:
    """How likely as many values at or below `beyond` would be if either side were as likely.

    One-sided: small when the sample lies above `beyond`. 1.0 without values.
    """
    below = sum(value <= beyond for value in values)
    ways = sum(math.comb(len(values), k) for k in range(below + 1))
    return float(ways / 2 ** len(values))
