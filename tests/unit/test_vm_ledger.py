"""The record of a VM: one work at a time, and what may fail to be written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sempervirt.core.errors import StateConflict, Unavailable
from sempervirt.host.procfs import ProcessId
from sempervirt.qemu.accel import Accelerator
from sempervirt.qemu.spec import VmSpec
from sempervirt.store.registry import Claim
from sempervirt.vm.ledger import Ledger
from sempervirt.vm.record import VmRecord, read_vm_record
from sempervirt.vm.work import (
    Arriving,
    Departing,
    Restarting,
    Restoring,
    Saving,
    Snapshotting,
    Work,
)

WORKS: tuple[tuple[Work, str], ...] = (
    (Restarting(2, resume=True), "a restart of QEMU"),
    (Saving(resume=True), "a save"),
    (Restoring(), "its restoration"),
    (Snapshotting(frozen=True), "a snapshot of its disks"),
    (Departing("d" * 32, "b", "10.0.0.2:7443", running=True), "its migration to b"),
    (Arriving("d" * 32, "a", True, 7, ()), "its migration from a"),
)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    spec = VmSpec.model_validate({"name": "web", "disks": []})
    ledger = Ledger(VmRecord(spec, Accelerator("tcg", "no device"), 12.5), tmp_path / "v/vm.json")
    ledger.create()
    return ledger


def on_record(tmp_path: Path) -> VmRecord:
    record = read_vm_record(tmp_path / "v/vm.json")
    assert record is not None
    return record


@pytest.mark.parametrize(("work", "words"), WORKS)
def test_one_work_at_a_time_which_is_named(
    ledger: Ledger, tmp_path: Path, work: Work, words: str
) -> None:
    ledger.begin(work)
    assert on_record(tmp_path).work == work
    for other, _ in WORKS:
        with pytest.raises(StateConflict, match=f"VM web is busy: {words} is under way"):
            ledger.begin(other)
    with pytest.raises(StateConflict, match=words):
        ledger.require_idle()
    assert ledger.advance(work)
    assert ledger.end_work()
    ledger.require_idle()
    assert on_record(tmp_path).work is None


def test_a_restart_ends_with_another_qemu(ledger: Ledger, tmp_path: Path) -> None:
    old, new = ProcessId(7, 8, "boot"), ProcessId(9, 8, "boot")
    assert ledger.started(old)
    ledger.begin(Restarting(2, resume=True, qemu=new))
    assert ledger.took_over(new, 2)
    expected = replace(ledger.record, qemu=new, number=2, work=None)
    assert on_record(tmp_path) == expected


def test_what_has_to_be_on_record_is_refused_when_it_is_not(ledger: Ledger, tmp_path: Path) -> None:
    before = ledger.record
    (tmp_path / "v/vm.json").unlink()
    (tmp_path / "v/vm.json").mkdir()
    changes: tuple[Callable[[], None], ...] = (
        lambda: ledger.begin(Saving(resume=True)),
        lambda: ledger.claimed(Claim("web", "a", 7, "c" * 32)),
        ledger.create,
    )
    for change in changes:
        with pytest.raises(Unavailable, match="the record of VM web cannot be written"):
            change()
        assert ledger.record == before
    # A note counts here all the same; the next agent asks the processes.
    assert not ledger.started(ProcessId(7, 8, "boot"))
    assert ledger.record.qemu == ProcessId(7, 8, "boot")
