"""What can be asked of one backend process, over its control socket.

Each method raises Unavailable when the process does not listen (any more), OutcomeUnknown when it
was asked and did not answer, and InvalidRequest or Unavailable as the process says.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

from sempervirt.core.queue_map import ThreadMap
from sempervirt.disk.answers import (
    Armed,
    BlockMap,
    Claimed,
    Layers,
    Merging,
    Pins,
    QueuesResumed,
    Quiesced,
    Resized,
    SnapshotTaken,
    Status,
    Threads,
    Undone,
    VerifyStarted,
)
from sempervirt.disk.backend import PROGRAM
from sempervirt.host.control import DEADLINE_S, ControlSocket

# Every page of the guest is compared before an export begins: seconds for each GiB.
MAP_DEADLINE_S = 600.0
# How long a snapshot may wait for the requests in flight: at most, and of the time for its answer.
PAUSE_MAX_MS = 2000
PAUSE_SHARE = 0.75


class BackendClient:
    """Of the process that listens on `path`, which has to be `pid`; each question has a connection
    of its own.
    """

    def __init__(self, path: Path, pid: int | None = None) -> None:
        self._socket = ControlSocket(path, PROGRAM, pid)

    async def status(self, timeout_s: float = DEADLINE_S) -> Status:
        """What the process is doing, and its counters."""
        return await self._socket.ask_for(Status, "status", timeout_s=timeout_s)

    async def move_queues(self, thread_map: ThreadMap) -> None:
        """Has queue i worked on by thread `thread_map[i]`; no request is lost."""
        await self._socket.ask_for(Threads, "threads", map=list(thread_map))

    async def resize(self, size_bytes: int) -> Resized:
        """Makes the image larger, serves all of it, and has QEMU read the new size."""
        return await self._socket.ask_for(Resized, "resize", size_bytes=size_bytes)

    async def arm_release(self, *, armed: bool) -> bool:
        """Has the process let the image go as soon as no queue runs, or take the image back.

        Returns whether the process holds the image now.
        """
        return (await self._socket.ask_for(Armed, "handover", armed=armed)).owns_image

    async def give_claim(self, epoch: int, claim: str) -> None:
        """Gives the process the claim that it awaits; queues that waited for the claim start."""
        await self._socket.ask_for(Claimed, "claim", epoch=epoch, claim=claim)

    async def snapshot(self, *, frozen: bool, timeout_s: float = DEADLINE_S) -> SnapshotTaken:
        """Opens a layer: what was written before is the snapshot, once the layer is sealed. The
        requests in flight have a part of `timeout_s`, at most 2 s, to end.

        Raises StateConflict when the chain is full; Unavailable, and nothing has changed.
        """
        within_ms = max(1, min(PAUSE_MAX_MS, int(timeout_s * 1000 * PAUSE_SHARE)))
        return await self._socket.ask_for(
            SnapshotTaken, "snapshot", frozen=frozen, within_ms=within_ms, timeout_s=timeout_s
        )

    async def undo(self, snapshot: int, *, timeout_s: float = DEADLINE_S) -> Undone:
        """Gives up a snapshot that was just taken. Raises InvalidRequest when there is none."""
        return await self._socket.ask_for(Undone, "undo", snapshot=snapshot, timeout_s=timeout_s)

    async def layers(self) -> Layers:
        """The chain of the disk, and what goes on with it."""
        return await self._socket.ask_for(Layers, "layers")

    async def merge(self, through: int | None, rate_bytes: int | None) -> Merging:
        """Gives up the snapshots up to `through` (None: those that nobody wants), and begins to
        merge the layers that nobody needs then, at most `rate_bytes` a second.

        Raises StateConflict when one of the snapshots is pinned.
        """
        given = {"through": through, "rate_bytes": rate_bytes}
        asked = {name: value for name, value in given.items() if value is not None}
        return await self._socket.ask_for(Merging, "merge", **asked)

    async def unpin(self, snapshot: int, reader: str) -> Pins:
        """Says that a reader, which died, does not read a snapshot any more."""
        return await self._socket.ask_for(Pins, "unpin", snapshot=snapshot, reader=reader)

    async def quiesce(self, for_ms: int, *, timeout_s: float = DEADLINE_S) -> Quiesced:
        """Takes no requests for `for_ms`, or until `resume`; those that were taken are done."""
        return await self._socket.ask_for(Quiesced, "quiesce", for_ms=for_ms, timeout_s=timeout_s)

    async def resume(self) -> QueuesResumed:
        """Ends `quiesce`."""
        return await self._socket.ask_for(QueuesResumed, "resume")

    async def block_map(self) -> BlockMap:
        """Which blocks of the disk stand in the guest's pages, in numbers."""
        return await self._socket.ask_for(BlockMap, "map")

    async def verify_block_map(self) -> None:
        """Begins to compare every page with the disk, unless that is going on."""
        await self._socket.ask_for(VerifyStarted, "map-verify")

    def export_block_map(self, *, verify: bool) -> AsyncIterator[bytes]:
        """The map in its binary form (docs/reference/map-format.md), in pieces."""
        return self._socket.download("map-export", timeout_s=MAP_DEADLINE_S, verify=verify)
