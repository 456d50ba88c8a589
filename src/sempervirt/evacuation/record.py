"""What one agent tells the next one about the evacuation of its host.

    STATE_DIR/evacuation.json

    {"version": 1, "boot_id": "…", "evacuation": {
       "order": {"cause": "operator", "why": "…", "destinations": [], "deadline_s": 300.0,
                 "concurrency": 2, "without_records": false, "broken": []},
       "began": 1795384877.9, "until": 81234.5, "step": "move", "given_up": false, "bounds": 0,
       "failure": "", "ended": null, "earlier": [["db", "c"], …],
       "out_by": null,
       "passages": [{"vm": "web", "fate": "moves", "host": "b", "reason": null, "why": "",
                     "tried": [], "rounds": 0, "not_before": 0.0, "cancelled": false,
                     "began_s": 0.1, "ended_s": null}, …]}}

`until` is on CLOCK_MONOTONIC, which counts anew in each boot. A host that has booted anew has none
of its VMs: its evacuation is over, whatever the record says. What hosts and VMs said is not on
record; the next agent asks again.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sempervirt.evacuation.state import Evacuation, Passage, Step
from sempervirt.evacuation.values import CONCURRENCY_MAX, Cause, EvacuationOrder
from sempervirt.host.procfs import boot_id
from sempervirt.host.records import RecordDamaged, read_record, write_record

log = logging.getLogger(__name__)

VERSION = 1
BOOTED_ANEW = "the host has booted anew before the evacuation was over"


@dataclass(frozen=True)
class _Entry:
    """An evacuation without what hosts and VMs said."""

    order: EvacuationOrder
    began: float
    until: float
    step: Step
    passages: tuple[Passage, ...]
    given_up: bool
    bounds: int
    failure: str
    ended: float | None
    earlier: tuple[tuple[str, str], ...] = ()
    out_by: Cause | None = None


_ENTRY = TypeAdapter(_Entry)


class EvacuationRecord:
    """The record at `path`: the port `ports.Record`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, state: Evacuation) -> bool:
        """Replaces the record; whether it is written. What fails is in the log."""
        entry = {
            "order": asdict(state.order),
            "began": state.began,
            "until": state.until,
            "step": state.step,
            "passages": [asdict(one) for one in state.passages],
            "given_up": state.given_up,
            "bounds": state.bounds,
            "failure": state.failure,
            "ended": state.ended,
            "earlier": state.earlier,
            "out_by": state.out_by,
        }
        content = {"boot_id": boot_id(), "evacuation": _plain(entry)}
        try:
            write_record(self._path, VERSION, content)
        except OSError as error:
            log.error("evacuate record=%s not written: %s", self._path, error.strerror)  # noqa: TRY400
            return False
        return True

    def read(self) -> Evacuation | None:
        """What an earlier agent has left; None: it has left nothing. Raises RecordDamaged."""
        content = read_record(self._path, VERSION)
        if content is None:
            return None
        try:
            entry = _ENTRY.validate_python(content["evacuation"])
            if not 1 <= entry.order.concurrency <= CONCURRENCY_MAX:
                raise ValueError(f"{entry.order.concurrency} moves at once")
            same_boot = content["boot_id"] == boot_id()
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise RecordDamaged(
                f"{self._path} is not the record of an evacuation: {str(error)[:200]}",
                remedy="move the file away; the VMs are not touched by that",
            ) from error
        state = Evacuation(
            entry.order,
            entry.began,
            entry.until,
            entry.step,
            passages=entry.passages,
            given_up=entry.given_up,
            bounds=entry.bounds,
            failure=entry.failure,
            ended=entry.ended,
            earlier=entry.earlier,
            out_by=entry.out_by,
        )
        if state.over or same_boot:
            return state
        return replace(state, step=Step.OVER, failure=BOOTED_ANEW, ended=entry.began)


def _plain(value: Any) -> Any:
    """The same for JSON: enums by their values."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
