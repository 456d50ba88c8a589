"""What the store costs does not grow with the cluster: the short form of ``make store-scale``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator

import pytest

from bench import store_scale
from bench.store_scale import fill_each, hand_overs, wakes
from lab.etcd import Etcd
from sempervirt.store.etcd import EtcdStore
from sempervirt.store.port import Snapshot

pytestmark = pytest.mark.timeout(240)
FEW, MANY, AGENTS = 10, 400, 10


@pytest.fixture
def etcd() -> Iterator[Etcd]:
    with Etcd.running() as server:
        yield server


class Whole(store_scale.Counted):
    """The control: reads and watches all that there is, as it once did."""

    async def read(self, *parts: str) -> Snapshot:
        del parts
        return await EtcdStore.read(self)

    async def watch(self, *parts: str, also: object = ()) -> AsyncGenerator[Snapshot]:
        del parts, also
        async for state in super().watch():
            yield state


@pytest.mark.parametrize("guarded", [False, True], ids=["hosts-write", "hosts-propose"])
async def test_a_hand_over_and_who_is_woken_do_not_grow_with_the_cluster(
    etcd: Etcd, guarded: bool
) -> None:
    await fill_each(etcd, (FEW, MANY), AGENTS, guarded=guarded)
    costs = await hand_overs(etcd, (FEW, MANY), 15, guarded=guarded)
    assert costs[MANY].processor_ms <= 1.5 * costs[FEW].processor_ms, costs
    counts = await wakes(etcd, MANY, AGENTS, 4, guarded=guarded)
    assert max(counts) <= 3, counts
    assert min(counts) >= 1, counts


async def test_a_store_that_reads_and_watches_everything_is_found_out(
    etcd: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill_each(etcd, (FEW, MANY), AGENTS, guarded=False)
    monkeypatch.setattr(store_scale, "Counted", Whole)
    costs = await hand_overs(etcd, (FEW, MANY), 3, guarded=False)
    assert costs[MANY].etcd_ms > 2 * costs[FEW].etcd_ms, costs
    assert max(await wakes(etcd, MANY, AGENTS, 2, guarded=False)) == AGENTS
