"""Watches a VM of this host, and judges what is seen of it (`evidence`, `rules`).

What the VM's owner knows is turned into observations: when something changes, and once a second
(`LOOK_S`), which is also how the agent learns whether it is late itself.

    the VM's QEMU ended, by pidfd       Died, or Finished where somebody wanted that
    halted by a panic or a watchdog     Died, of the guest
    running, paused, halted             Heard(MONITOR)
    unknown                             Silent(MONITOR): the monitor did not answer by its deadline
    a disk ails; paused; work goes on   Troubled, until it does not any more
    another QEMU, or a guest reset      Began

A service that has not answered since the VM began, or began anew, is not silent: the guest still
boots, or the VM file names a wrong address. So a VM is not taken over again and again for a service
that no standby has either.

An end of which nobody knows how it came about, while no agent ran, proves nothing: the guest may
have powered itself off. One with its host does, to other hosts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sempervirt.host import background
from sempervirt.qemu.state import FOR_STANDBY, End, Runstate
from sempervirt.standby.evidence import (
    LATE_S,
    LOOK_S,
    NOTHING_SEEN,
    Began,
    Death,
    Died,
    Evidence,
    Finished,
    Heard,
    Looked,
    Mended,
    Observation,
    Sign,
    Silent,
    Trouble,
    Troubled,
    note,
)
from sempervirt.standby.rules import GoAhead, Judgement, Provable, Rules, decide, to_json
from sempervirt.store.port import boot_clock_s
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import in_words

log = logging.getLogger(__name__)

_ANSWERS = (Runstate.RUNNING, Runstate.PAUSED, Runstate.HALTED, Runstate.STOPPING)
# Of QEMU's word for why the guest stands still (`qemu.decide`).
_GUEST_DEATHS = {
    "the guest panicked": Death.GUEST_PANICKED,
    "guest-panicked": Death.GUEST_PANICKED,
    "watchdog": Death.GUEST_WATCHDOG,
}
# A question of the service is repeated so often, and has so long for its answer.
ASK_S = 5.0
ANSWER_S = 3.0

AskService = Callable[[], Awaitable[str | None]]


async def answer_of(ask: AskService) -> str | None:
    """Why a service did not answer in time; "" if it did, None where there is none."""
    try:
        async with asyncio.timeout(ANSWER_S):
            return await ask()
    except TimeoutError:
        return f"no answer in {ANSWER_S:g} s"


@dataclass(frozen=True)
class _Life:
    """Which life of a VM something was seen of: another one begins the evidence anew."""

    vm: Vm  # and not its id, which the next VM may have when this one is forgotten
    qemu: int
    resets: int

    def goes_on_from(self, before: _Life) -> bool:
        """Whether it is the same life."""
        same = (self.qemu, self.resets) == (before.qemu, before.resets)
        return self.vm is before.vm and same


class Watch:
    """Of the VM that `current` gives, by its `rules` of now. `ask` asks its service: why it did not
    answer, "" if it did, None where the VM file names none. Its monitor has `monitor_s` for an
    answer.
    """

    def __init__(
        self,
        name: str,
        current: Callable[[], Vm | None],
        rules: Callable[[], Rules],
        provable: Provable,
        ask: AskService | None = None,
        clock: Callable[[], float] = boot_clock_s,
        monitor_s: float = 10.0,
    ) -> None:
        self.name = name
        self._rules = rules
        self.provable = provable
        self.evidence = NOTHING_SEEN
        self._current = current
        self._ask = ask
        self._clock = clock
        self._monitor_s = monitor_s
        self._life: _Life | None = None
        self._logged = ""
        self._unheard = ""

    async def run(self) -> None:
        """Looks once a second, until it is cancelled."""
        asking = None
        if self._ask is not None:
            asking = background.start(self._ask_again(), f"{self.name}: service", crash=True)
        due = self._clock()
        try:
            while True:
                now = self._clock()
                self.see(Looked(now, due))
                self.look()
                due = now + LOOK_S
                await asyncio.sleep(max(0.0, due - self._clock()))
        finally:
            if asking is not None:
                asking.cancel()

    def look(self) -> Judgement:
        """Takes in what is known of the VM now, and judges."""
        vm = self._current()
        if vm is not None:
            for seen in observed(vm, self.evidence, self._clock(), self._monitor_s):
                self.see(seen)
            self._lives_on(vm)
        return self.judge()

    def judge(self) -> Judgement:
        """By what is known; logged when it is another judgement than before."""
        judged = decide(self.name, self.evidence, self._rules(), self.provable, self._clock())
        kind = f"{judged.verdict.kind} {judged.permission.kind}"
        if kind != self._logged:
            level = logging.WARNING if isinstance(judged.permission, GoAhead) else logging.INFO
            log.log(level, "standby vm=%s judged=%s", self.name, to_json(judged))
            self._logged = kind
        return judged

    def see(self, seen: Observation) -> None:
        """Takes in what was seen."""
        self.evidence = note(self.evidence, seen)

    def _lives_on(self, vm: Vm) -> None:
        life, before = _Life(vm, vm.state.qemu, vm.state.resets), self._life
        if before is not None and not vm.run.is_end and not life.goes_on_from(before):
            self.see(Began(self._clock()))
        self._life = life

    async def _ask_again(self) -> None:
        assert self._ask is not None
        while True:
            asked = self._clock()
            why = await answer_of(self._ask)
            now = self._clock()
            sign = Sign.SERVICE
            if why == "":
                self.see(Heard(now, sign))
            elif why is not None and self.evidence.last_heard(sign) is None:
                self._tell_unheard(why)
            elif why is not None:
                self.see(Silent(now, sign, asked, why))
            await asyncio.sleep(ASK_S)

    def _tell_unheard(self, why: str) -> None:
        if self._unheard != why:
            log.warning(
                "standby vm=%s its service has not answered in this life of the VM, so its silence "
                "does not count: %s",
                self.name,
                why,
            )
        self._unheard = why


@dataclass(frozen=True)
class Seen:
    """What the owner of a VM knows of it: as much as a judgement takes, here or on another host.
    `ailing` and `work` are in words, "" for none.
    """

    run: Runstate
    why: str
    end: End | None = None
    ailing: str = ""
    work: str = ""


def seen_of(vm: Vm) -> Seen:
    """What this agent knows of its VM."""
    work = in_words(vm.work) if vm.work is not None else ""
    return Seen(vm.run, vm.state.why, vm.end, vm.ailments, work)


def dead_guest(vm: Vm) -> bool:
    """Whether QEMU has told of the guest's own death."""
    return vm.run is Runstate.HALTED and vm.state.why in _GUEST_DEATHS


def observed(vm: Vm, evidence: Evidence, now: float, monitor_s: float) -> list[Observation]:
    """As `observations`, of a VM of this host."""
    return observations(seen_of(vm), evidence, now, monitor_s)


def observations(
    vm: Seen, evidence: Evidence, now: float, monitor_s: float, *, there: bool = False
) -> list[Observation]:
    """What a VM's owner knows at `now`, as observations that add to the evidence. A monitor that is
    silent was asked `monitor_s` before that was noticed. `there`: it is of another host.
    """
    seen: list[Observation] = list(_troubles(vm, evidence, now))
    if vm.run.is_end and vm.end is not None and vm.end.with_host:
        # What this host's own boot means to the VM stands in the VM file (`autostart`).
        seen += [Died(now, Death.HOST_BOOTED, vm.end.reason)] if there else []
    elif there and vm.run is Runstate.STOPPED and vm.why == FOR_STANDBY:
        # At our word, of which the answer may have been lost: no reason to leave it at that.
        seen.append(Died(now, Death.QEMU_ENDED, vm.why))
    elif vm.run.is_end:
        seen += _end(vm, evidence, now)
    elif vm.run is Runstate.UNKNOWN:
        seen.append(Silent(now, Sign.MONITOR, now - monitor_s, vm.why))
    elif vm.run in _ANSWERS:
        seen.append(Heard(now, Sign.MONITOR))
        death = _GUEST_DEATHS.get(vm.why) if vm.run is Runstate.HALTED else None
        if death is not None:
            seen.append(Died(now, death, vm.why))
    return seen


def _end(vm: Seen, evidence: Evidence, now: float) -> list[Observation]:
    """A QEMU that this agent has not started is no child of it, and how it ended nobody tells. But
    its monitor tells of a shutdown before the end, and is read to its end (`qemu.driver`): one that
    answered until the end, and told of none, was ended by nobody who wanted that.
    """
    end = vm.end
    if vm.run is Runstate.STOPPED or end is None:
        return [Finished(now, vm.why)]
    if end.exit_code is None and end.signal is None:
        heard = evidence.last_heard(Sign.MONITOR)
        watched = heard is not None and 0 <= now - heard <= LOOK_S + LATE_S
        detail = "its monitor answered until its end, and told of no shutdown"
        return [Died(now, Death.QEMU_ENDED, detail)] if watched else []
    return [Died(now, Death.QEMU_ENDED, end.reason)]


def _troubles(vm: Seen, evidence: Evidence, now: float) -> list[Observation]:
    present = {
        Trouble.DISK: vm.ailing,
        Trouble.WORK: vm.work,
        Trouble.PAUSED: "it is paused" if vm.run is Runstate.PAUSED else "",
    }
    standing = {one.trouble for one in evidence.troubles}
    told: list[Observation] = []
    for trouble, why in present.items():
        if why and trouble not in standing:
            told.append(Troubled(now, trouble, why))
        elif not why and trouble in standing:
            told.append(Mended(now, trouble))
    return told
