"""Counters of a disk over the lives of its backends, and names that documents and rules use."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import socket
import subprocess
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sempervirt.agent.agent import Agent
from sempervirt.api.metrics import build_open_app
from sempervirt.api.openmetrics import render
from sempervirt.core.tallies import OCTAVES, Octaves
from sempervirt.daemon.main import _address, _ended, _serve_metrics
from sempervirt.disk.accounts import Accounts
from sempervirt.disk.answers import Status
from sempervirt.guard.state import Action
from sempervirt.vm.config import AgentConfig

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "packaging" / "prometheus"
GOLDEN = ROOT / "crates" / "control" / "golden" / "blkd-status-active.json"
PROMTOOL = shutil.which("promtool") or str(ROOT / ".cache" / "promtool" / "promtool")


def status(requests: int) -> Status:
    """Of a backend that has done so many."""
    told = json.loads(GOLDEN.read_text())["ok"]
    for queue in told["queues"]:
        queue |= {"reads": requests, "writes": 0, "bytes_read": requests * 4096}
        queue["latency"] = {"octaves": [0] * 14 + [requests], "sum_ns": requests * 20_000}
    return Status.model_validate_json(json.dumps(told))


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=5), min_size=1, max_size=5))
def test_counters_never_go_back_over_a_backends_death(lives: list[list[int]]) -> None:
    accounts, told = Accounts(), []
    for generation, counts in enumerate(lives, 1):
        for count in sorted(counts):
            accounts.seen(generation, status(count))
            told.append(accounts.total)
        accounts.seen(generation - 1, status(1))  # a late word of the one before
        told.append(accounts.total)
    assert told[-1].reads == 2 * sum(max(counts) for counts in lives)  # two queues
    assert told[-1].latency.total == told[-1].reads
    for before, after in pairwise(told):
        assert before.reads <= after.reads
        assert before.bytes_read <= after.bytes_read
        assert before.latency.sum_ns <= after.latency.sum_ns


def test_a_stall_is_counted_once() -> None:
    accounts = Accounts()
    for _ in range(3):
        accounts.stalled(2, 0.005)
    accounts.stalled(3, 0.5)
    assert (accounts.stalls.total, accounts.stalls.below(23)) == (2, 1)  # 2^23 ns are 8 ms


@given(st.lists(st.floats(0, 1000)), st.lists(st.floats(0, 1000)))
def test_histograms_add_up(left: list[float], right: list[float]) -> None:
    both, one, two = Octaves(), Octaves(), Octaves()
    for part, values in ((one, left), (two, right)):
        for value in values:
            part.record(value)
            both.record(value)
    assert (one + two).counts == both.counts
    assert (one + two).sum_ns == both.sum_ns
    assert both.below(OCTAVES) == both.total == len(left) + len(right)


async def test_names_are_documented_and_rules_and_dashboard_know_them(tmp_path: Path) -> None:
    agent = Agent(AgentConfig(tmp_path / "s", tmp_path / "r"))
    text = (await render(agent)).decode()
    assert text.endswith("# EOF\n")
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    endings = {"counter": "_total", "info": "_info"}
    there = {name + endings.get(kind, "") for name, kind in kinds.items()}
    # An event that is the first of its kind is a change from nought, which a rule can see.
    for action in Action:
        assert f'semper_guard_decisions_total{{action="{action.value}"}} ' in text
    document = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    told = set(re.findall(r"^\| `(semper_\w+)`", document, re.MULTILINE))
    only_sometimes = {
        "semper_guest_memory_left_bytes",
        "semper_certificate_end_time_seconds",
        "semper_certificate_failing",
    }
    assert told == there | only_sometimes
    for file in ("alerts.yml", "dashboard.json"):
        used = set(re.findall(r"semper_\w+", (PROMETHEUS / file).read_text()))
        assert {name.removesuffix("_bucket") for name in used} <= told


async def test_an_address_that_is_taken_ends_no_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sempervirt.daemon.main.METRICS_AGAIN_S", 0.02)
    agent = Agent(AgentConfig(tmp_path / "s", tmp_path / "r"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        serving = asyncio.create_task(_serve_metrics(agent, address))
        async with asyncio.timeout(90):
            while True:
                if "metrics are not served" in caplog.text:
                    break
                await asyncio.sleep(0.01)  # poll interval
    async with asyncio.timeout(90), httpx.AsyncClient(trust_env=False) as client:
        answer = None
        while answer is None:
            try:
                answer = await client.get(f"http://{address}/metrics")
            except httpx.HTTPError:
                await asyncio.sleep(0.01)  # poll interval
        assert answer.text.endswith("# EOF\n")
        assert (await client.get(f"http://{address}/v1/vms")).status_code == 404
    await _ended(serving)


async def test_who_asks_without_a_name_again_and_again_costs_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def render(agent: Agent) -> bytes:
        asked.append(agent)
        return b"# EOF\n"

    monkeypatch.setattr("sempervirt.api.openmetrics.render", render)
    monkeypatch.setattr("sempervirt.api.metrics.KEPT_S", 1000.0)
    agent = Agent(AgentConfig(tmp_path / "s", tmp_path / "r"))
    transport = httpx.ASGITransport(app=build_open_app(agent))
    async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
        answers = await asyncio.gather(*(client.get("/metrics") for _ in range(20)))
    assert {one.text for one in answers} == {"# EOF\n"}
    assert asked == [agent]


def test_an_address_that_cannot_be_is_refused_at_once() -> None:
    assert _address("127.0.0.1:9737") == "127.0.0.1:9737"
    for wrong in ("9737", "127.0.0.1:", "127.0.0.1:65536", ":9737"):
        with pytest.raises(argparse.ArgumentTypeError, match="no address"):
            _address(wrong)


def test_each_alert_has_a_remedy_and_a_test() -> None:
    rules = (PROMETHEUS / "alerts.yml").read_text()
    names = re.findall(r"- alert: (\w+)", rules)
    assert rules.count("remedy:") == len(names) > 10
    tested = re.findall(r'alertname="(\w+)"', (PROMETHEUS / "alerts.test.yml").read_text())
    assert {*names} == {*tested}


def test_each_alert_fires_on_its_fault_alone() -> None:
    if not Path(PROMTOOL).exists():
        pytest.fail("there is no promtool; fetch it: scripts/prometheus")
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts.test.yml"]):
        argv = [PROMTOOL, *command]
        ended = subprocess.run(argv, cwd=PROMETHEUS, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
