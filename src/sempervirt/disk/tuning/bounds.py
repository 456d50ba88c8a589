"""What a candidate is held to, and how long it may take to find one."""

from __future__ import annotations

from dataclasses import dataclass

# About the longest time for each storage.
SECONDS = 90.0


@dataclass(frozen=True)
class Bounds:
    """`latency`: how many times the best p99; `throughput`: which share of the best."""

    latency: float = 2.0
    throughput: float = 0.8
