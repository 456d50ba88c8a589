"""Never two write one disk: a few runs of `split_brain`, with both of its controls."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.revoking_server import RevokingServer, revoking_server
from tests.standby.split_brain import OLD, PLANS, Event, Plan, Way, lying, run

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount"),
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RevokingServer]:
    """A server that refuses late writes."""
    with revoking_server(tmp_path, ("a", "b")) as made:
        yield made


async def test_one_writer_whatever_happens_to_the_first(server: RevokingServer) -> None:
    for plan in PLANS:
        outcome = await run(server, plan)
        assert outcome.one_writer, f"{plan}: {outcome}"
        assert outcome.taken_over == (Event.CUT in plan.events), f"{plan}: {outcome}"
        if outcome.taken_over:
            assert outcome.old_end == "failed EIO", f"{plan}: {outcome}"


async def test_a_proof_that_lies_is_found(server: RevokingServer) -> None:
    outcome = await run(server, Plan((), Way.NETWORK_FIRST), prove=lying)
    assert OLD in outcome.epochs, outcome
    assert not outcome.one_writer


async def test_a_server_that_refuses_nothing_is_found(tmp_path: Path) -> None:
    with revoking_server(tmp_path, ("a", "b"), refuses=False) as server:
        outcome = await run(server, Plan((Event.CUT,), Way.NETWORK_FIRST))
    assert outcome.taken_over
    assert OLD in outcome.epochs, outcome
    assert not outcome.one_writer
