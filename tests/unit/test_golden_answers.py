"""What our programs tell, by the golden files that `cargo test` holds them to, as we read it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sempervirt
from sempervirt.core.errors import OutcomeUnknown
from sempervirt.disk import answers as blkd
from sempervirt.disk.tuning.load import LoadReport
from sempervirt.host.answers import Answer, AnswerNotUnderstood, read_answer
from sempervirt.host.control import Bytes
from sempervirt.migration.wire_status import WireStatus
from sempervirt.passthrough import answers as vfiod
from sempervirt.qemu import saved

GOLDEN = Path(__file__).parents[2] / "crates/control/golden"

# Which model reads an answer.
MODELS: dict[str, type[Answer]] = {
    "blkd-capabilities": blkd.Capabilities,
    "blkd-claim": blkd.Claimed,
    "blkd-handover": blkd.Armed,
    "blkd-layers": blkd.Layers,
    "blkd-layers-failed": blkd.Layers,
    "blkd-layers-merging": blkd.Layers,
    "blkd-map": blkd.BlockMap,
    "blkd-map-export": Bytes,
    "blkd-map-verified": blkd.BlockMap,
    "blkd-map-verify": blkd.VerifyStarted,
    "blkd-map-verifying": blkd.BlockMap,
    "blkd-merge": blkd.Merging,
    "blkd-pin": blkd.Pins,
    "blkd-quiesce": blkd.Quiesced,
    "blkd-undo": blkd.Undone,
    "blkd-resize": blkd.Resized,
    "blkd-resume": blkd.QueuesResumed,
    "blkd-snapshot": blkd.SnapshotTaken,
    "blkd-status-active": blkd.Status,
    "blkd-status-incoming": blkd.Status,
    "blkd-status-spare": blkd.Status,
    "blkd-status-unclaimed": blkd.Status,
    "blkd-status-without-map": blkd.Status,
    "blkd-threads": blkd.Threads,
    "load-report": LoadReport,
    "load-report-failed": LoadReport,
    "load-report-verified": LoadReport,
    "saved-done": saved.Done,
    "saved-restore": saved.Restored,
    "saved-save": saved.Figures,
    "saved-show": saved.ShownState,
    "saved-show-without-stamp": saved.ShownState,
    "vfiod-capture": vfiod.Captured,
    "vfiod-claim": vfiod.MediatorClaimed,
    "vfiod-configuration": vfiod.Configured,
    "vfiod-configuration-early": vfiod.Configured,
    "vfiod-export": vfiod.Exported,
    "vfiod-import": vfiod.Imported,
    "vfiod-msix": vfiod.TableWritten,
    "vfiod-quiesce": vfiod.Drained,
    "vfiod-release": vfiod.Released,
    "vfiod-replay": vfiod.Replayed,
    "vfiod-resume": vfiod.Resumed,
    "vfiod-round": vfiod.Round,
    "vfiod-status": vfiod.MediatorStatus,
    "vfiod-status-claimed": vfiod.MediatorStatus,
    "vfiod-status-refused": vfiod.MediatorStatus,
    "vfiod-status-without-image": vfiod.MediatorStatus,
    "vfiod-touch": vfiod.Touched,
    "wired-status-destination-failed": WireStatus,
    "wired-status-destination-waiting": WireStatus,
    "wired-status-source-connecting": WireStatus,
    "wired-status-source-passed-through": WireStatus,
    "wired-status-source-streaming": WireStatus,
}
# The agent does not ask for these: semper-wired asks its backend, people ask for an address, and
# tests for faults.
NOT_READ = {
    "blkd-fault",
    "blkd-map-blocks",
    "blkd-map-find-address",
    "blkd-map-find-nothing",
    "blkd-map-find-sector",
    "blkd-map-touch",
    # Read once passed-through devices are part of a VM.
    "vfiod-capabilities",
}
# Read by the control socket itself.
REFUSED = {"blkd-refused", "vfiod-refused", "wired-refused"}


def golden(name: str) -> dict[str, Any]:
    """The answer itself, without what the control socket puts around it."""
    content = json.loads((GOLDEN / name).with_suffix(".json").read_text())
    answer = content.get("ok", content)
    assert isinstance(answer, dict)
    return answer


def required(model: type[Answer], answer: Any, at: tuple[str | int, ...] = ()) -> Iterator[Any]:
    """The way to each key of `answer` that `model` cannot do without."""
    for key, field in model.model_fields.items():
        if not field.is_required():
            continue
        yield (*at, key)
        value, kind = answer[key], field.annotation
        inner = [part for part in (kind, *getattr(kind, "__args__", ())) if is_answer(part)]
        step: tuple[str | int, ...] = (key,)
        if isinstance(value, list) and value:
            value, step = value[0], (key, 0)
        if inner and value is not None:
            yield from required(inner[0], value, (*at, *step))


def is_answer(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Answer)


def test_each_golden_file_has_its_reader_and_each_reader_its_golden_file() -> None:
    there = {path.stem for path in GOLDEN.glob("*.json")}
    assert there == set(MODELS) | NOT_READ | REFUSED
    used = {
        model
        for module in (blkd, saved, vfiod)
        for model in vars(module).values()
        if is_answer(model) and model.__module__ == module.__name__
    }
    parts = {part for model in MODELS.values() for part in all_models(model)}
    assert used <= parts, "no golden file is read by that model"


def all_models(model: type[Answer]) -> Iterator[type[Answer]]:
    """`model`, and what it is made of."""
    yield model
    for field in model.model_fields.values():
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, Answer):
                yield from all_models(part)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_an_answer_is_understood_and_one_that_lacks_a_key_names_both_versions(name: str) -> None:
    answer, model = golden(name), MODELS[name]
    read_answer(model, {**answer, "added_later": 1}, "semper-blkd", "status")
    ways = list(required(model, answer))
    assert ways
    for way in ways:
        lacking = copy.deepcopy(answer)
        inner = lacking
        for step in way[:-1]:
            inner = inner[step]
        del inner[way[-1]]
        with pytest.raises(AnswerNotUnderstood) as caught:
            read_answer(model, lacking, "semper-blkd", "status")
        key = ".".join(str(step) for step in way)
        version = lacking.get("version") if isinstance(lacking.get("version"), str) else None
        who = f"semper-blkd {version}" if version else "this semper-blkd"
        assert caught.value.message == (
            f"{who} answers status without `{key}`; this agent is {sempervirt.__version__}"
        )
        assert isinstance(caught.value, OutcomeUnknown)


@pytest.mark.parametrize("value", ["7", 7.5, None, True, [], {}])
def test_another_type_is_no_answer(value: object) -> None:
    answer = {**golden("blkd-status-active"), "pid": value}
    with pytest.raises(AnswerNotUnderstood, match=r"semper-blkd 0\.1\.0 .* a wrong `pid`"):
        read_answer(blkd.Status, answer, "semper-blkd", "status")


@pytest.mark.parametrize("answer", [[], "status", None, 7, {"state": "flying"}])
def test_what_is_no_object_or_has_an_unknown_word_is_no_answer(answer: object) -> None:
    with pytest.raises(AnswerNotUnderstood):
        read_answer(blkd.Status, answer, "semper-blkd", "status")
    dancing = {**golden("blkd-status-active"), "state": "dancing"}
    with pytest.raises(AnswerNotUnderstood, match="a wrong `state`"):
        read_answer(blkd.Status, dancing, "semper-blkd", "status")


def test_what_is_read_goes_on_to_the_api_as_it_came() -> None:
    for name in MODELS:
        if name.startswith("blkd-status"):
            status = read_answer(blkd.Status, golden(name), "semper-blkd", "status")
            assert status.model_dump(mode="json") == golden(name)
