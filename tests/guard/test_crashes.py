"""A stock Debian kernel dies on purpose, with the guard and without."""

from __future__ import annotations

from pathlib import Path

import pytest

from sempervirt.guard.signs import SignId
from tests.guard.dumps import tried
from tests.guard.health import faults
from tests.guard.kinds import FATAL, SURVIVED, Kind, named
from tests.guard.machine import DEATH_S, RAMOOPS, Image, Machine, available, build
from tests.guard.ordinary import evacuates, round_of
from tests.guard.trial import die, die_unguarded, guarded, survive

pytestmark = [pytest.mark.guest, pytest.mark.slow]

SERIES = available() or ("6.1",)
QUICK = [kind for kind in SURVIVED if kind.quick]
# On the newest kernel a few of each technique: park, begin again, redirect, return.
FEW = ("panic", "nested-rcu", "hrtimer", "timer", "stack", "nmi-panic", "loop-irqs-off")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Image]:
    folder = tmp_path_factory.mktemp("guard")
    assert available(), "no kernels; run scripts/guard-kernels"
    return {series: build(series, folder) for series in available()}


@pytest.mark.parametrize("series", SERIES)
def test_one_boot_survives_one_crash_after_the_other(
    images: dict[str, Image], tmp_path: Path, series: str
) -> None:
    kinds = QUICK if series == SERIES[0] else [named(name) for name in FEW]
    with guarded(images[series], tmp_path, "irq-restart") as machine:
        assert faults(machine) == []
        if series == SERIES[0]:  # the campaign has a day of that
            hour = round_of(machine)
            assert {event["kind"] for event in machine.events()} == {"warning"}
            assert {sign.id for sign in hour.signs} >= {SignId.MODULE_WARNING, SignId.LOG_WARNING}
            assert evacuates([hour] * 24) == ""
        # What one leaves behind is still there after the next two: the campaign looks after each.
        last = len(kinds) - 1
        results = [
            survive(machine, kind, checked=number % 3 == 2 or number == last)
            for number, kind in enumerate(kinds)
        ]
        assert [result for result in results if result.wrong] == []
        # Whom a vhost worker worked for: that VM cannot be saved by a migration.
        owners = [event["owner"] for event in machine.events() if event["thread"] == "kthread"]
        assert any(owners) is ("vhost" in [kind.name for kind in kinds])
        # Parked threads hold the module: unloading is refused.
        assert machine.ask("rmmod semper_guard")[0] != 0


@pytest.mark.parametrize("kind", [named("panic"), named("hrtimer")], ids=lambda kind: kind.name)
def test_without_the_guard_the_host_dies(
    images: dict[str, Image], tmp_path: Path, kind: Kind
) -> None:
    assert die_unguarded(images[SERIES[0]], tmp_path, kind).wrong == ""


@pytest.mark.parametrize(
    ("policy", "kind"), FATAL[:1], ids=lambda value: getattr(value, "name", value)
)
def test_what_the_policy_does_not_accept_happens(
    images: dict[str, Image], tmp_path: Path, policy: str, kind: Kind
) -> None:
    with guarded(images[SERIES[0]], tmp_path, policy) as machine:
        assert die(machine, kind).wrong == ""


def test_after_the_evacuation_the_panic_goes_ahead_with_its_dump(tmp_path: Path) -> None:
    """What else there is about crash kernels is in the campaign (`tests.guard.dumps`)."""
    image = build(SERIES[0], tmp_path / "image", crash_kernel=True)
    assert tried(image, tmp_path, "panic: rescue, then dump").wrong == ""
    log = (tmp_path / "panic" / "console.log").read_text(errors="replace")
    assert "evacuated; put off was: a direct panic" in log


def test_a_storm_is_survived_up_to_its_bound_and_its_first_events_stay(
    images: dict[str, Image], tmp_path: Path
) -> None:
    with guarded(images[SERIES[0]], tmp_path, "strict", max_events=70, deadline_s=3600) as machine:
        machine.do("for i in $(seq 70); do (echo panic >/proc/semper_crash)& done")
        machine.wait_event(69, DEATH_S)
        assert [event["seq"] for event in machine.events()] == list(range(70))
        assert faults(machine) == []
        machine.do("dd if=/dev/semper_guard bs=4096 count=3 2>/dev/null | wc -l | grep -qx 3")
        machine.start("echo panic >/proc/semper_crash")
        assert machine.dies()
        assert "let-happen, too-many" in machine.log.read_text(errors="replace")


def test_nobody_evacuates_and_the_deadline_ends_the_host(
    images: dict[str, Image], tmp_path: Path
) -> None:
    with guarded(images[SERIES[0]], tmp_path, "strict", deadline_s=2) as machine:
        machine.start("echo panic >/proc/semper_crash")
        assert machine.dies()
        assert "nobody evacuated in 2 s after: a direct panic" in machine.log.read_text(
            errors="replace"
        )


def test_the_module_comes_and_goes_and_the_device_refuses_what_it_does_not_know(
    images: dict[str, Image], tmp_path: Path
) -> None:
    with Machine(images[SERIES[0]], tmp_path) as machine:
        machine.do("echo 1 >/proc/sys/vm/panic_on_oom")
        assert machine.ask("insmod /lib/semper_guard.ko policy=brave")[0] != 0
        for _ in range(5):
            machine.do("insmod /lib/semper_guard.ko policy=strict")
            machine.do("grep -qx 0 /proc/sys/vm/panic_on_oom")
            machine.do("ls -l /dev/semper_guard | grep -q ^crw-------")
            for command in ("", "evacuate", "rescue", "rescue 99", "rescue -1", "x" * 40):
                assert machine.ask(f"printf '{command}' >/dev/semper_guard")[0] != 0 or not command
            machine.do("for i in $(seq 60); do head -c $((i % 40)) /dev/urandom "
                       ">/dev/semper_guard; done 2>/dev/null; true")  # fmt: skip
            # Nothing was put off, so nothing is to go ahead.
            machine.do("echo evacuated >/dev/semper_guard")
            machine.do("rmmod semper_guard")
            machine.do("grep -qx 1 /proc/sys/vm/panic_on_oom")
        # Somebody else rewrites one of the five: the guard is not loaded, and says who that is.
        machine.do("insmod /lib/semper_crash.ko && echo occupy >/proc/semper_crash")
        assert machine.ask("insmod /lib/semper_guard.ko")[0] != 0
        machine.do("dmesg | grep -q 'nmi_panic() is rewritten by leave_as_is.*semper_crash'")
        machine.do("echo vacate >/proc/semper_crash && insmod /lib/semper_guard.ko")
        assert "WARNING" not in machine.log.read_text(errors="replace")
        machine.do("/bin/misuse 20000")
        assert machine.events() == []


def test_a_pstore_has_the_event_also_when_the_host_dies_of_something_else(
    images: dict[str, Image], tmp_path: Path
) -> None:
    ramoops = f"insmod /lib/ramoops.ko {RAMOOPS}"
    with guarded(images[SERIES[0]], tmp_path, "strict") as machine:
        machine.do(f"insmod /lib/reed_solomon.ko && {ramoops} && mount -t pstore p /sys/fs/pstore")
        machine.do('[ -z "$(ls /sys/fs/pstore)" ]')
        assert survive(machine, named("panic")).wrong == ""
        # Its memory is read when the module comes, as at the next boot.
        machine.do(f"rmmod ramoops && {ramoops}")
        machine.do("cat /sys/fs/pstore/dmesg-ramoops-* | grep 'semper_guard: event 0: panic'")
