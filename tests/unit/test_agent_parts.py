"""Directories, locks, records, notifications of the agent."""

from __future__ import annotations

import logging
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from sempervirt.agent.lock import agent_lock
from sempervirt.core.errors import StateConflict
from sempervirt.core.queue_map import Binding, Choice, DevicePlan
from sempervirt.daemon.logs import log_to_stderr
from sempervirt.daemon.main import main
from sempervirt.daemon.notify import notify
from sempervirt.host.places import default_run_dir, default_state_dir
from sempervirt.host.procfs import ProcessId
from sempervirt.host.records import RecordDamaged
from sempervirt.qemu.accel import Accelerator
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import End, Runstate, VmState
from sempervirt.store.registry import Claim
from sempervirt.vm.phases import Arrival, Mode, Phase
from sempervirt.vm.record import VmRecord, read_vm_record
from sempervirt.vm.work import Arriving, Departing, Restarting, Restoring, Saving, Work


def test_directories_of_root_and_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"SEMPERVIRT_STATE_DIR": "/a", "SEMPERVIRT_RUN_DIR": "/b"}
    assert (default_state_dir(chosen), default_run_dir(chosen)) == (Path("/a"), Path("/b"))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_state_dir({}) == Path("/var/lib/sempervirt")
    assert default_run_dir({}) == Path("/run/sempervirt")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    user = {"XDG_STATE_HOME": "/home/me/.state", "XDG_RUNTIME_DIR": "/run/user/1000"}
    assert default_state_dir(user) == Path("/home/me/.state/sempervirt")
    assert default_run_dir(user) == Path("/run/user/1000/sempervirt")
    assert "1000" in str(default_run_dir({}))


def test_the_lock_is_free_again_after_use(tmp_path: Path) -> None:
    with agent_lock(tmp_path), pytest.raises(StateConflict, match="another agent"):  # noqa: SIM117
        with agent_lock(tmp_path):
            pass
    with agent_lock(tmp_path):
        pass


@pytest.mark.parametrize(
    "end",
    [
        None,
        VmState(run=Runstate.CRASHED, why="it died", end=End("it died", None, 11)),
        VmState(run=Runstate.STOPPED, why="done", end=End("done", 0)),
    ],
)
def test_a_vm_record_and_back(tmp_path: Path, end: VmState | None) -> None:
    path = tmp_path / "vm.json"
    spec = VmSpec.model_validate({"name": "web", "disks": [{"name": "a", "image": "/a"}]})
    accelerator = Accelerator("tcg", "no device")
    for qemu in (None, ProcessId(7, 8, "boot")):
        plan = DevicePlan(
            "vhost-user-blk", Binding((0, 1), "VM file"), Choice("mmap", "preset"), 3, "p"
        )
        record = VmRecord(spec, accelerator, 12.5, qemu, end, {"disk-a": plan})
        record.write(path)
        assert read_vm_record(path) == record
        claim = Claim("web", "a", 7, "c" * 32, ("i" * 32,))
        works: tuple[Work, ...] = (
            Restarting(2, resume=True, switched=True, qemu=ProcessId(9, 8, "boot")),
            Saving(resume=False),
            Restoring(),
            Departing("d" * 32, "b", "10.0.0.2:7443", True, Phase.COMMIT, Mode.POSTCOPY),
            Arriving("d" * 32, "a", False, 7, ("i" * 32,), Arrival.PROMISED),
        )
        for work in works:
            busy = replace(record, work=work, claim=claim)
            busy.write(path)
            assert read_vm_record(path) == busy
    assert read_vm_record(tmp_path / "absent") is None
    path.write_text('{"version": 2, "spec": {}}')
    with pytest.raises(RecordDamaged, match="not the record of a VM"):
        read_vm_record(path)


def test_systemd_is_notified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notify("READY=1")  # nobody asked
    path = tmp_path / "n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
        service.bind(str(path))
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        notify("READY=1")
        assert service.recv(100) == b"READY=1"
    monkeypatch.setenv("NOTIFY_SOCKET", "@nobody-listens")
    notify("READY=1")


def test_log_lines(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        log_to_stderr("info")
        logging.getLogger("sempervirt.test").info("run vm=%s", "web")
        logging.getLogger("other").info("not told")
        root.handlers[0].flush()
    finally:
        root.handlers[:], root.level = before[0], before[1]
        logging.getLogger("sempervirt").setLevel(logging.NOTSET)
    line = capsys.readouterr().err
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO run vm=web\n", line)


def test_semperd_says_why_it_cannot_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert main(["--state-dir", str(file / "x"), "--run-dir", str(tmp_path)]) == 6
    assert "semperd: error: cannot make" in capsys.readouterr().err
