"""The owner of the guard: hears of signs, decides by `decide`, carries out what was decided."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import assert_never

from sempervirt.core import tallies
from sempervirt.core.errors import SempervirtError, StateConflict
from sempervirt.guard import decide
from sempervirt.guard.ports import Evacuator, Heard, Module, Shutdown
from sempervirt.guard.presets import Presets
from sempervirt.guard.signs import Sign, SignId
from sempervirt.guard.sources.source import Source
from sempervirt.guard.state import (
    Action,
    BeginEvacuation,
    Decided,
    Decision,
    Effect,
    Event,
    GuardState,
    KeepHeard,
    LoadingEnded,
    LoadModule,
    ModuleIsThere,
    Phase,
    ReleaseShutdown,
    Seen,
    Tally,
    TellModule,
    Tick,
)
from sempervirt.guard.watch import Health, Standing, Watch
from sempervirt.host.owner import HOST_CLOCK, Clock, Owner

log = logging.getLogger(__name__)

# Of these an operator hears at once.
LOUD = frozenset({Action.EVACUATES, Action.LETS_DIE, Action.LEFT_BEHIND, Action.LETS_SHUT_DOWN})
# The first decision has to be a change for whoever counts them.
tallies.GUARD_DECISIONS.know(*(action.value for action in Action))


class Guard(Owner[GuardState, Event, Effect]):
    """The guard of this host."""

    def __init__(
        self,
        presets: Presets,
        evacuator: Evacuator,
        module: Module,
        shutdown: Shutdown,
        clock: Clock = HOST_CLOCK,
        heard: Heard | None = None,
    ) -> None:
        before = 0 if heard is None else heard.ns
        begun = GuardState(heard_ns=before, settled_ns=before)
        super().__init__("the host guard", begun, clock)
        self._heard_record = heard
        self.presets = presets
        self.trouble = ""  # with an operator's presets
        self._evacuator = evacuator
        self._module = module
        self._shutdown = shutdown
        self._began = time.time() - clock.now()
        self._watches: list[Watch] = []

    def watch(self, sources: Sequence[Source], module: Source) -> None:
        """Begins to look at the sources; `module` is the one among them that is the module's
        device.

        Called once, in the event loop.
        """
        self._watches = [Watch(source, self._heard) for source in sources]
        self._device = module
        for one in self._watches:
            one.start()

    def moment(self, when: float) -> float:
        """A time of the owner's clock in seconds since the epoch."""
        return self._began + when

    @property
    def shutdown_limit_s(self) -> float | None:
        """So long logind lets a shutdown wait for us; None: there is no logind."""
        return self._shutdown.limit_s

    @property
    def health(self) -> list[Health]:
        """How each source does."""
        return [one.health for one in self._watches]

    def simulate(self, identifier: SignId) -> list[Decision]:
        """What would be decided upon a sign, as all stands now; nothing is done."""
        now, sign = self._clock.now(), simulated(identifier)
        # As often as the rule asks for, so that it takes effect.
        sign = replace(sign, count=self.presets.rules[identifier].at_least)
        # Untold: what a real sign has told lately would keep this one from being told.
        tallies = {**self.state.tallies, identifier: Tally()}
        bare = replace(self.state, tallies=tallies, decisions=())
        after, _ = decide.decide(self.presets, bare, Seen(sign), now)
        return list(after.decisions)

    def act(self, identifier: SignId) -> None:
        """Does what is decided upon a simulated sign; the module is told nothing.

        Raises StateConflict when the host is being emptied already.
        """
        if self.state.phase in (Phase.EVACUATING, Phase.WAITING, Phase.LET_DIE):
            raise StateConflict(
                f"the guard is {self.state.phase.value} already", remedy="see: semper guard status"
            )
        sign = replace(simulated(identifier), count=self.presets.rules[identifier].at_least)
        self.post(Seen(sign))

    async def detach(self) -> None:
        """Ends the guard; an orderly shutdown that waits goes on."""
        for one in self._watches:
            one.end()
        self._shutdown.release()
        await super().detach()

    def _heard(self, watch: Watch, signs: Sequence[Sign]) -> None:
        if watch.source is self._device:
            there = watch.health.standing is Standing.LOOKING
            if there != self.state.module:
                self.post(ModuleIsThere(there))
        for sign in signs:
            self.post(Seen(sign))

    # The shell's

    def decide(self, state: GuardState, event: Event, now: float) -> Decided:
        """See `decide.decide`."""
        return decide.decide(self.presets, state, event, now)

    def wake_at(self, state: GuardState) -> float | None:
        """See `decide.wake_at`."""
        return decide.wake_at(state)

    def tick(self) -> Event:
        """Time has passed."""
        return Tick()

    def carry_out(self, effect: Effect) -> None:
        """All but the release of a shutdown takes time."""
        match effect:
            case ReleaseShutdown():
                self._shutdown.release()
            case BeginEvacuation() | TellModule() | LoadModule() | KeepHeard():
                self.begin(effect)
            case _:
                assert_never(effect)

    async def work(self, effect: Effect) -> None:
        """Posts what came of it."""
        match effect:
            case BeginEvacuation():
                self.post(await self._evacuator.evacuate(effect))
            case TellModule(command):
                try:
                    await self._module.tell(command)
                except OSError as error:
                    log.warning("guard: the module was not told %s: %s", command.value, error)
            case LoadModule():
                self.post(await self._load())
            case KeepHeard(ns):
                if self._heard_record is not None:
                    await asyncio.to_thread(self._heard_record.keep, ns)
            case ReleaseShutdown():
                self._shutdown.release()
            case _:
                assert_never(effect)

    async def _load(self) -> LoadingEnded:
        try:
            await self._module.load(self.presets.module_policy)
        except SempervirtError as error:
            return LoadingEnded(str(error) or type(error).__name__)
        return LoadingEnded()

    def after_step(self, before: GuardState) -> None:
        """Logs each new decision with its evidence."""
        for decision in fresh(before, self.state):
            level = logging.WARNING if decision.action in LOUD else logging.INFO
            log.log(level, "guard %s", sentence(decision))
            tallies.GUARD_DECISIONS.add(decision.action.value)


def fresh(before: GuardState, after: GuardState) -> list[Decision]:
    """The decisions that a step has added: those after the last one that was there."""
    if not before.decisions:
        return list(after.decisions)
    last, added = before.decisions[-1], []
    for decision in reversed(after.decisions):
        if decision is last:
            break
        added.append(decision)
    return added[::-1]


def sentence(decision: Decision) -> str:
    """A decision in one line."""
    what = decision.action.value
    if decision.sign is not None and decision.meaning is not None:
        what += f" sign={decision.sign.value} meaning={decision.meaning.value}"
    if decision.repeated:
        what += f" repeated={decision.repeated}"
    if decision.simulated:
        what += " simulated"
    return f"{what}: {'; '.join(decision.evidence)}"


def simulated(identifier: SignId) -> Sign:
    """A sign that nothing was seen of."""
    return Sign(identifier, f"{identifier.value}, simulated by an operator", simulated=True)
