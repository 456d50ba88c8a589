"""What the host that keeps standbys of a VM asks of the host that runs it, at `api.first`.

look       what is known of the VM there, and what it is made of
snapshot   of the disks of which standbys have copies
give_up    a snapshot that was copied
end        the VM has ended, and was seen to: that host's own word
keep       the other way round: from the VM's host, with the VM and how standbys are kept
take_over  this way round as well: the VM's host is about to die, and has a standby take over
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from sempervirt.host.http import Connection, understood
from sempervirt.qemu.spec import DEVICES_MAX, VmSpec, few
from sempervirt.standby.ports import Snapshot
from sempervirt.standby.values import Policy
from sempervirt.standby.watching import Seen

LOOK_ANSWER_S = 3.0
# Freezing file systems, a switch, and what it takes to seal a snapshot on a slow disk.
SNAPSHOT_S = 90.0
GIVE_UP_S = 20.0
# QEMU and backends end, or are seen not to.
END_S = 40.0
KEEP_S = 30.0
# The VM ends, its end is told, the state is loaded, and the guest runs.
TAKE_OVER_S = 45.0


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True)


class SnapshotFirst(_Message):
    """Take a snapshot of those disks."""

    disks: Annotated[tuple[str, ...], few(DEVICES_MAX)] = Field(max_length=DEVICES_MAX)


class GiveUpFirst(_Message):
    """Give up a snapshot; `ours` were taken for standbys, `reader` has copied it."""

    disk: str
    snapshot: int = Field(ge=1)
    ours: Annotated[frozenset[int], few(DEVICES_MAX)] = Field(max_length=DEVICES_MAX)
    reader: str = Field(min_length=1, max_length=40)


class EndFirst(_Message):
    """End the VM; without `kill` only one that is dead already."""

    kill: bool


class KeepStandby(_Message):
    """Keep standbys of a VM of the host that asks."""

    spec: VmSpec
    policy: Policy


@dataclass(frozen=True)
class FirstTold:
    """What a host knows of its VM. `life` is another one when the VM began anew; `served` are the
    disks of which snapshots can be taken.
    """

    life: str
    seen: Seen
    spec: VmSpec
    accelerator: str
    served: frozenset[str]


@dataclass(frozen=True)
class GivenUpFirst:
    """Why the snapshot stays, "" where it does not."""

    note: str


@dataclass(frozen=True)
class EndedFirst:
    """What was seen of the VM's end."""

    evidence: str


_TOLD = TypeAdapter(FirstTold)
_SNAPSHOT = TypeAdapter(Snapshot)
_GIVEN_UP = TypeAdapter(GivenUpFirst)
_ENDED = TypeAdapter(EndedFirst)


class FirstPeer:
    """The VM `name` on the host at the other end of `connection`. Each call raises what that host
    raised, AgentUnavailable when it is not reached, OutcomeUnknown when it does not answer.
    """

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self._path = f"/vms/{name}/first"

    async def look(self, *, ready: bool) -> FirstTold:
        """What is known of it. `ready`: a standby here could take over now."""
        path = self._path
        told = await self._get(f"{path}?ready={'true' if ready else 'false'}")
        return understood(_TOLD, told, f"GET {path}")

    async def snapshot(self, disks: tuple[str, ...]) -> Snapshot:
        """Of those disks, at one instant."""
        body = SnapshotFirst(disks=disks)
        return understood(_SNAPSHOT, await self._post("snapshot", body, SNAPSHOT_S), "snapshot")

    async def give_up(self, body: GiveUpFirst) -> str:
        """Gives a snapshot up; why it stays, "" where it does not."""
        answer = await self._post("give-up", body, GIVE_UP_S)
        return understood(_GIVEN_UP, answer, "give-up").note

    async def end(self, *, kill: bool) -> str:
        """Has the VM end, and seen to have ended: what was seen."""
        answer = await self._post("end", EndFirst(kill=kill), END_S)
        return understood(_ENDED, answer, "end").evidence

    async def keep(self, spec: VmSpec, policy: Policy) -> Any:
        """Has the host keep standbys of a VM of this host; what it shows of them."""
        body = KeepStandby(spec=spec, policy=policy).model_dump(mode="json")
        path = f"/vms/{spec.name}/standby/kept"
        return await self._connection.call("PUT", path, body=body, timeout_s=KEEP_S)

    async def take_over(self) -> None:
        """Has that host's standby take over a VM of this one; returns when its guest runs. May be
        repeated.
        """
        path = f"{self._path.removesuffix('/first')}/standby/kept/take-over"
        await self._connection.call("POST", path, timeout_s=TAKE_OVER_S)

    async def standby(self, name: str) -> Any:
        """What that host shows of the standbys that it keeps of a VM."""
        return await self._get(f"/vms/{name}/standby")

    async def _get(self, path: str) -> Any:
        return await self._connection.call("GET", path, timeout_s=LOOK_ANSWER_S)

    async def _post(self, what: str, body: _Message, timeout_s: float) -> Any:
        path, content = f"{self._path}/{what}", body.model_dump(mode="json")
        return await self._connection.call("POST", path, body=content, timeout_s=timeout_s)
