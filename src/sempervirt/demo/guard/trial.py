"""One death of host a's kernel, and what became of the VM."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field

from sempervirt.api.client import Client
from sempervirt.core.errors import SempervirtError, StateConflict
from sempervirt.demo.guard import counter
from sempervirt.demo.guard.counter import Count
from sempervirt.demo.guard.emulated import NoAnswerError
from sempervirt.demo.guard.host_a import HostA
from sempervirt.demo.guard.stage import Stage
from sempervirt.qemu.state import Runstate

POLL_S = 0.01
# Counts before the death and after the move, so that a gap would be seen.
BEFORE = 20
AFTER = 20
START_S = 90.0
MOVE_S = 90.0


@dataclass(frozen=True)
class Death:
    """A way to die. `before` makes it deadly, `after` takes that back; `word` is what the kernel's
    log then has first: by default the module's.
    """

    name: str
    command: str
    before: str = "true"
    after: str = "true"
    word: str = "semper_guard: event "


@dataclass(frozen=True)
class Heard:
    """What the guest said, and when (monotonic, this machine's), on one host."""

    times: tuple[float, ...] = ()
    counts: tuple[Count, ...] = ()


@dataclass
class Outcome:
    """What a trial has shown. Times in seconds; `wrong` is empty when nothing was lost.

    `asked_to_running_s` is from the command that kills the kernel, `event_to_running_s` from the
    module's word of it, until the guest was heard on host b. `gap_s` is the guest's own: beyond one
    tick, how long it was not heard.
    """

    death: str
    wrong: str = ""
    event: str = ""
    asked_to_running_s: float = 0.0
    event_to_running_s: float = 0.0
    gap_s: float = 0.0
    here: Heard = field(default_factory=Heard)
    there: Heard = field(default_factory=Heard)
    asked: float = 0.0
    evented: float = 0.0


class Listener:
    """Hears what a guest says, with the time at which it was heard."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counts: list[Count] = []

    def hear(self, counts: list[Count]) -> None:
        """All that was said so far."""
        now = time.monotonic()
        fresh = counts[len(self.counts) :]
        self.counts += fresh
        self.times += [now] * len(fresh)

    @property
    def heard(self) -> Heard:
        """As a value."""
        return Heard(tuple(self.times), tuple(self.counts))


class Ears:
    """Listens to a VM on both hosts, until it is told not to."""

    def __init__(self, stage: Stage, vm: str) -> None:
        self.here, self.there = Listener(), Listener()
        self.said_here = self.said_there = ""
        self._stage, self._vm = stage, vm
        self._beats = stage.host_a.beats.stat().st_size

    def listen(self) -> None:
        """Once."""
        said = self._stage.host_a.beats.read_bytes()[self._beats :]
        self.said_here = said.decode(errors="replace")
        self.said_there = self._stage.said_on_b(self._vm) or self.said_there
        self.here.hear(counter.read(self.said_here))
        self.there.hear(counter.read(self.said_there))

    async def until(self, listener: Listener, count: int, deadline_s: float, what: str) -> None:
        """Listens until so many counts were heard. Raises NoAnswerError."""
        give_up = time.monotonic() + deadline_s
        while len(listener.counts) < count:
            self.listen()
            if time.monotonic() > give_up:
                raise NoAnswerError(f"not by the deadline: {what}; {self._stage.host_a.tail()}")
            await asyncio.sleep(POLL_S)


async def begin(stage: Stage, vm: str) -> Ears:
    """Starts a VM on host a, and returns when it counts. Raises NoAnswerError, SempervirtError."""
    ears = Ears(stage, vm)
    async with stage.client_a() as client:
        await _in_service(client)
        await client.run_vm(stage.spec(vm))
    await ears.until(ears.here, BEFORE, START_S, f"{vm} counts on host a")
    return ears


async def _in_service(client: Client) -> None:
    """Puts host a into service again: an evacuation has put it out. Raises SempervirtError."""
    give_up = time.monotonic() + MOVE_S
    while True:
        try:
            await client.return_host()
        except StateConflict:  # the last evacuation still checks what came of it
            if time.monotonic() > give_up:
                raise
            await asyncio.sleep(POLL_S * 10)
        else:
            return


async def die(
    stage: Stage, vm: str, ears: Ears, death: Death, *, takes_back: bool = True
) -> Outcome:
    """Kills the kernel of host a, and follows the VM to host b. Nothing is raised: what went wrong
    stands in the outcome.
    """
    host, outcome = stage.host_a, Outcome(death.name)
    try:
        await asyncio.to_thread(host.do, death.before)
        seen = host.log.stat().st_size
        outcome.asked = time.monotonic()
        await asyncio.to_thread(host.start, death.command)
        event = asyncio.create_task(
            asyncio.to_thread(host.wait_log, death.word, MOVE_S, after=seen)
        )
        await ears.until(ears.there, 1, MOVE_S, f"{vm} runs on host b after {death.name}")
        running = ears.there.times[0]
        outcome.evented = await event
        await ears.until(ears.there, AFTER, MOVE_S, f"{vm} goes on counting on host b")
        outcome.event = _event(host, death.word, seen)
        if takes_back:
            await asyncio.to_thread(host.do, death.after)
            ears.listen()
        outcome.asked_to_running_s = running - outcome.asked
        outcome.event_to_running_s = running - outcome.evented
        outcome.here, outcome.there = ears.here.heard, ears.there.heard
        outcome.gap_s = max(0.0, running - ears.here.times[-1] - counter.TICK_S)
        outcome.wrong = counter.lost(ears.said_here, ears.said_there)
    except (NoAnswerError, SempervirtError, OSError) as error:
        outcome.wrong = str(error)
        outcome.here, outcome.there = ears.here.heard, ears.there.heard
    return outcome


async def die_unguarded(stage: Stage, death: Death, deadline_s: float) -> str:
    """The control, without the module: the kernel dies, and the VM with it. What is wrong with
    that.
    """
    await asyncio.to_thread(stage.host_a.do, death.before)
    await asyncio.to_thread(stage.host_a.start, death.command)
    if not await asyncio.to_thread(stage.host_a.dies, deadline_s):
        return f"the host lives without the module; {stage.host_a.tail()}"
    async with stage.client_b() as client:
        running = [vm.name for vm in await client.vms() if vm.state is Runstate.RUNNING]
    return f"{', '.join(running)} run on host b" if running else ""


def _event(host: HostA, word: str, seen: int) -> str:
    text = host.log.read_bytes()[seen:].decode(errors="replace")
    found = re.search(rf"{re.escape(word)}.*", text)
    return found[0].removeprefix("semper_guard: ").strip() if found else ""
