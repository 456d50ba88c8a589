"""Two hosts, two guests, one disk on a server that revokes locks: the first host is cut off, the
second takes the disk when that is proved, and the first comes back and writes on.

Everything is real but the file server (`tests.revoking_server`). The stamps of the guests' writers
say who has written; the control is a server that lets late writes through.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sempervirt.agent import Agent, AgentConfig
from sempervirt.guest import ProbeClient
from sempervirt.qemu.spec import VmSpec
from sempervirt.standby.means import NotYet, Proof, Proven, Where, storage_can
from sempervirt.standby.proof import Fence, Target
from tests.revoking_server import revoking_server
from tests.standby.split_brain import REVOKING

pytestmark = [
    pytest.mark.guest,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount"),
]
Spec = Callable[..., VmSpec]
MIB = 1 << 20
BOOT_S, PROVEN_S = 180.0, 90.0
# Around the page cache of each host: a guest that reads what it wrote is to find what is there.
DISK = {"serial": "own", "direct": True}


@pytest.mark.parametrize("refuses", [True, False])
async def test_a_guest_that_was_cut_off_writes_nothing_any_more(
    config: AgentConfig, guest_spec: Spec, place: Path, refuses: bool
) -> None:
    other = replace(config, state_dir=place / "s2", run_dir=place / "r2")
    with revoking_server(place, ("a", "b"), refuses=refuses) as server:
        (server.backing / "disk.raw").write_bytes(bytes(32 * MIB))
        images = {name: server.mount(name) / "disk.raw" for name in ("a", "b")}
        async with Agent.open(config) as first, Agent.open(other) as second:
            old = await first.run_vm(guest_spec(image=str(images["a"]), **DISK))
            path = old.channel_path("probe")
            async with await ProbeClient.connect(path, deadline_s=BOOT_S) as left:
                await left.wait_hello(deadline_s=BOOT_S)
                await left.write_start("serial:own", writers=8, span_bytes=4 * MIB, hang_s=120)
                await left.wait_stats(lambda stats: stats.completions > 100)
                fence = await _fence(images["b"])
                assert isinstance(await fence.prove(), NotYet), "its host is there and writes"
                server.cut("a")
                assert isinstance(await _proof(fence), Proven)
                fence.let_go()
                new = await second.run_vm(guest_spec(image=str(images["b"]), **DISK))
                path = new.channel_path("probe")
                async with await ProbeClient.connect(path, deadline_s=BOOT_S) as right:
                    await right.wait_hello(deadline_s=BOOT_S)
                    await right.write_start("serial:own", writers=8, span_bytes=4 * MIB)
                    await right.wait_stats(lambda stats: stats.completions > 100)
                    before = (await left.stats()).completions
                    server.restore("a")
                    await left.wait_stats(
                        lambda stats: stats.io_error_count > 0 or stats.completions > before + 300
                    )
                    assert ((await left.stats()).io_error_count > 0) == refuses
                    judged = await right.write_stop()
            await old.kill()
    assert judged.is_clean == refuses, judged
    assert bool(judged.wrong.total) != refuses, "two have written, and the stamps do not say so"


async def _fence(image: Path) -> Fence:
    ability = await storage_can(image, Where.ELSEWHERE, revoking=REVOKING)
    return Fence(Target("web", Where.ELSEWHERE), {"root": (image, ability)})


async def _proof(fence: Fence) -> Proof:
    async with asyncio.timeout(PROVEN_S):
        while True:
            proof = await fence.prove()
            if not isinstance(proof, NotYet):
                return proof
            await asyncio.sleep(0.05)  # poll interval
