"""What this host does, as OpenMetrics. Names and labels: docs/reference/metrics.md.

Nobody is asked for it: what a backend has counted is what the agent was told last, so a medium or a
backend that hangs delays no scrape, and a scrape costs no disk anything.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.openmetrics.exposition import generate_latest

import sempervirt
from sempervirt.agent.agent import Agent
from sempervirt.cluster.certificate import read_standing
from sempervirt.cluster.standing import Standing
from sempervirt.core import tallies
from sempervirt.core.tallies import Octaves, Tally
from sempervirt.disk.driver import Disk
from sempervirt.disk.image import ImageState
from sempervirt.disk.state import Condition
from sempervirt.qemu.state import Runstate

# Powers of two of nanoseconds at which a histogram is cut: requests from 16 µs to 17 s, and what a
# guest waits for from 0.5 ms to 137 s. So few that a disk has no more than 50 series in all.
REQUEST_EDGES = (14, 15, 16, 17, 18, 19, 20, 22, 24, 26, 28, 30, 32, 34)
STALL_EDGES = (19, 20, 21, 22, 23, 24, 26, 29, 33, 37)

# By the values of the labels, a tuple: () without labels.
Values = Mapping[Any, float]


async def render(agent: Agent) -> bytes:
    """The whole answer."""
    standing = await asyncio.to_thread(read_standing, agent.config)
    # What it takes for a registry has `collect`; the library has no types for that.
    write: Callable[[_Families], bytes] = generate_latest
    return write(_Families(agent, standing))


class _Families:
    """What `generate_latest` takes for a registry."""

    def __init__(self, agent: Agent, standing: Standing | None) -> None:
        self._agent = agent
        self._standing = standing

    def collect(self) -> Iterator[Metric]:
        """Every family once."""
        yield from _of_host(self._agent, self._standing)
        yield from _of_vms(self._agent)
        yield from _of_disks(self._agent)
        yield from _of_tallies()


def _gauge(name: str, help_text: str, values: Values, *labels: str) -> Metric:
    family = GaugeMetricFamily(f"semper_{name}", help_text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counter(name: str, help_text: str, values: Values, *labels: str) -> Metric:
    family = CounterMetricFamily(f"semper_{name}", help_text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _histogram(
    name: str,
    help_text: str,
    edges: Iterable[int],
    values: Mapping[Any, Octaves],
    *labels: str,
) -> Metric:
    family = HistogramMetricFamily(
        f"semper_{name}_seconds", help_text, labels=labels, unit="seconds"
    )
    for key, times in values.items():
        buckets = [(repr(2**edge / 1e9), times.below(edge)) for edge in edges]
        family.add_metric(key, [*buckets, ("+Inf", times.total)], times.sum_ns / 1e9)
    return family


def _one(value: float) -> Values:
    return {(): value}


def _of_host(agent: Agent, standing: Standing | None) -> Iterator[Metric]:
    yield InfoMetricFamily("semper_build", "The release.", {"version": sempervirt.__version__})
    yield _gauge("agent_start_time_seconds", "When the agent began.", _one(agent.started))
    out = agent.service.absence is not None
    yield _gauge("host_out_of_service", "1: no VM starts here or comes here.", _one(out))
    if agent.memory_left is not None:
        yield _gauge(
            "guest_memory_left_bytes", "What guests may still have.", _one(agent.memory_left)
        )
    if standing is not None and standing.ends is not None:
        text = "When the certificate of this host ends."
        yield _gauge("certificate_end_time_seconds", text, _one(standing.ends))
        failed = _one(bool(standing.failure))
        yield _gauge("certificate_failing", "1: the certificate is not renewed.", failed)


def _of_vms(agent: Agent) -> Iterator[Metric]:
    shown = {name: vm.shown[0] for name, vm in agent.vms.items()}
    shown |= {name: vm.run for name, vm in agent.unknown.items()}
    states = Counter(shown.values())
    by_state = {(state.value,): float(states[state]) for state in Runstate}
    yield _gauge("vms", "VMs of this host, those that have ended too.", by_state, "state")
    yield _gauge(
        "vm_state",
        "1: the VM is in that state.",
        {(name, state.value): 1 for name, state in shown.items()},
        "vm",
        "state",
    )
    resets = {(name,): float(vm.state.resets) for name, vm in agent.vms.items() if not vm.freed}
    yield _counter("vm_resets", "How often the guest was reset.", resets, "vm")
    now = time.time()
    newest = {
        (name,): now - kept.driver.state.ready[-1].taken
        for name, kept in agent.standbys.kept.items()
        if kept.driver.state.ready
    }
    yield _gauge("standby_age_seconds", "Since the newest standby was taken.", newest, "vm")
    ready = {
        (name,): float(len(kept.driver.state.ready)) for name, kept in agent.standbys.kept.items()
    }
    yield _gauge("standbys_ready", "Standbys that can take over.", ready, "vm")
    devices = [one for vm in agent.vms.values() if not vm.freed for one in vm.devices.values()]
    there = {("served",): 0.0, ("gone",): 0.0}
    for one in devices:
        there["gone" if one.ailment else "served",] += 1
    yield _gauge("passthrough_devices", "Passed-through devices.", there, "state")


def _of_disks(agent: Agent) -> Iterator[Metric]:
    disks = [disk for _, disk in sorted(agent.disks.items())]
    there = Counter(disk.condition for disk in disks)
    there[Condition.QEMU] += len(agent.own_disks)
    there[Condition.FAILING] += len(agent.guarded.waiting)
    by_condition = {(condition.value,): float(there[condition]) for condition in Condition}
    yield _gauge("disks", "Disks of VMs that run.", by_condition, "condition")
    conditions = {(disk.name, disk.condition.value): 1.0 for disk in disks}
    conditions |= {(name, Condition.FAILING.value): 1.0 for name in agent.guarded.waiting}
    yield _gauge("disk_condition", "1: the disk is so.", conditions, "disk", "condition")
    for name, text, of in (
        ("size_bytes", "What the guest sees.", _size),
        ("in_flight", "Requests that are being worked at.", _in_flight),
        ("waiting", "Requests that the guest has made, and that nobody has taken.", _waiting),
        ("flush_failed", "1: a flush has failed, and so does every later one.", _flush_failed),
        ("image_misplaced", "1: the path of the image leads elsewhere.", _misplaced),
        ("upgrade_available", "1: the installed program is another one.", _upgrade_available),
    ):
        yield _gauge(f"disk_{name}", text, {(disk.name,): of(disk) for disk in disks}, "disk")
    guarded = {(disk.name,): float(disk.spare_ready) for disk in disks if disk.setup.policy.spare}
    yield _gauge("disk_spare_ready", "1: another process is ready to take over.", guarded, "disk")
    totals = {disk.name: disk.history.accounts.total for disk in disks}
    requests, moved = {}, {}
    for name, total in totals.items():
        requests[name, "read"], requests[name, "write"] = total.reads, total.writes
        requests[name, "flush"], requests[name, "discard"] = total.flushes, total.discards
        moved[name, "read"], moved[name, "write"] = total.bytes_read, total.bytes_written
    yield _counter("disk_requests", "Requests that were done.", requests, "disk", "op")
    yield _counter("disk_bytes", "Bytes of these.", moved, "disk", "op")
    errors = {(name,): total.errors for name, total in totals.items()}
    yield _counter("disk_errors", "Requests that failed.", errors, "disk")
    replayed = {(name,): total.replayed for name, total in totals.items()}
    yield _counter("disk_replayed", "Requests done again after a death.", replayed, "disk")
    takeovers = {
        (disk.name, cause): count
        for disk in disks
        for cause, count in disk.history.accounts.takeovers.counts.items()
    }
    yield _counter("disk_takeovers", "Changes of the backend.", takeovers, "disk", "cause")
    took = {(name,): total.latency for name, total in totals.items()}
    text = "From the turn in which a request was taken until it was shown to the guest."
    yield _histogram("disk_request", text, REQUEST_EDGES, took, "disk")
    stalls = {(disk.name,): disk.history.accounts.stalls for disk in disks}
    text = "From the end of a backend until the next one had done its requests again."
    yield _histogram("disk_stall", text, STALL_EDGES, stalls, "disk")


def _size(disk: Disk) -> float:
    status = disk.history.accounts.status
    return status.size_bytes if status is not None else 0


def _in_flight(disk: Disk) -> float:
    status = disk.history.accounts.status
    return sum(queue.in_flight for queue in status.queues) if status is not None else 0


def _waiting(disk: Disk) -> float:
    status = disk.history.accounts.status
    return sum(queue.waiting or 0 for queue in status.queues) if status is not None else 0


def _flush_failed(disk: Disk) -> float:
    return disk.flush_failed


def _misplaced(disk: Disk) -> float:
    return disk.image.finding.state is not ImageState.IN_PLACE


def _upgrade_available(disk: Disk) -> float:
    return disk.upgrade_available


def _of_tallies() -> Iterator[Metric]:
    for name, text, tally, label in (
        ("migrations", "Moves of VMs from this host that are over.", tallies.MIGRATIONS, "outcome"),
        (
            "migration_bytes",
            "What QEMU and the wire sent.",
            tallies.MIGRATION_BYTES,
            "kind",
        ),
        ("migration_pages", "Pages by how they went.", tallies.MIGRATION_PAGES, "kind"),
        ("guard_decisions", "What the guard decided.", tallies.GUARD_DECISIONS, "action"),
        ("store_failures", "Requests to etcd without an answer.", tallies.STORE_FAILURES, "kind"),
    ):
        yield _tally(name, text, tally, label)
    blackouts = {(): tallies.MIGRATION_BLACKOUTS}
    text = "From the stop of a guest that moves to the word that it runs."
    yield _histogram("migration_blackout", text, STALL_EDGES, blackouts)
    text = "Requests to etcd that were answered."
    yield _histogram("store_request", text, STALL_EDGES, {(): tallies.STORE_REQUESTS})


def _tally(name: str, help_text: str, tally: Tally, label: str) -> Metric:
    return _counter(name, help_text, {(key,): count for key, count in tally.counts.items()}, label)
