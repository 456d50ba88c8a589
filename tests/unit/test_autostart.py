"""VMs that are started with the host, and the order in which they end before it goes down."""

from __future__ import annotations

from pathlib import Path

from sempervirt.core.errors import InvalidRequest, StateConflict, Unavailable
from sempervirt.qemu.accel import Accelerator
from sempervirt.qemu.spec import HaSpec, VmSpec
from sempervirt.qemu.state import End, Runstate, VmState
from sempervirt.vm.autostart import Settled, due, is_idle, start_all
from sempervirt.vm.phases import Phase
from sempervirt.vm.record import VmRecord
from sempervirt.vm.shutdown import LEAST_S, in_order, moving_s, share_s
from sempervirt.vm.work import Departing


def vm(name: str, priority: int = 50, *, autostart: bool = True) -> VmSpec:
    return VmSpec(name=name, ha=HaSpec(priority=priority), autostart=autostart)


class Host:
    """VMs that were known when it came up; some do not start the first times."""

    def __init__(self, *specs: VmSpec, failing: dict[str, list[Exception]] | None = None) -> None:
        self.specs = specs
        self.running: list[str] = []
        self.asked: list[str] = []
        self._failing = failing or {}

    def known(self) -> list[tuple[VmSpec, bool]]:
        return [(spec, spec.name not in self.running) for spec in self.specs]

    async def start(self, name: str) -> None:
        self.asked.append(name)
        if left := self._failing.get(name):
            raise left.pop(0)
        self.running.append(name)


async def test_vms_that_ask_for_it_are_started_by_priority(tmp_path: Path) -> None:
    host = Host(vm("a", 10), vm("b", 90), vm("c", 90), vm("d", 99, autostart=False))
    failed = await start_all(host.known, host.start, Settled(tmp_path, "boot"))
    assert host.running == ["b", "c", "a"]
    assert not failed


async def test_in_one_boot_a_vm_is_started_once(tmp_path: Path) -> None:
    host = Host(vm("a"), vm("b"))
    host.running.append("b")
    await start_all(host.known, host.start, Settled(tmp_path, "boot"))
    host.running.clear()  # an operator has stopped both, and the agent begins anew
    await start_all(host.known, host.start, Settled(tmp_path, "boot"))
    assert host.asked == ["a"]
    await start_all(host.known, host.start, Settled(tmp_path, "the next boot"))
    assert host.asked == ["a", "a", "b"]


async def test_what_may_be_there_in_a_moment_is_waited_for_and_nothing_else(tmp_path: Path) -> None:
    store, wrong = Unavailable("the store does not answer"), InvalidRequest("no such kernel")
    host = Host(vm("a", 60), vm("b"), vm("c"), failing={"a": [store] * 2, "b": [wrong] * 9})
    failed = await start_all(host.known, host.start, Settled(tmp_path, "boot"), again_s=0.01)
    assert host.running == ["c", "a"]
    assert failed == {"b": wrong}
    assert host.asked.count("b") == 1


async def test_waiting_has_an_end(tmp_path: Path) -> None:
    host = Host(vm("a"), failing={"a": [StateConflict("it is out of service")] * 9})
    failed = await start_all(host.known, host.start, Settled(tmp_path, "boot"), bound_s=0)
    assert [*failed] == host.asked == ["a"]


async def test_a_medium_that_is_full_keeps_no_other_vm_from_its_start(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")
    host = Host(vm("a", 90), vm("b"), failing={"a": [full]})
    failed = await start_all(host.known, host.start, Settled(tmp_path, "boot"))
    assert host.running == ["b"]
    assert "No space left" in str(failed["a"])


async def test_who_was_started_by_somebody_meanwhile_is_not_started_again(tmp_path: Path) -> None:
    away = Unavailable("the store does not answer")
    host = Host(vm("a", 90), vm("b"), failing={"a": [away] * 3, "b": [away] * 9})
    settled = Settled(tmp_path, "boot")

    async def start(name: str) -> None:
        if name == "a" and host.asked.count("a") == 1:
            host.running.append("b")  # by an operator, who stops it again
        if name == "a" and host.asked.count("a") == 3:
            host.running.remove("b")
        await host.start(name)

    await start_all(host.known, start, settled, again_s=0.01)
    assert host.running == ["a"]


def test_a_vm_that_has_gone_to_another_host_is_not_started() -> None:
    went = Departing("1", "b", "10.0.0.2:7443", running=True, phase=Phase.DONE)
    for reason, idle in (("it was stopped", True), (went.farewell, False)):
        end = VmState(run=Runstate.STOPPED, why=reason, end=End(reason))
        record = VmRecord(vm("web"), Accelerator("tcg", ""), 0.0, end=end)
        assert is_idle(record, freed=True) is idle
        assert due([(vm("web"), is_idle(record, freed=True))], set()) == ["web"] * idle


def test_what_others_depend_on_ends_last() -> None:
    groups = in_order([vm("db", 90), vm("b", 10), vm("a", 10), vm("web", 50)])
    assert [[spec.name for spec in group] for group in groups] == [["a", "b"], ["web"], ["db"]]


def test_all_that_is_done_fits_into_the_deadline() -> None:
    left_s = 100.0
    for groups in (3, 2, 1):
        given_s = share_s(left_s, groups, 90.0)
        left_s -= given_s
    assert left_s >= 0
    assert share_s(0.0, 2, 90.0) == LEAST_S
    assert share_s(300.0, 1, 90.0) == 90.0
    assert moving_s(300.0, 90.0) + share_s(90.0, 1, 90.0) <= 300.0


def test_a_record_that_says_nothing_starts_vms_once_more(tmp_path: Path) -> None:
    settled = Settled(tmp_path, "boot")
    settled.add("a")
    assert Settled(tmp_path, "boot").names == {"a"}
    for content in ("", "[]", '{"version": 1, "boot_id": "boot", "settled": 7}'):
        (tmp_path / "autostart.json").write_text(content)
        assert Settled(tmp_path, "boot").names == set()
