"""A standby has taken over: the agent notes what that has lost, and lets go of the VM before."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sempervirt.qemu.spec import VmSpec
from sempervirt.standby.lost import Loss, LostDisk, losses_of
from sempervirt.standby.standbys import Standbys
from sempervirt.standby.state import Generation, Life, Standby, TakeOver
from sempervirt.standby.values import Policy
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.vm import Vm

TAKEN, BEGAN = 1_790_000_000.0, 1_790_000_300.0
TAKING_OVER = Standby(
    "web",
    Policy(),
    generations=(Generation(3, Life.READY, taken=TAKEN),),
    last=3,
    take_over=TakeOver(3, "QEMU was killed by signal 9", BEGAN, 10.0),
)


@dataclass
class Before:
    """The VM before: as much of `Vm` as is let go of."""

    spec: VmSpec
    ledger: Any
    name: str = "web"
    detached: list[bool] = field(default_factory=list)

    async def detach(self) -> None:
        """Notes whether its record was still there."""
        self.detached.append(self.ledger.path.exists())


@pytest.fixture
def before(tmp_path: Path) -> Before:
    """With a system disk, one that is handed over, and one that is read."""
    record = tmp_path / "s/vms/web/vm.json"
    record.parent.mkdir(parents=True)
    record.touch()
    disks = [
        {"name": "root", "image": "/srv/web.raw"},
        {"name": "data", "image": "/srv/data.raw", "keep": "latest"},
        {"name": "cd", "image": "/srv/cd.raw", "read_only": True},
    ]
    spec = VmSpec.model_validate({"name": "web", "disks": disks})
    return Before(spec, SimpleNamespace(path=record))


def left_with(tmp_path: Path, state: Standby | None) -> Standbys:
    """An agent that has found `state` on record, and has not gone on with it yet."""
    config = AgentConfig(tmp_path / "s", tmp_path / "r")
    house: Any = SimpleNamespace(config=config, vms={}, unknown={}, host=None)
    nobody: Any = None
    standbys = Standbys(house, nobody, nobody)
    if state is not None:
        standbys._left["web"] = state
    return standbys


async def test_the_loss_is_noted_before_the_record_of_the_vm_goes(
    tmp_path: Path, before: Before
) -> None:
    standbys, vm = left_with(tmp_path, TAKING_OVER), cast(Vm, before)
    expected = Loss(3, TAKEN, BEGAN, (LostDisk("root", Path("/srv/web.raw")),))
    for _ in range(2):  # the second time by an agent that does not know of the first
        loss = standbys._loss(vm.name, vm.spec)
        assert loss == expected
        await standbys._leave(vm, loss)
    assert before.detached == [True, False]
    assert not before.ledger.path.parent.exists()
    assert await standbys.losses("web") == (expected,)


@pytest.mark.parametrize(
    "state", [None, replace(TAKING_OVER, take_over=None), replace(TAKING_OVER, generations=())]
)
async def test_without_a_take_over_nothing_is_lost(
    tmp_path: Path, before: Before, state: Standby | None
) -> None:
    standbys, vm = left_with(tmp_path, state), cast(Vm, before)
    assert standbys._loss(vm.name, vm.spec) is None
    await standbys._leave(vm, None)
    assert await standbys.losses("web") == ()
    assert before.detached == [True]


async def test_a_note_that_cannot_be_written_keeps_nobody(
    tmp_path: Path, before: Before, caplog: pytest.LogCaptureFixture
) -> None:
    standbys, vm = left_with(tmp_path, TAKING_OVER), cast(Vm, before)
    losses_of(tmp_path / "s", "web").path.parent.touch()  # a file where the directory should be
    await standbys._leave(vm, standbys._loss(vm.name, vm.spec))
    assert before.detached == [True]
    assert "its loss is not noted" in caplog.text
