"""What the API says of the host guard, as types; the command line prints the same."""

from __future__ import annotations

from pydantic import BaseModel, Field

from sempervirt.guard.driver import Guard
from sempervirt.guard.installation import crash_kernel_loaded
from sempervirt.guard.presets import Afterwards, Meaning, ModulePolicy
from sempervirt.guard.signs import SignId
from sempervirt.guard.sources.module import parameters
from sempervirt.guard.state import Action, Decision, Phase
from sempervirt.guard.watch import Standing


class DecisionView(BaseModel):
    """What was decided, and on which evidence. `time` is in seconds since the epoch."""

    time: float
    action: Action
    sign: SignId | None
    meaning: Meaning | None
    evidence: list[str]
    simulated: bool
    repeated: int = Field(description="how many like it came since the one before, not told each")


class SourceView(BaseModel):
    """One source of signs."""

    name: str
    standing: Standing
    why: str
    seen: int
    dropped: int = Field(description="signs that came faster than they could be taken")


class RuleView(BaseModel):
    """What a sign means."""

    sign: SignId
    meaning: Meaning
    at_least: int
    within_s: float
    load_module: bool
    seen: int = Field(description="how often, since the agent began")


class GuardView(BaseModel):
    """The guard of a host."""

    phase: Phase
    cause: list[str] = Field(description="the evidence of the evacuation under way, or of the last")
    attempts: int
    module: bool = Field(description="whether the module is loaded")
    module_parameters: dict[str, str]
    module_failure: str = Field(
        description="why the agent could not load it; empty: it could, or did not try"
    )
    crash_kernel: bool = Field(description="whether a panic takes a dump (kdump)")
    module_policy: ModulePolicy = Field(description="with which the agent would load it")
    afterwards: Afterwards
    shutdown_waits: bool
    shutdown_hold_s: float
    shutdown_limit_s: float | None = Field(
        description="so long logind lets a shutdown wait; null: there is no logind"
    )
    presets: list[str]
    presets_trouble: str
    sources: list[SourceView]
    rules: list[RuleView]
    decisions: int


class SimulateRequest(BaseModel):
    """Asks what would be done about a sign; with `act` it is done."""

    sign: SignId
    act: bool = False


class SimulatedView(BaseModel):
    """What would be decided, or was asked for."""

    sign: SignId
    acted: bool
    decisions: list[DecisionView]


def decision_view(guard: Guard, decision: Decision) -> DecisionView:
    """A decision, with the time of day."""
    return DecisionView(
        time=guard.moment(decision.time),
        action=decision.action,
        sign=decision.sign,
        meaning=decision.meaning,
        evidence=list(decision.evidence),
        simulated=decision.simulated,
        repeated=decision.repeated,
    )


def guard_view(guard: Guard) -> GuardView:
    """All that is known. Reads the module's parameters."""
    state, presets = guard.state, guard.presets
    return GuardView(
        phase=state.phase,
        cause=list(state.cause),
        attempts=state.attempts,
        module=state.module,
        module_parameters=parameters(),
        module_failure=state.load_failure,
        crash_kernel=crash_kernel_loaded(),
        module_policy=presets.module_policy,
        afterwards=presets.afterwards,
        shutdown_waits=state.release_at is not None,
        shutdown_hold_s=presets.hold_s,
        shutdown_limit_s=guard.shutdown_limit_s,
        presets=list(presets.files),
        presets_trouble=guard.trouble,
        sources=[
            SourceView(
                name=one.name,
                standing=one.standing,
                why=one.why,
                seen=one.seen,
                dropped=one.dropped,
            )
            for one in guard.health
        ],
        rules=[
            RuleView(
                sign=sign,
                meaning=rule.meaning,
                at_least=rule.at_least,
                within_s=rule.within_s,
                load_module=rule.load_module,
                seen=state.tallies[sign].total if sign in state.tallies else 0,
            )
            for sign, rule in presets.rules.items()
        ],
        decisions=len(state.decisions),
    )
