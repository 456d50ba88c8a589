"""The same load and kills with qemu-storage-daemon, which keeps no record of requests in flight.

QEMU's own program for this is the peer to compare with: it is killed as semper-blkd is, started
again at once on the same socket, and QEMU connects again. What becomes of the requests that were in
flight, the guest says.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from sempervirt.core.errors import SempervirtError, Unavailable
from sempervirt.demo.trial import Trial, TrialSetup, running
from sempervirt.demo.verdict import Verdict
from sempervirt.disk.backend import Launch
from sempervirt.guest.errors import ProbeGone, ProbeSilent
from sempervirt.guest.reports import Stats

# A request that is out for longer counts as hung; none of a sound disk takes so long.
HANG_S = 5.0
# Killing goes on for no longer, lest the comparison take more than its half a minute.
KILLING_S = 20.0
# Between two kills. Only a kill while requests are answered in another order than they came loses
# one: with a disk that answers soon one kill of twelve. So many fit into that time.
PAUSE_S = (0.02, 0.1)
# A request that has not come back for so much longer is lost.
LATE_S = 15.0
# After the first loss, until the guest's kernel has told of the others.
AFTERMATH_S = HANG_S + 1.0


@dataclass(frozen=True)
class StorageDaemon:
    """qemu-storage-daemon, which does not track requests in flight."""

    aio: str = "threads"
    environment: Mapping[str, str] = field(default_factory=dict)
    has_spare: bool = False
    has_control: bool = False

    def binary(self) -> str:
        """From the PATH."""
        found = shutil.which("qemu-storage-daemon")
        if found is None:
            raise Unavailable("qemu-storage-daemon is not installed", remedy="run make setup")
        return found

    def argv(self, launch: Launch) -> list[str]:
        """Serves the same image on the same listening socket."""
        options = launch.options
        cache = "on" if options.direct else "off"
        image = (
            f"driver=file,node-name=image,filename={options.image},aio={self.aio},"
            f"cache.direct={cache},locking=off"
        )
        export = (
            f"type=vhost-user-blk,id=disk,node-name=image,writable=on,"
            f"num-queues={options.queues},addr.type=fd,addr.str={launch.listen_fd}"
        )
        return [launch.binary, "--blockdev", image, "--export", export]

    def read_argv(self, argv: Sequence[str]) -> Launch:
        """Nobody adopts it."""
        raise ValueError(f"{argv[0]} is not read")


def with_peer(setup: TrialSetup) -> TrialSetup:
    """The same trial, with qemu-storage-daemon."""
    command = StorageDaemon(aio="io_uring" if setup.direct else "threads")
    return replace(setup, engine="auto", command=command)


async def kill_until_lost(
    setup: TrialSetup,
    kills: int,
    seed: int | None,
    say: Callable[[str], None],
    *,
    kill: Callable[[Trial], Awaitable[None]] = Trial.kill_active,
    aftermath_s: float = AFTERMATH_S,
) -> Verdict:
    """Kills the backend of `setup` under load until the guest has seen a loss, at most `kills`
    times. A verdict without a loss is of a disk that was read back as a whole.

    `kill` may wait for an instant of its choice. `aftermath_s`: how long the guest is listened to
    after its first loss.
    """
    peer = replace(setup, load=replace(setup.load, hang_s=HANG_S))
    chance = random.Random(seed)
    say("the same with qemu-storage-daemon: booting a guest")
    async with running(peer) as trial:
        loss: Stats | None = None
        ends = time.monotonic() + KILLING_S
        while loss is None and trial.verdict.kills < kills and time.monotonic() < ends:
            await asyncio.sleep(chance.uniform(*PAUSE_S))
            await trial.kill_backend(lambda: kill(trial))
            say(f"the same with qemu-storage-daemon: kill {trial.verdict.kills}")
            loss = await _loss(trial)
        if loss is None:
            loss = await _late_loss(trial)
        if loss is None:
            say("the same with qemu-storage-daemon: reading every block back")
            await trial.stop_load()
        else:  # writers that wait for a lost request would hold up the end
            say("the same with qemu-storage-daemon: something was lost")
            trial.verdict.add(await _aftermath(trial, loss, aftermath_s))
        return trial.verdict


def _has_lost(stats: Stats) -> bool:
    return bool(stats.hung or _has_failed(stats))


def _has_failed(stats: Stats) -> bool:
    return bool(stats.io_error_count or stats.wrong.total)


async def _loss(trial: Trial) -> Stats | None:
    """A request that is late is waited for: on a busy machine it need not be lost."""
    stats = await trial.probe.stats()
    if _has_lost(stats) and not _has_failed(stats):
        with suppress(Unavailable):
            stats = await trial.probe.wait_stats(
                lambda seen: not seen.hung or _has_failed(seen), deadline_s=LATE_S
            )
    return stats if _has_lost(stats) else None


async def _late_loss(trial: Trial) -> Stats | None:
    """After the last kill: a writer that waits for a lost request does not stop when told to."""
    with suppress(SempervirtError, ProbeSilent):
        stats = await trial.probe.write_stop(verify=False, stop_deadline_s=LATE_S)
        return stats if _has_lost(stats) else None
    return None


async def _aftermath(trial: Trial, loss: Stats, listened_s: float) -> Stats:
    """What the guest has seen a little later; as much as it can still tell."""
    deadline = time.monotonic() + listened_s
    with suppress(ProbeGone, ProbeSilent):
        while time.monotonic() < deadline:
            await asyncio.sleep(0.2)
            loss = await trial.probe.stats()
    return loss
