"""What QEMU tells of a migration, and what the wire is started with."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sempervirt.core.errors import StateConflict, Unavailable
from sempervirt.host.programs import find_program
from sempervirt.migration import stream
from sempervirt.migration.source.convergence import ConvergencePolicy, Sample
from sempervirt.migration.source.steering import Steering
from sempervirt.migration.wire import PROGRAM, WireDisk, WireFiles


def test_the_figures_of_qemu_in_our_units() -> None:
    answer = {
        "status": "active",
        "total-time": 1500,
        "ram": {
            "total": 1 << 30,
            "remaining": 4096,
            "mbps": 800.0,
            "dirty-pages-rate": 10,
            "dirty-sync-count": 2,
        },
    }
    assert stream.told(answer) == stream.Told(
        "active", "", 1 << 30, Sample(1.5, 2, 4096, 100e6, 40960.0)
    )
    assert stream.told({}) == stream.Told("none", "", 0, None)
    failed = stream.told({"status": "failed", "error-desc": "broken"})
    assert (failed.status, failed.error) == ("failed", "broken")


class Qemu:
    """Takes commands; refuses some."""

    def __init__(self, *refused: str) -> None:
        self.refused = refused
        self.told: list[tuple[str, Any]] = []

    async def execute(self, command: str, arguments: Any = None) -> Any:
        """As `Monitor.execute`."""
        if any(name in (arguments or {}) for name in self.refused):
            raise StateConflict(f"QEMU refused {command}")
        self.told.append((command, arguments))
        return {"running": True}


def test_a_qemu_that_knows_no_bandwidth_reckons_by_itself() -> None:
    old, new = Qemu("avail-switchover-bandwidth"), Qemu()
    for qemu in (old, new):
        asyncio.run(stream.reckon(qemu.execute, 12.4e6))
    assert old.told == []
    assert new.told == [("migrate-set-parameters", {"avail-switchover-bandwidth": 12_400_000})]


def test_what_an_earlier_move_or_restart_has_set_is_put_back() -> None:
    qemu = Qemu()
    asyncio.run(stream.prepare_source(qemu.execute, postcopy=False))
    (_, parameters), (_, capabilities) = qemu.told
    assert parameters["mode"] == "normal"
    assert parameters["max-bandwidth"] == 0
    wanted = {item["capability"]: item["state"] for item in capabilities["capabilities"]}
    assert not wanted["x-ignore-shared"]
    assert not wanted["postcopy-ram"]
    assert wanted["pause-before-switchover"]


def test_qemu_is_told_what_the_link_carries_and_what_was_decided() -> None:
    qemu = Qemu()

    async def steer() -> None:
        steering = Steering(ConvergencePolicy(blackout_s=0.4))
        await steering.begin(qemu.execute)
        for passes in range(1, 4):
            sample = Sample(passes, passes, 50_000_000, 1e9, 1e8)
            await steering.steer(qemu.execute, sample, 10**8)

    asyncio.run(steer())
    told = [parameters for _, parameters in qemu.told]
    assert told == [
        {"downtime-limit": 100},
        {"avail-switchover-bandwidth": round(stream.UNKNOWN_BANDWIDTH)},
        {"avail-switchover-bandwidth": 10**8},
        {"downtime-limit": 400},
    ]


def test_a_guest_that_arrives_runs_before_the_switches_are_told() -> None:
    qemu = Qemu()
    asyncio.run(stream.let_run(qemu.execute))
    assert [command for command, _ in qemu.told] == ["cont", "query-status", "announce-self"]


def test_a_disk_of_the_wire() -> None:
    assert WireDisk("root", Path("/i.raw")).argument() == "--disk=root=/i.raw"
    whole = WireDisk("root", Path("/i.raw"), direct=True, backend=Path("/b.ctl"))
    assert whole.argument() == "--disk=root=/i.raw,direct,backend=/b.ctl"
    assert WireFiles(Path("/run/web"), Path("/run/web/q1")).control == Path("/run/web/wired.ctl")


def test_a_host_without_the_wire_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SEMPERVIRT_WIRED", raising=False)
    with pytest.raises(Unavailable, match="semper-wired is not installed"):
        find_program(PROGRAM)
