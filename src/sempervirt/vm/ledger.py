"""The record of one VM (`vm.record`), and the only one to change it: in memory and on the disk.

What is only a note for the next agent may fail to be written: the failure is logged, and the next
agent finds the former record and asks the processes. What the next agent has to know before
something is done is written by `create` and `begin`, or by `advance` with a look at the answer.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path

from sempervirt.core.errors import StateConflict, Unavailable
from sempervirt.host.peers import write_peers
from sempervirt.host.procfs import ProcessId
from sempervirt.host.records import remove_record
from sempervirt.qemu.state import VmState
from sempervirt.store.registry import Claim
from sempervirt.vm.record import VmRecord
from sempervirt.vm.work import Work, in_words

log = logging.getLogger(__name__)


class Ledger:
    """Of a VM whose `record` stands at `path`, or will. The QEMUs on record are noted for the VM's
    backends as well, in the file `peers`: they serve no other process.
    """

    def __init__(self, record: VmRecord, path: Path, peers: Path | None = None) -> None:
        self._record = record
        self._path = path
        self._peers = peers
        self._excused = False

    @property
    def record(self) -> VmRecord:
        """What the next agent is told."""
        return self._record

    @property
    def name(self) -> str:
        """The VM's name."""
        return self._record.spec.name

    def excuse(self) -> None:
        """From now on a record that cannot be written stops nothing that goes on with this VM: the
        host, with what the record would tell the next agent, is about to end. Who may write the
        images stands beside the images (`store.epoch`).
        """
        self._excused = True

    def create(self) -> None:
        """Writes the first record, before anything of the VM is started. Raises Unavailable."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritten(error) from error
        try:
            self._write_peers(self._record)
        except OSError as error:
            raise Unavailable(
                f"{self._peers} cannot be written: {error.strerror}",
                remedy="make room there, or choose another SEMPERVIRT_RUN_DIR",
            ) from error
        self._require(self._record)

    @property
    def path(self) -> Path:
        """Where the record stands."""
        return self._path

    def rewrite(self) -> bool:
        """Writes the record again, which somebody has removed; whether that was done."""
        return self._note(self._record)

    def recreate(self) -> bool:
        """As `rewrite`, also where the directory of the record was removed with it."""
        with contextlib.suppress(OSError):  # then the record is not written either, which is told
            self._path.parent.mkdir(parents=True, exist_ok=True)
        return self.rewrite()

    def note_peers(self) -> None:
        """Lets the backends serve the QEMUs on record; no others. What fails is in the log."""
        try:
            self._write_peers(self._record)
        except OSError as error:
            log.error("peers vm=%s not written: %s", self.name, error)  # noqa: TRY400

    def remove(self) -> None:
        """Removes the record of a VM of which nothing is left."""
        remove_record(self._path)

    def require_idle(self) -> None:
        """Raises StateConflict, naming the work, when some goes on."""
        work = self._record.work
        if work is not None:
            raise StateConflict(
                f"VM {self.name} is busy: {in_words(work)} is under way",
                remedy=f"wait for its end: semper vm show {self.name}",
            )

    def begin(self, work: Work) -> None:
        """Puts work on record, before anything of it is done.

        Raises StateConflict while other work goes on, Unavailable when the record cannot be
        written: nothing was begun then.
        """
        self.require_idle()
        self._require(replace(self._record, work=work))

    def advance(self, work: Work) -> bool:
        """Replaces the work by the same work, further on; whether that is on record."""
        assert self._record.work is not None
        assert self._record.work.kind == work.kind
        return self._note(replace(self._record, work=work))

    def end_work(self) -> bool:
        """Nothing goes on with the VM any more; whether that is on record."""
        return self._note(replace(self._record, work=None))

    def took_over(self, qemu: ProcessId, number: int) -> bool:
        """Ends a restart: from now on `qemu`, the VM's QEMU of that number, is the VM."""
        return self._note(replace(self._record, qemu=qemu, number=number, work=None))

    def started(self, qemu: ProcessId | None) -> bool:
        """That process is the VM's QEMU."""
        return self._note(replace(self._record, qemu=qemu))

    def claimed(self, claim: Claim) -> None:
        """The VM is this host's from now on. Raises Unavailable when that is not on record."""
        self._require(replace(self._record, claim=claim))

    def set_claim(self, claim: Claim | None) -> bool:
        """The claim that counts now, None when it was released; whether that is on record."""
        return self._note(replace(self._record, claim=claim))

    def ended(self, state: VmState) -> bool:
        """QEMU has ended so; whether that is on record."""
        return self._note(self._record.ended(state))

    def _require(self, record: VmRecord) -> None:
        try:
            record.write(self._path)
        except OSError as error:
            if not self._excused:
                raise self._unwritten(error) from error
            log.error("record vm=%s not written: %s", self.name, error)  # noqa: TRY400
        self._replace(record)

    def _note(self, record: VmRecord) -> bool:
        self._replace(record)
        try:
            record.write(self._path)
        except OSError as error:
            log.error("record vm=%s not written: %s", self.name, error)  # noqa: TRY400
            return self._excused
        return True

    def _replace(self, record: VmRecord) -> None:
        before, self._record = self._record, record
        if record.qemus != before.qemus:
            self.note_peers()

    def _write_peers(self, record: VmRecord) -> None:
        if self._peers is not None:
            write_peers(self._peers, record.qemus)

    def _unwritten(self, error: OSError) -> Unavailable:
        return Unavailable(
            f"the record of VM {self.name} cannot be written: {self._path}: {error.strerror}",
            remedy=f"make room at {self._path.parent}, or choose another SEMPERVIRT_STATE_DIR",
        )
