"""What a VM file says of take-overs, what its service answers, and what was kept long enough."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from pydantic import ValidationError

from sempervirt.qemu.spec import StandbySpec
from sempervirt.standby import decide
from sempervirt.standby.lost import KEPT_S, WRONG_CLOCK_S
from sempervirt.standby.rules import Rules, rules_of
from sempervirt.standby.service import ask_tcp
from sempervirt.standby.state import First, FirstSeen, Generation, Life, Remove, Standby
from sempervirt.standby.values import Policy

AGENT = {"initialised": "agent"}


def test_a_vm_file_that_says_nothing_has_the_usual_rules() -> None:
    assert rules_of(None) == Rules()
    assert rules_of(StandbySpec.model_validate(AGENT)) == Rules()


def test_a_vm_file_says_how_long_to_wait_or_never() -> None:
    told = {"guest_panicked": "never", "monitor_silent": 90, "service_silent": 30.5}
    spec = StandbySpec.model_validate({**AGENT, "service": "10.0.0.5:80", "take_over": told})
    assert rules_of(spec) == Rules(
        guest_panicked_s=None, monitor_silent_s=90.0, service_silent_s=30.5
    )


@pytest.mark.parametrize(
    "keys",
    [
        {"take_over": {"service_silent": 30}},  # nobody can be asked
        {"take_over": {"monitor_silent": -1}},
        {"take_over": {"monitor_silent": 86401}},
        {"take_over": {"monitor_silent": "soon"}},
        {"service": "no port"},
        {"service": "http://10.0.0.5:80/"},
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        StandbySpec.model_validate({**AGENT, **keys})


async def test_a_service_answers_or_tells_why_not() -> None:
    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert await ask_tcp(f"127.0.0.1:{port}") == ""
    server.close()
    await server.wait_closed()
    assert f"127.0.0.1:{port}" in await ask_tcp(f"127.0.0.1:{port}")
    assert await ask_tcp("127.0.0.1:99999")


@pytest.mark.parametrize(
    ("age_s", "removed"),
    [(KEPT_S - 1, False), (KEPT_S + 1, True), (-3600.0, False), (WRONG_CLOCK_S + 1, False)],
)
def test_what_was_lost_is_kept_for_a_week(age_s: float, removed: bool) -> None:
    ended = 1_790_000_000.0
    lost = Generation(1, Life.LOST, ended=ended)
    state = replace(
        Standby("web", Policy()), generations=(lost, Generation(2, Life.SERVING)), last=2, due=1e9
    )
    after, effects = decide.decide(state, FirstSeen(First.RUNNING, time=ended + age_s), 0.0)
    assert (Remove(1) in effects) == removed
    assert after.generations[0].life is (Life.RETIRING if removed else Life.LOST)
    assert after.generations[1].life is Life.SERVING
