"""What the source of a migration asks of the destination's agent, at the routes of `api.migration`.

Each call raises what the destination raised, AgentUnavailable when it is not reached, and
OutcomeUnknown when it did not answer, or what cannot be understood: another host may have another
release, or be hostile.
"""

from __future__ import annotations

from pydantic import TypeAdapter

from sempervirt.host.http import READ_TIMEOUT_S, Connection, understood
from sempervirt.migration.messages import (
    ArrivalAnswer,
    ArrivalRequest,
    DeviceRounds,
    DeviceState,
    DeviceStates,
    RunRequest,
)
from sempervirt.migration.obstacles import HostSide
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.phases import Arrival

# Beside what it was asked to wait, another host answers at once.
ANSWER_S = 4.0
# Starting a QEMU with its backends, letting a guest run: bounded by the destination's deadlines.
WORK_S = 150.0
# A few questions to a mediator and to QEMU, while the guest stands still.
DEVICES_S = 10.0

_HOST_SIDE = TypeAdapter(HostSide)
_ARRIVAL = TypeAdapter(ArrivalAnswer)


async def host_side(
    connection: Connection, spec: VmSpec, timeout_s: float = READ_TIMEOUT_S
) -> HostSide:
    """What a host, as a destination, is, has and sees of a VM."""
    body = spec.model_dump(mode="json")
    answer = await connection.call("POST", "/migration/side", body=body, timeout_s=timeout_s)
    return understood(_HOST_SIDE, answer, "POST /migration/side")


class DestinationPeer:
    """One migration, as its destination sees it; `id` is the migration's."""

    def __init__(self, connection: Connection, id: str) -> None:  # noqa: A002 - its name in messages
        self._connection = connection
        self._path = f"/arrivals/{id}"

    async def prepare(self, request: ArrivalRequest) -> ArrivalAnswer:
        """Has the host prepare for a VM; answers when all is ready."""
        body = request.model_dump(mode="json")
        answer = await self._connection.call("POST", "/arrivals", body=body, timeout_s=WORK_S)
        return understood(_ARRIVAL, answer, "POST /arrivals")

    async def look(self, seen: Arrival, wait_s: float) -> ArrivalAnswer:
        """How far it is; answers when that is not `seen` any more, or after `wait_s`."""
        query = {"seen": seen.value, "wait_s": wait_s}
        timeout_s = wait_s + ANSWER_S
        answer = await self._connection.call("GET", self._path, query=query, timeout_s=timeout_s)
        return understood(_ARRIVAL, answer, f"GET {self._path}")

    async def promise(self) -> None:
        """Has the host wait for the outcome from now on."""
        await self._connection.call("POST", f"{self._path}/promise")

    async def replay_devices(self, writes: dict[str, str]) -> None:
        """Gives the host a round of register writes, by passed-through device."""
        body = DeviceRounds(writes=writes).model_dump()
        path = f"{self._path}/devices/round"
        await self._connection.call("POST", path, body=body, timeout_s=DEVICES_S)

    async def receive_devices(self, states: dict[str, DeviceState]) -> None:
        """Gives the host the state of every device; answers when it is kept there."""
        body = DeviceStates(states=states).model_dump(mode="json")
        path = f"{self._path}/devices"
        await self._connection.call("POST", path, body=body, timeout_s=DEVICES_S)

    async def recover(self) -> ArrivalAnswer:
        """Has the host wait for a stream that broke in postcopy, at a new address."""
        path = f"{self._path}/recover"
        return understood(_ARRIVAL, await self._connection.call("POST", path), f"POST {path}")

    async def run(self, epoch: int, claim: str) -> None:
        """Tells the host that the VM is its own, by which claim; answers when the guest runs."""
        body = RunRequest(epoch=epoch, claim=claim).model_dump()
        await self._connection.call("POST", f"{self._path}/run", body=body, timeout_s=WORK_S)

    async def abort(self, why: str) -> None:
        """Tells the host that the VM does not come."""
        path, query = f"{self._path}/abort", {"why": why}
        await self._connection.call("POST", path, query=query, timeout_s=ANSWER_S)
