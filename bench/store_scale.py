"""What the store costs as the cluster grows: ``make store-scale``; its short form is a test.

On one real etcd: the steps of the registry with few and with many VMs in the store, in turn; who is
woken when one VM changes; what agents that have nothing to do cost etcd. Processor time counts and
not time, for other work may go on beside this.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.processes import processor_ns
from lab.etcd import Etcd
from sempervirt.cluster.cluster import Cluster, Settings
from sempervirt.cluster.membership import LEASE_S, Membership
from sempervirt.store.etcd import Credentials, EtcdStore
from sempervirt.store.etcd_rights import ROOT_USER, divide, host_user, secure
from sempervirt.store.guarded import GuardedStore
from sempervirt.store.port import Put, Snapshot
from sempervirt.store.records import Custody, ImageClaim, Ownership
from sempervirt.store.registry import Claim, Registry
from sempervirt.trust.authority import Authority, Issued
from sempervirt.trust.identity import Identity, KeyRequest
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.fencing import follow_claims

ROOT = Credentials(ROOT_USER, "password")
# So many VMs are entered by one commit.
AT_ONCE = 50
DEADLINE_S = 120.0


@dataclass(frozen=True)
class Cost:
    """Of one hand-over: processor time of etcd and of this process, and how long it took."""

    etcd_ms: float
    client_ms: float
    took_ms: float

    @property
    def processor_ms(self) -> float:
        """Of both."""
        return self.etcd_ms + self.client_ms


class Counted(EtcdStore):
    """Keeps of which VMs it was told that they, or proposals of them, changed."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.told: set[str] = set()

    def _after(self, state: Snapshot, events: Any) -> Snapshot:
        for event in events:
            # vms/NAME, proposals/HOST/NAME/…
            words = self._name(event["kv"]).split("/")
            self.told.add(words[1] if words[0] == "vms" else words[2])
        return super()._after(state, events)


class OfHost(GuardedStore):
    """As a host has it, with the password of root: to make a hundred users takes etcd minutes."""

    def __init__(self, etcd: EtcdStore, host: str) -> None:
        super().__init__(etcd)
        self._host = host_user(host)

    @property
    def _user(self) -> str:
        return self._host


@asynccontextmanager
async def opened(etcd: Etcd, root: str, *, guarded: bool) -> AsyncIterator[GuardedStore]:
    """The store as the host with the authority has it; with users, hosts propose."""
    store = GuardedStore(
        Counted([etcd.url], root=root, credentials=ROOT if guarded else None, timeout_s=60)
    )
    try:
        if guarded:
            await secure(store.etcd)
            await divide(store.etcd, [])
        yield store
    finally:
        await store.close()


def root_of(vms: int) -> str:
    """Where the store of so many VMs stands."""
    return f"of-{vms}/"


def vm_name(number: int) -> str:
    """Of a VM that fills the store."""
    return f"vm{number:05}"


async def fill(etcd: EtcdStore, vms: int, hosts: int) -> None:
    """So many VMs with an image each, on so many hosts, as they stand there when all is settled.
    Standbys of each are on the host beside.
    """
    for first in range(0, vms, AT_ONCE):
        puts = []
        for number in range(first, min(vms, first + AT_ONCE)):
            vm, image, claim = vm_name(number), f"{number:032x}", f"{number:032x}"
            owned = Ownership(
                vm=vm,
                custody=Custody.OWNED,
                owner=f"h{number % hosts}",
                epoch=3,
                claim=claim,
                images=(image,),
                standby=f"h{(number + 1) % hosts}",
            )
            held = ImageClaim(image=image, epoch=3, claim=claim, vm=vm)
            puts += [Put(f"vms/{vm}", owned.text()), Put(f"images/{image}", held.text())]
        await etcd.commit(puts, expect={put.key: 0 for put in puts})


async def fill_each(etcd: Etcd, sizes: Iterable[int], hosts: int, *, guarded: bool) -> None:
    """A store of each of these sizes."""
    for size in sizes:
        async with opened(etcd, root_of(size), guarded=guarded) as store:
            await fill(store.etcd, size, hosts)


async def hand_over(etcd: Etcd, store: GuardedStore, name: str) -> Cost:
    """One VM goes from a to b; the rest of its way is not counted."""
    registry = Registry(store)
    claim = await registry.claim(name, "a", [f"image-{name}"])
    await registry.begin_move(claim, "b")
    there, here, then = processor_ns(etcd.pid), time.process_time_ns(), time.perf_counter()
    claim = await registry.hand_over(claim)
    cost = Cost(
        (processor_ns(etcd.pid) - there) / 1e6,
        (time.process_time_ns() - here) / 1e6,
        (time.perf_counter() - then) * 1e3,
    )
    await registry.release(claim)
    if store.settles:
        await store.settle()
    return cost


async def hand_overs(
    etcd: Etcd, sizes: tuple[int, ...], times: int, *, guarded: bool
) -> Mapping[int, Cost]:
    """What a hand-over costs with so many VMs in the store: medians, measured in turn."""
    found: dict[int, list[Cost]] = {size: [] for size in sizes}
    async with AsyncExitStack() as stack:
        stores = {
            size: await stack.enter_async_context(opened(etcd, root_of(size), guarded=guarded))
            for size in sizes
        }
        for turn in range(times):
            for size, store in stores.items():
                found[size].append(await hand_over(etcd, store, f"x{turn}"))
    return {
        size: Cost(
            statistics.median(cost.etcd_ms for cost in costs),
            statistics.median(cost.client_ms for cost in costs),
            statistics.median(cost.took_ms for cost in costs),
        )
        for size, costs in found.items()
    }


async def wakes(etcd: Etcd, vms: int, agents: int, changes: int, *, guarded: bool) -> list[int]:
    """How many of the agents are told when one VM is moved by its host, for each of some VMs. Each
    follows its own VMs as `semperd` does; the first one has the authority.
    """
    root = root_of(vms)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(opened(etcd, root, guarded=guarded))
        stores = [first]
        for number in range(1, agents):
            who = ROOT if guarded else None
            counted = Counted([etcd.url], root=root, credentials=who, timeout_s=60)
            store = OfHost(counted, f"h{number}") if guarded else GuardedStore(counted)
            stack.push_async_callback(store.close)
            stores.append(store)
        tasks = []
        ready = [asyncio.Event() for _ in stores]
        for number, store in enumerate(stores):
            names = [vm_name(one) for one in range(number, vms, agents)]
            own: Any = {
                name: SimpleNamespace(
                    freed=False,
                    moving=None,
                    record=SimpleNamespace(
                        claim=Claim(name, f"h{number}", 3, f"{int(name[2:]):032x}")
                    ),
                )
                for name in names
            }
            following = follow_claims(
                store, f"h{number}", Path("/nowhere"), partial(dict, own), ready[number].set
            )
            tasks.append(asyncio.ensure_future(following))
        if guarded:
            tasks.append(asyncio.ensure_future(_settle(first)))
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(one.wait() for one in ready))
        numbers = [agents + change * 3 for change in range(changes)]  # of another host each time
        for number in numbers:
            host = number % agents
            claim = Claim(vm_name(number), f"h{host}", 3, f"{number:032x}", (f"{number:032x}",))
            await Registry(stores[host]).begin_move(claim, f"h{(host + 7) % agents}")
        async with asyncio.timeout(DEADLINE_S):
            while not all(vm_name(one) in _told(stores[one % agents]) for one in numbers):  # noqa: ASYNC110 - by others' tasks
                await asyncio.sleep(0.1)  # poll interval
        # What was sent to others as well is on its way since then; each answers a question first.
        await asyncio.gather(*(store.read("absent") for store in stores))
        # Nothing says that nothing more comes.
        await asyncio.sleep(1)
        counts = [sum(vm_name(one) in _told(store) for store in stores) for one in numbers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return counts


def _told(store: GuardedStore) -> set[str]:
    assert isinstance(store.etcd, Counted)
    return store.etcd.told


async def _settle(store: GuardedStore) -> None:
    async for _ in store.keep_settled():
        pass


async def idle(etcd: Etcd, agents: int, seconds: float, place: Path) -> float:
    """Per cent of a processor at etcd, while so many agents are members and nothing happens."""
    authority = Authority.begun(place / "authority", "lab")
    async with AsyncExitStack() as stack:
        for number in range(agents):
            host = f"h{number}"
            config = AgentConfig(place / host / "s", place / host / "r")
            config.state_dir.mkdir(parents=True)
            asked = KeyRequest.made(host)
            issued = authority.issue_host(asked.text, host, "")
            pem = Issued(authority.certificate).pem
            Identity(config.trust_dir).keep(asked, issued.pem, pem)
            store = EtcdStore([etcd.url], root="idle/", timeout_s=60)
            stack.push_async_callback(store.close)
            cluster = Cluster(config, Settings("lab", host, "127.0.0.1:1", (etcd.url,)), store)
            membership = await stack.enter_async_context(Membership.kept(cluster))
            async with asyncio.timeout(DEADLINE_S):
                await membership.known.wait()
        await asyncio.sleep(LEASE_S)
        there, then = processor_ns(etcd.pid), time.monotonic()
        await asyncio.sleep(seconds)
        return (processor_ns(etcd.pid) - there) / (time.monotonic() - then) / 1e7


async def campaign(vms: int, agents: int) -> int:
    """Prints all figures; how many of the bounds are missed."""
    missed = 0
    for guarded in (False, True):
        kind = "hosts propose" if guarded else "hosts write"
        with Etcd.running() as etcd:
            await fill_each(etcd, (10, vms), agents, guarded=guarded)
            costs = await hand_overs(etcd, (10, vms), 40, guarded=guarded)
            for size, cost in costs.items():
                print(f"{kind}, {size} VMs: {cost}")
            ratio = costs[vms].processor_ms / costs[10].processor_ms
            print(f"{kind}: a hand-over costs {ratio:.2f} times as much")
            missed += ratio > 1.5
            counts = await wakes(etcd, vms, agents, 12, guarded=guarded)
            print(f"{kind}: agents of {agents} that a change has woken: {counts}")
            missed += max(counts) > 3
    with Etcd.running() as etcd, tempfile.TemporaryDirectory() as place:
        used = await idle(etcd, agents, 30, Path(place))
        print(f"{agents} idle members: {used:.1f} % of a processor at etcd")
        missed += used >= 10
    return missed


if __name__ == "__main__":
    asked = [int(argument) for argument in sys.argv[1:]]
    sys.exit(1 if asyncio.run(campaign(*(asked + [20_000, 100][len(asked) :]))) else 0)
