"""Parts of standbys that need no guest: the record, the policy, what the VM file says."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from sempervirt.cli.demo_standby import draw_terminal
from sempervirt.cli.standby import parse_every
from sempervirt.core.errors import InvalidRequest
from sempervirt.host.places import Places
from sempervirt.host.records import RecordDamaged
from sempervirt.qemu import memory
from sempervirt.qemu.spec import GUEST_AGENT_CHANNEL, VmSpec
from sempervirt.standby import decide, initialised, network
from sempervirt.standby.record import (
    Guest,
    on_record,
    places_of,
    read_guest,
    record_of,
    write_guest,
)
from sempervirt.standby.rehearsal import copy_memory
from sempervirt.standby.state import Generation, Life, Step, TakeOver
from sempervirt.standby.values import Policy, Tier

SPEC = {
    "name": "web",
    "disks": [
        {"name": "root", "image": "/srv/root.raw"},
        {"name": "data", "image": "/srv/data.raw", "keep": "latest"},
    ],
    "nics": [{"type": "tap", "tap": "tap0"}, {"type": "user"}],
}


def spec(**keys: object) -> VmSpec:
    return VmSpec.model_validate({**SPEC, **keys})


def test_the_record_gives_back_what_was_written(tmp_path: Path) -> None:
    record = record_of(tmp_path, "web")
    assert record.read() is None
    made = Generation(3, Life.READY, Tier.FILE, 5.0, snapshots=(("root", 7),), notes=("a", "b"))
    over = TakeOver(3, "killed", 9.0, 1.0, Step.CLAIMING, steps=(("loaded", 1.5),))
    state = decide.begin("web", Policy(60.0, 2, Tier.FILE))
    state = replace(state, generations=(made,), last=3, take_over=over)
    record.write(state)
    assert record.read() == state
    assert on_record(tmp_path) == ["web"]
    record.remove()
    assert record.read() is None


@pytest.mark.parametrize(
    "content",
    ["", "{}", '{"version": 1}', '{"version": 1, "state": {"vm": "web"}}', "[" * 100000],
)
def test_a_damaged_record_is_told(tmp_path: Path, content: str) -> None:
    record = record_of(tmp_path, "web")
    record.path.parent.mkdir()
    record.path.write_text(content)
    with pytest.raises(RecordDamaged):
        record.read()


def test_the_record_of_another_vm_is_refused(tmp_path: Path) -> None:
    record_of(tmp_path, "web").write(decide.begin("web", Policy()))
    record_of(tmp_path, "web").path.rename(record_of(tmp_path, "db").path)
    with pytest.raises(RecordDamaged, match="VM web"):
        record_of(tmp_path, "db").read()


def test_a_generation_says_which_vm_it_is(tmp_path: Path) -> None:
    guest = Guest(network.isolated(spec(), 2), {network.tap_of("web", 2, 0): "br0"})
    write_guest(tmp_path, guest)
    assert read_guest(tmp_path) == guest
    assert guest.spec.mac(0) == spec().mac(0)
    assert len(guest.spec.nics[0].tap or "") <= 15
    assert network.tap_of("web", 3, 0) != network.tap_of("web", 2, 0)
    (tmp_path / "guest.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(RecordDamaged):
        read_guest(tmp_path)


@pytest.mark.parametrize(("every", "keep"), [(9.0, 1), (8e5, 1), (60.0, 0), (60.0, 9)])
def test_a_policy_has_bounds(every: float, keep: int) -> None:
    with pytest.raises(ValueError, match="not"):
        Policy(every, keep)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("10m", 600.0), ("2h", 7200.0), ("1d", 86400.0)]
)
def test_a_span_of_time(text: str, seconds: float) -> None:
    assert parse_every(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "-1m", "1e9s", "10 m", "99999999s"])
def test_what_is_no_span_of_time(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_every(text)


def test_something_has_to_show_that_the_guest_is_up() -> None:
    with pytest.raises(InvalidRequest, match="nothing would show"):
        initialised.how(spec())
    with_agent = spec(channels=[{"name": GUEST_AGENT_CHANNEL}])
    assert initialised.how(with_agent).initialised == "agent"
    console = {"initialised": "console", "marker": "up"}
    assert initialised.how(spec(standby=console)).marker == "up"


@pytest.mark.parametrize(
    "keys",
    [
        {"standby": {"initialised": "console"}},
        {"standby": {"marker": "up"}},
        {"standby": {"initialised": "channel", "marker": "up"}},
        {"standby": {"initialised": "channel", "marker": "up", "channel": "org.example.none"}},
        {"machine": "pc"},
        {"disks": [{"name": "data", "image": "/x", "keep": "latest", "backend": "qemu"}]},
        {"disks": [{"name": "data", "image": "/x", "keep": "latest", "read_only": True}]},
    ],
)
def test_a_vm_file_that_does_not_fit_together_is_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        spec(**keys)


def test_the_chart_marks_the_kill_and_shows_the_gap() -> None:
    answers = [at / 80 for at in range(800) if not 400 <= at < 480]
    chart = draw_terminal(answers, 5.0, 82).splitlines()
    mark = chart[-2].index("K")
    assert set(chart[-3][mark + 1 : mark + 18]) == {" "}
    assert " " not in chart[-3][: mark - 1]


def test_the_places_of_generations_are_found(tmp_path: Path) -> None:
    places = Places(tmp_path / "s", tmp_path / "r")
    assert places_of(places) == []
    (tmp_path / "s" / "standby" / "web" / "3").mkdir(parents=True)
    (tmp_path / "r" / "standby" / "web" / "12").mkdir(parents=True)
    (tmp_path / "r" / "standby" / "web" / "none").mkdir()
    (tmp_path / "r" / "standby" / "web" / ("9" * 30)).mkdir()
    assert [(vm, number) for vm, number, _ in places_of(places)] == [("web", 3), ("web", 12)]
    assert places_of(places)[0][2].run_dir == tmp_path / "r" / "standby" / "web" / "3"


def test_memory_is_copied_and_its_holes_are_left() -> None:
    size = 64 << 20
    with memory.created(size) as source, memory.created(size) as target:
        for at, content in ((0, b"first"), (20 << 20, b"x" * 70_000), (size - 4, b"last")):
            os.pwrite(source, content, at)
        copy_memory(source, target)
        for at in range(0, size, 1 << 20):
            assert os.pread(source, 1 << 20, at) == os.pread(target, 1 << 20, at)
        assert os.fstat(target).st_blocks <= os.fstat(source).st_blocks
    with memory.created(size) as source, memory.created(size) as target:
        copy_memory(source, target)
        assert os.fstat(target).st_blocks == 0
