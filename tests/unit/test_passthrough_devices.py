"""What the two ends of a device's move ask of mediators and of QEMU, in which order."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.host.answers import read_answer
from sempervirt.passthrough.answers import (
    Captured,
    Configured,
    Drained,
    Exported,
    Imported,
    MediatorState,
    MediatorStatus,
    Released,
    Replayed,
    Resumed,
    Round,
    Table,
    TableWritten,
    Touched,
)
from sempervirt.passthrough.arriving import ArrivingDevices
from sempervirt.passthrough.device import Device
from sempervirt.passthrough.leaving import LeavingDevices, Moved
from sempervirt.passthrough.mediator import DeviceFiles, DeviceOptions, DeviceSetup
from sempervirt.passthrough.ports import PortSpace
from tests.unit.test_passthrough_ports import Machine

CONFIGURED = Configured(
    config="00" * 256,
    before=[(0x10, 4, 0xFEBF0004), (0x04, 2, 6)],
    after=[(0x42, 2, 0x8004)],
    msix_table=Table(bar=0, offset=0x2000, vectors=5, address=0xFEBF2000, table="0102"),
)
GOLDEN = Path(__file__).parents[2] / "crates/control/golden/vfiod-status.json"
STATUS = read_answer(
    MediatorStatus,
    json.loads(GOLDEN.read_text())["ok"] | {"state": "running"},
    "semper-vfiod",
    "status",
)
ANSWERS: dict[str, Any] = {
    "status": STATUS,
    "configuration": CONFIGURED,
    "write_table": TableWritten(written=2),
    "capture": Captured(on=True, page=0xFEBF1000),
    "round": Round(writes="w", count=1),
    "replay": Replayed(replayed=1),
    "quiesce": Drained(drained=1),
    "touch": Touched(pages=3),
    "export": Exported(state="s", bytes=1),
    "import_state": Imported(vectors=5),
    "release": Released(owns_image=False),
    "give_claim": None,
    "resume": Resumed(kicked=1),
}


class Mediator:
    """A client that notes what is asked, and answers from a table."""

    def __init__(self, machine: Machine) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.answers = dict(ANSWERS)
        self.machine = machine

    def __getattr__(self, name: str) -> Any:
        async def call(*_arguments: object, **_named: object) -> Any:
            self.asked.append((name, self.machine.running))
            answer = self.answers[name]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.asked]


class Fake(Device):
    """A device whose mediator is `Mediator`; a `gone` one has ended."""

    def __init__(self, place: Any, mediator: Mediator, name: str = "nvme") -> None:
        files = DeviceFiles(place, name)
        options = DeviceOptions(place / "x.raw")
        super().__init__(DeviceSetup(f"web/{name}", files, options, slot=30, shim_slot=29))
        self.mediator = mediator
        self.gone = False

    @property
    def pid(self) -> int | None:
        return None if self.gone else 1

    @property
    def client(self) -> Any:
        return super().client if self.gone else self.mediator


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def device(machine: Machine, tmp_path: Any) -> Fake:
    return Fake(tmp_path, Mediator(machine))


async def test_the_shim_is_laid_over_the_doorbells_while_the_guest_stands_still(
    machine: Machine, device: Fake
) -> None:
    leaving = LeavingDevices([device], machine.execute)
    await leaving.arm()
    assert device.mediator.asked == [("capture", False)]
    assert machine.runstates == [False, True]
    shim = machine.space[29]
    assert int.from_bytes(shim[0x10:0x14], "little") == 0xFEBF1000
    assert int.from_bytes(shim[4:6], "little") == 2
    await leaving.take_back()
    assert int.from_bytes(shim[4:6], "little") == 0
    assert device.mediator.asked[1:] == [("resume", False), ("capture", False), ("status", False)]
    assert machine.running


class Slow(Machine):
    """A monitor that answers later; `raced` is what was said to ports while the guest ran."""

    def __init__(self) -> None:
        super().__init__()
        self.raced: list[str] = []

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        for _ in range(3):
            await asyncio.sleep(0)  # poll interval: others go on
        if self.running and arguments is not None:
            self.raced.append(arguments["command-line"])
        return await super().execute(command, arguments)


async def test_the_way_back_begins_when_an_arming_that_was_given_up_has_let_the_guest_go(
    tmp_path: Any,
) -> None:
    machine = Slow()
    device = Fake(tmp_path, Mediator(machine))
    leaving = LeavingDevices([device], machine.execute)
    arming = asyncio.create_task(leaving.arm())
    for _ in range(12):
        await asyncio.sleep(0)  # poll interval: the arming goes on
    assert device.mediator.asked == [("capture", False)]
    arming.cancel()
    await leaving.take_back()
    assert arming.cancelled()
    assert machine.raced == []
    assert machine.runstates == [False, True, False, True]


@pytest.mark.parametrize("page", [None, 1 << 32])
async def test_doorbells_where_no_shim_reaches_are_left_alone(
    machine: Machine, device: Fake, page: int | None
) -> None:
    device.mediator.answers["capture"] = Captured(on=True, page=page)
    await LeavingDevices([device], machine.execute).arm()
    assert 29 not in machine.space


async def test_a_device_gives_everything_and_then_its_image(machine: Machine, device: Fake) -> None:
    leaving = LeavingDevices([device], machine.execute)
    assert await leaving.move() == {"nvme": Moved(CONFIGURED, "w", "s")}
    assert device.mediator.names == [
        "quiesce",
        "touch",
        "round",
        "configuration",
        "export",
        "release",
    ]
    assert leaving.pages_touched == 3
    device.mediator.answers["release"] = Released(owns_image=True)
    with pytest.raises(Unavailable, match="keeps the image"):
        await leaving.move()


async def test_the_way_back_waits_for_no_mediator_that_has_ended(
    machine: Machine, device: Fake
) -> None:
    leaving = LeavingDevices([device], machine.execute)
    device.mediator.answers["resume"] = Unavailable("in use")
    with pytest.raises(Unavailable, match="in use"):
        await leaving.take_back()
    assert machine.running
    device.gone = True
    await leaving.take_back()
    assert leaving.ended() == "web/nvme"
    with pytest.raises(Unavailable, match="is gone"):
        await leaving.move()


async def test_a_device_that_stands_still_again_is_taken_back_again(
    machine: Machine, device: Fake
) -> None:
    """By a question that the move had asked before it was given up, and that came late."""
    leaving = LeavingDevices([device], machine.execute)
    late = STATUS.model_copy(update={"state": MediatorState.QUIESCED})
    device.mediator.answers["status"] = late
    with pytest.raises(Unavailable, match="is quiesced again"):
        await leaving.take_back()
    assert machine.running
    device.mediator.answers["status"] = STATUS
    await leaving.take_back()


async def test_rounds_without_writes_are_not_sent(machine: Machine, device: Fake) -> None:
    leaving = LeavingDevices([device], machine.execute)
    assert await leaving.rounds() == {"nvme": "w"}
    device.mediator.answers["round"] = Round(writes="", count=0)
    assert await leaving.rounds() == {}


async def test_a_device_is_placed_once_and_again_only_if_the_guest_changed_it(
    machine: Machine, device: Fake
) -> None:
    arriving = ArrivingDevices([device], PortSpace(machine.execute))
    await arriving.prepare({"nvme": CONFIGURED})
    assert device.mediator.names == ["write_table"]
    assert int.from_bytes(machine.space[30][0x10:0x14], "little") == 0xFEBF0004
    assert int.from_bytes(machine.space[30][0x42:0x44], "little") == 0x8004
    await arriving.receive({"nvme": Moved(CONFIGURED, "w", "s")})
    assert device.mediator.names == ["write_table", "replay", "import_state"]
    other = CONFIGURED.model_copy(update={"after": [(0x42, 2, 0xC004)]})
    await arriving.receive({"nvme": Moved(other, "w", "s")})
    assert device.mediator.names[3:] == ["write_table", "replay", "import_state"]
    assert int.from_bytes(machine.space[30][0x42:0x44], "little") == 0xC004
    await arriving.claim(8, "c" * 32)
    await arriving.resume()
    assert device.mediator.names[-2:] == ["give_claim", "resume"]
    device.gone = True
    await arriving.claim(8, "c" * 32)
    await arriving.resume()
    assert arriving.ended() == "web/nvme"


async def test_a_source_that_tells_of_other_devices_is_refused(
    machine: Machine, device: Fake
) -> None:
    arriving = ArrivingDevices([device], PortSpace(machine.execute))
    with pytest.raises(InvalidRequest, match="both hosts have to run releases"):
        await arriving.prepare({})
    with pytest.raises(InvalidRequest, match="not that of all devices"):
        await arriving.receive({})
    with pytest.raises(InvalidRequest, match="no device gpu"):
        await arriving.replay({"gpu": "w"})
    assert machine.space == {}
    assert device.mediator.asked == []
