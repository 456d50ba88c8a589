"""Carries out docs/scenarios: each step of a scenario is a function here, named by its words."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from pytest_bdd import given, parsers, scenarios, then, when

from lab.network import UNLIMITED
from lab.world import World
from tests.scenarios.stage import Stage

pytestmark = [pytest.mark.root, pytest.mark.guest]
scenarios(str(Path(__file__).parents[2] / "docs/scenarios"))

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Carries out a coroutine: the library's steps are plain functions."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def world(run: Run) -> Iterator[World]:
    """Two hosts for all scenarios; each scenario leaves them as it found them."""
    stack = AsyncExitStack()
    try:
        yield run(stack.enter_async_context(World.opened(UNLIMITED)))
    finally:
        run(stack.aclose())


@pytest.fixture
def stage(run: Run, world: World) -> Iterator[Stage]:
    """One scenario's VMs."""
    stack = AsyncExitStack()
    try:
        yield run(stack.enter_async_context(Stage.set(world)))
    finally:
        run(stack.aclose())


# What is there


@given("hosts a and b, which share their storage")
def hosts(stage: Stage) -> None:
    assert all(host.agent_runs for host in stage.world.hosts)


@given(
    parsers.parse("VM web on host {host}, which writes to its disk and reads back what it wrote")
)
def web(stage: Stage, run: Run, host: str) -> None:
    run(stage.boot(stage.host(host)))


@given(parsers.re(r"VM (?P<name>\w+) on host (?P<host>\w)$"))
def firmware(stage: Stage, run: Run, name: str, host: str) -> None:
    run(stage.start_firmware(stage.host(host), name))


@given("a TCP client outside, which never connects anew")
def client(stage: Stage, run: Run) -> None:
    run(stage.connect())


# What happens


@when(parsers.parse("the backend of web is killed {count:d} times"))
def kill_backend(stage: Stage, run: Run, count: int) -> None:
    run(stage.kill_backend(count))


@when("the backend of web and its spare are killed at once")
def kill_both(stage: Stage, run: Run) -> None:
    run(stage.kill_backend_and_spare())


@when(parsers.parse("the agent of host {host} is killed"))
def kill_agent(stage: Stage, run: Run, host: str) -> None:
    run(stage.kill_agent(stage.host(host)))


@when("the backend of web is killed, and nobody is there to start another one")
def kill_backend_alone(stage: Stage, run: Run) -> None:
    run(stage.kill_backend_alone())


@when(parsers.parse("the agent of host {host} is started again"))
def start_agent(stage: Stage, run: Run, host: str) -> None:
    run(stage.host(host).start_agent())


@when("web is paused, its image is overwritten behind its back, and web runs on")
def damage(stage: Stage, run: Run) -> None:
    run(stage.damage(stage.world.a))


@when("the operator moves web to a new QEMU process")
def restart_qemu(stage: Stage, run: Run) -> None:
    run(stage.restart_qemu(stage.world.a))


@when(parsers.parse("the operator empties host {name}"))
def empty(stage: Stage, run: Run, name: str) -> None:
    run(stage.empty(stage.host(name)))


@then(parsers.parse("host {name} is out of service"))
def out_of_service(stage: Stage, run: Run, name: str) -> None:
    assert "out of service" in run(stage.host(name).semper("host", "show"))


@when("etcd is killed")
def kill_store(stage: Stage, run: Run) -> None:
    run(stage.kill_store())


@when("etcd is started again")
def start_store(stage: Stage, run: Run) -> None:
    run(stage.start_store())


# What is seen


@then(parsers.parse("each time another process served the disk within {limit_s:g} seconds"))
def taken_over(stage: Stage, limit_s: float) -> None:
    assert stage.takeovers_s
    assert max(stage.takeovers_s) < limit_s, stage.takeovers_s
    # What the guest asked for is answered: that goes through an emulator on a busy machine.
    assert max(stage.goes_on_s) < 6 * limit_s, stage.goes_on_s


@then("the disk of web is guarded by a spare")
def guarded(stage: Stage, run: Run) -> None:
    run(stage.wait_guarded())


@then("the guest still writes")
def goes_on(stage: Stage, run: Run) -> None:
    run(stage.wait_goes_on())


@then("every block holds what the guest wrote, no request failed, and none hangs")
def unharmed(stage: Stage, run: Run) -> None:
    assert run(stage.problems()) == []


@then("the guest finds blocks that do not hold what it wrote")
def harmed(stage: Stage, run: Run) -> None:
    assert run(stage.problems()) != []


@then(parsers.re(r"(?P<name>\w+) runs on host (?P<host>\w)$"))
def runs_on(stage: Stage, run: Run, name: str, host: str) -> None:
    run(stage.wait_runs(name, stage.host(host)))


@then(parsers.parse("web runs on host {host} in another QEMU process"))
def other_qemu(stage: Stage, run: Run, host: str) -> None:
    run(stage.wait_runs("web", stage.host(host)))
    assert run(stage.other_qemu(stage.host(host)))


@then(parsers.parse("host {host} has no process of a VM left"))
def no_process(stage: Stage, run: Run, host: str) -> None:
    run(stage.wait_no_process(stage.host(host)))


@then(parsers.parse("the guest stood still for less than {limit_ms:d} milliseconds"))
def still(stage: Stage, run: Run, limit_ms: int) -> None:
    assert run(stage.still_ms()) < limit_ms


@then("the guest has not booted again")
def same_boot(stage: Stage, run: Run) -> None:
    assert not run(stage.booted_again())


@then("the client outside still has its connection")
def connected(stage: Stage, run: Run) -> None:
    run(stage.client.wait_heard())


@then(
    parsers.parse(
        "the operator is told that etcd does not answer and nothing was changed, when asking to "
        "{what}"
    )
)
def refused(stage: Stage, run: Run, what: str) -> None:
    assert "etcd does not answer" in run(stage.refused(what))
