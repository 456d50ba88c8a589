"""What a calibration found, complete: the JSON of `semper disk tune --output json`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sempervirt.core.queue_map import DeviceType
from sempervirt.disk.fingerprint import HostFingerprint
from sempervirt.disk.presets import Engine, LoadFigures, Preset
from sempervirt.disk.storage import StorageKey
from sempervirt.disk.tuning.candidates import Candidate
from sempervirt.disk.tuning.driver import Outcome
from sempervirt.disk.tuning.figures import Series, typical

VERSION = 1
Verdict = Literal["winner", "as good", "lost", "early", "failed"]


class _View(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CandidateView(_View):
    """One candidate. The figures are medians over its rounds; `failed` ones may have none.

    `per_cpu_second` are requests for each second of the backend's processor time over all loads;
    `p99_ratio` and `throughput_ratio` compare with the best of the same rounds at the load where
    the candidate is weakest.
    """

    engine: Engine
    queues_per_thread: int
    poll_us: int
    verdict: Verdict
    reason: str
    rounds: int = 0
    per_cpu_second: float | None = None
    p99_ratio: float | None = None
    throughput_ratio: float | None = None
    figures: tuple[LoadFigures, ...] = ()

    def __str__(self) -> str:
        return str(Candidate(self.engine, self.queues_per_thread, self.poll_us))


class DeviceView(_View):
    """One type of device on one storage: the preset, and how it was found.

    `candidates` are sorted, the best first; there are none for a rule.
    """

    preset: Preset
    queues: int
    latency_bound: float
    throughput_bound: float
    loads: tuple[str, ...] = ()
    holds_bounds: bool = True
    seconds: float = 0.0
    candidates: tuple[CandidateView, ...] = ()


class StorageView(_View):
    """One storage. `where` is the directory of the scratch image, or the block device."""

    storage: StorageKey
    where: Path
    read_only: bool
    devices: tuple[DeviceView, ...]


class TuneReport(_View):
    """A whole calibration. `stored` is the file that the presets went to."""

    version: int = VERSION
    started: datetime
    host: HostFingerprint
    storages: tuple[StorageView, ...]
    stored: Path
    warnings: tuple[str, ...] = ()


class PlannedRace(_View):
    """What would be measured for one type of device. `source` as in a preset."""

    device: DeviceType
    candidates: tuple[str, ...]
    loads: tuple[str, ...]
    seconds: float
    note: str = ""


class PlannedStorage(_View):
    """What would be measured on one storage, and how many bytes would be written there."""

    storage: StorageKey
    where: Path
    read_only: bool
    scratch_bytes: int
    races: tuple[PlannedRace, ...]


class TunePlan(_View):
    """What `--dry-run` prints."""

    version: int = VERSION
    host: HostFingerprint
    storages: tuple[PlannedStorage, ...]
    seconds: float


class PresetView(_View):
    """A stored preset; `stale` says why it is not used any more, empty if it is."""

    preset: Preset
    stale: str


class PresetList(_View):
    """What `--show` prints."""

    version: int = VERSION
    path: Path
    host: HostFingerprint
    presets: tuple[PresetView, ...]
    warnings: tuple[str, ...]


def load_figures(series: Series) -> tuple[LoadFigures, ...]:
    """Medians over the rounds."""
    return tuple(
        LoadFigures(
            load=load,
            iops=round(typical(series, load, lambda f: f.iops), 1),
            p99_us=round(typical(series, load, lambda f: f.p99_us), 2),
            cpu_us_per_request=round(typical(series, load, lambda f: f.cpu_us), 4),
        )
        for load in next(iter(series.values()))
    )


def candidate_views(outcome: Outcome) -> tuple[CandidateView, ...]:
    """All candidates of a race: the winner, the other finalists, those that left, the failed."""
    decision = outcome.decision
    order: list[tuple[Candidate, Verdict, str]] = [(decision.winner, "winner", decision.why)]
    order += [
        (candidate, "as good" if candidate in decision.as_good else "lost", reason)
        for candidate, reason in decision.reasons.items()
    ]
    left = sorted(outcome.eliminated.items(), key=lambda item: -outcome.last[item[0]].efficiency)
    order += [(candidate, "early", reason) for candidate, reason in left]
    order += [(candidate, "failed", reason) for candidate, reason in outcome.failed.items()]
    return tuple(_candidate_view(outcome, *entry) for entry in order)


def _candidate_view(
    outcome: Outcome, candidate: Candidate, verdict: Verdict, reason: str
) -> CandidateView:
    series = outcome.measured.get(candidate, {})
    standing = outcome.last.get(candidate)
    return CandidateView(
        engine=candidate.engine,
        queues_per_thread=candidate.queues_per_thread,
        poll_us=candidate.poll_us,
        verdict=verdict,
        reason=reason,
        rounds=len(series),
        per_cpu_second=round(standing.efficiency, 1) if standing else None,
        p99_ratio=round(standing.latency.ratio, 3) if standing else None,
        throughput_ratio=round(1 / standing.throughput.ratio, 3) if standing else None,
        figures=load_figures(series) if series else (),
    )
