"""The owner of a VM's standbys: carries out what `decide` decides, by way of `ports`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import assert_never

from sempervirt.core.errors import OutcomeUnknown, SempervirtError, Unavailable
from sempervirt.core.events import Journal
from sempervirt.core.failure import Failure
from sempervirt.host.owner import HOST_CLOCK, Clock, Owner, Replies
from sempervirt.standby import decide
from sempervirt.standby.ports import Ports
from sempervirt.standby.state import (
    Accept,
    Boot,
    Booted,
    CancelAsked,
    Claim,
    Claimed,
    Copied,
    Copy,
    Decision,
    DisableAsked,
    Effect,
    Event,
    Failed,
    FailoverAsked,
    Fence,
    Fenced,
    FirstSeen,
    Freeze,
    Frozen,
    GivenUp,
    GiveUp,
    Load,
    Loaded,
    Lost,
    Making,
    PolicyAsked,
    Probe,
    Probed,
    Refuse,
    Rehearsed,
    Remove,
    Removed,
    Run,
    Runs,
    Settle,
    Settled,
    Stand,
    StandAgain,
    Standby,
    Step,
    Stood,
    Take,
    Taken,
    TakingOver,
    Tick,
    Unrecorded,
)
from sempervirt.standby.values import Policy

log = logging.getLogger(__name__)

# An agent that closes waits so long for a take-over, then leaves it to the next one.
CLOSE_S = 20.0
# A standby is booted in that time, or something is wrong.
REFRESH_S = 900.0


class StandbyDriver(Owner[Standby, Event, Effect]):
    """The standbys of one VM. Made with `start`; ends with `detach`, or when they were removed."""

    def __init__(self, state: Standby, ports: Ports, clock: Clock = HOST_CLOCK) -> None:
        super().__init__(f"standbys of VM {state.vm}", state, clock)
        self.vm = state.vm
        self.journal = Journal(state.vm)
        self._ports = ports
        self._replies = Replies()
        self._undone: Event | None = None
        self._watched: dict[int, asyncio.Task[None]] = {}

    def begin_watching(self) -> None:
        """From now on what becomes of the first VM, and of what waits, is seen. Called once."""
        self.keep(self._watch_first(), "watch")
        self._watch_ready()

    # What can be asked

    async def failover(
        self, *, force: bool, word: str = "", cause: str = FailoverAsked.cause
    ) -> None:
        """Has a standby take over; returns when the guest runs. `word` is what an operator says of
        the first VM's end, `cause` who asks for it, for people. Raises StateConflict when none can,
        Unavailable or OutcomeUnknown when it did not go well.
        """
        ticket, reply = self._replies.open()
        self.post(FailoverAsked(ticket, force, time.time(), word, cause))
        await reply

    async def refresh(self) -> None:
        """Has a new standby made now, and returns when it is ready. Raises Unavailable."""
        before = self.state
        making = before.making
        number = before.last + 1 if making is None else making.number
        self.set_policy(before.policy)

        def over() -> bool:
            made = any(one.number >= number for one in self.state.ready)
            return made or self.state.failures > before.failures

        await self.changes.wait_until(over, timeout_s=REFRESH_S, what="a new standby")
        if not any(one.number >= number for one in self.state.ready):
            raise Unavailable(self.state.trouble)

    async def cancel(self) -> None:
        """Calls a take-over off. Raises StateConflict when none waits any more."""
        ticket, reply = self._replies.open()
        self.post(CancelAsked(ticket))
        await reply

    def rehearsed(self) -> None:
        """A rehearsal has come to its end now."""
        self.post(Rehearsed(time.time()))

    async def disable(self) -> None:
        """Returns when no standby is left. Raises StateConflict while one takes over."""
        ticket, reply = self._replies.open()
        self.post(DisableAsked(ticket))
        await reply

    def set_policy(self, policy: Policy) -> None:
        """From now on standbys are kept so."""
        self.post(PolicyAsked(policy))

    async def detach(self) -> None:
        """Lets a take-over come to its end; the rest is left for the next agent."""
        with contextlib.suppress(Unavailable):
            await self.changes.wait_until(
                lambda: self.state.take_over is None, timeout_s=CLOSE_S, what="the take-over"
            )
        await super().detach()
        self._replies.close(
            OutcomeUnknown(f"nobody looks after the standbys of {self.vm} any more")
        )

    # The shell's

    def decide(self, state: Standby, event: Event, now: float) -> Decision:
        """See `decide.decide`."""
        if not isinstance(event, Unrecorded):
            self._undone = event
        return decide.decide(state, event, now)

    def record(self, before: Standby, after: Standby) -> bool:
        """A step that begins something has to be on record."""
        if before == after:
            return True
        try:
            self._ports.record.write(after)
        except OSError as error:
            log.error("standby vm=%s record not written: %s", self.vm, error)  # noqa: TRY400
            return not decide.must_be_on_record(before, after)
        return True

    def unrecorded(self) -> Event:
        """In place of an event that would have begun something."""
        assert self._undone is not None
        return Unrecorded(self._undone)

    def wake_at(self, state: Standby) -> float | None:
        """See `decide.wake_at`."""
        return decide.wake_at(state)

    def tick(self) -> Event:
        """Time passed."""
        return Tick()

    def carry_out(self, effect: Effect) -> None:
        """Answers at once; everything else is work."""
        match effect:
            case Accept(ticket):
                self._replies.answer(ticket)
            case Refuse(ticket, failure):
                self._replies.answer(ticket, failure.error())
            case _:
                self.begin(effect)

    async def work(self, effect: Effect) -> None:
        """Performs an effect, and posts what came of it."""
        if isinstance(effect, Accept | Refuse):
            return
        try:
            event = await self._perform(effect)
        except SempervirtError as error:
            event = Failed(effect, Failure.of(error))
        except OSError as error:  # a full disk, say
            event = Failed(effect, Failure.named(Unavailable, str(error)))
        self.post(event)

    def after_step(self, before: Standby) -> None:
        """Notes what has changed, and watches what waits."""
        state = self.state
        self._watch_ready()
        if state.trouble and state.trouble != before.trouble:
            self._note(state.trouble, logging.WARNING)
        for one in state.generations:
            was = before.generation(one.number)
            if was is None or was.life is not one.life:
                self._note(f"standby {one.number} is {one.life.value}", logging.INFO)
        over, earlier = state.take_over, before.take_over
        if over is not None and earlier is None:
            self._note(f"standby {over.number} takes over: {over.cause}", logging.WARNING)
        if over is None and earlier is not None:
            # A fence that goes on would keep locks that nobody lets go of, and prove the end of a
            # VM that may have been started again.
            self.cancel_work(Fence)
            self._ports.first.let_go()
        if state.past is not None and state.past != before.past:
            past = state.past
            steps = ", ".join(f"{name} {ms:g} ms" for name, ms in past.steps)
            how = past.trouble if past.step is Step.FAILED else "done"
            self._note(f"take-over by standby {past.number}: {how} ({steps})", logging.WARNING)

    def _note(self, text: str, level: int) -> None:
        self.journal.note(time.time(), "standby", text)
        log.log(level, "standby vm=%s %s", self.vm, text)

    async def _watch_first(self) -> None:
        first = self._ports.first
        while True:
            seen = first.seen()
            self.post(FirstSeen(*seen, time=time.time()))
            await first.changed(seen)

    def _watch_ready(self) -> None:
        """One that returns has another QEMU then, and the end of the former one says nothing."""
        ready = [one.number for one in self.state.ready]
        for number in self._watched.keys() - set(ready):
            self._watched.pop(number).cancel()
        for number in ready:
            if number not in self._watched:
                self._watched[number] = self.keep(self._watch(number), f"watch {number}")

    async def _watch(self, number: int) -> None:
        why = await self._ports.generations.gone(number)
        self.post(Lost(number, why))

    async def _perform(self, effect: Making | StandAgain | Remove | GiveUp | TakingOver) -> Event:
        generations = self._ports.generations
        match effect:
            case Take(number):
                taken = await self._ports.first.take()
                return Taken(number, taken.time, taken.numbers, taken.consistency)
            case Copy(number, snapshots, ours):
                return Copied(number, await generations.copy(number, snapshots, ours))
            case Boot(number):
                return Booted(number, round(await generations.boot(number), 1))
            case Settle(number):
                return Settled(number, await generations.settle(number))
            case Freeze(number, tier):
                kept = await generations.freeze(number, tier)
                return Frozen(number, kept.machine, kept.memory_bytes)
            case Stand(number, machine, tier):
                await generations.stand(number, machine, tier)
                return Stood(number, time.time())
            case StandAgain(number, machine, tier):
                await self._give_up(number, Load)
                await generations.stand_again(number, machine, tier)
                return Stood(number, time.time())
            case Remove(number):
                kinds = (Take, Copy, Boot, Settle, Freeze, Stand, StandAgain, Load)
                await self._give_up(number, *kinds)
                await generations.remove(number)
                return Removed(number)
            case GiveUp(snapshots, ours):
                return GivenUp(snapshots, await generations.give_up(snapshots, ours))
            case _:
                return await self._take_over(effect)

    async def _give_up(self, number: int, *kinds: type) -> None:
        """Ends the work of those kinds at a generation that is to be removed, or to wait once more:
        whoever does that has to find all that was started. A snapshot comes to its end by itself,
        and a file system is not left frozen.
        """
        mine = {
            task: effect
            for task, effect in self._begun.items()
            if isinstance(effect, kinds) and getattr(effect, "number", None) == number
        }
        for task, effect in mine.items():
            if not isinstance(effect, Take):
                task.cancel()
        if mine:
            await asyncio.wait(mine)

    async def _take_over(self, effect: TakingOver) -> Event:
        generations = self._ports.generations
        match effect:
            case Load(number, machine, tier):
                await generations.load(number, machine, tier)
                return Loaded(number)
            case Fence(kill, word):
                await self._ports.first.fence(kill=kill, word=word)
                return Fenced()
            case Claim(number):
                if (over := self.state.take_over) is not None:
                    await self._ports.first.prove_anew(kill=over.forced, word=over.word)
                await generations.claim(number)
                return Claimed(number)
            case Run(number):
                return Runs(number, await generations.run(number))
            case Probe(number):
                notes = await generations.probe(number)
                return Probed(number, time.time(), notes)
            case _:
                assert_never(effect)
