"""A trial of the fence: host a is cut off, stopped, thawed; host b takes over when it is proved.

The two hosts are clients of one file server (`tests.revoking_server`), the VM of each is a process
that writes stamps (`tests.standby.writer`). b writes when `Fence.prove` says Proven, and never
before; then all that was done to a is undone, in either order, and a goes on as far as it can.

Two writers are found by the stamps: after a whole pass of b, which then stands still, every block
has b's epoch, whatever a still does. `python -m tests.standby.split_brain [RUNS [SEED]]` is the
campaign; it ends with 1 if two have written, or a VM that nobody may fence was disturbed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from sempervirt.standby.means import Means, NotYet, Proof, Proven, Where, storage_can
from sempervirt.standby.proof import Fence, Target
from tests.revoking_server import FUSE_TYPE, RevokingServer, revoking_server
from tests.standby.writer import BLOCK_BYTES, BLOCKS, epochs_of

OLD, NEW = 1, 2
DEADLINE_S = 90.0
# So long b asks for a proof that it must not get: longer than the lease by far.
REFUSED_S = 0.6
REVOKING = {FUSE_TYPE: "the server of the tests ends the lease of a client that is silent"}
WRITER = [sys.executable, "-m", "tests.standby.writer"]

Prove = Callable[[Fence], Awaitable[Proof]]


class Event(Enum):
    """What happens to host a."""

    CUT = "network cut"
    STOP = "VM stopped"


class Way(Enum):
    """In which order it is undone."""

    NETWORK_FIRST = "network first"
    VM_FIRST = "VM first"


@dataclass(frozen=True)
class Plan:
    """What happens to a, in order, and how it comes back."""

    events: tuple[Event, ...]
    way: Way

    def __str__(self) -> str:
        events = ", ".join(event.value for event in self.events) or "nothing"
        return f"{events}; back: {self.way.value}"


@dataclass(frozen=True)
class Outcome:
    """What came of a run. `old_end` is the last word of a's VM, "" where it writes on."""

    proof: Proof
    old_end: str
    epochs: frozenset[int]

    @property
    def taken_over(self) -> bool:
        """Whether b has written."""
        return isinstance(self.proof, Proven)

    @property
    def one_writer(self) -> bool:
        """Whether what stands in the image is of one VM alone."""
        return self.epochs == {NEW if self.taken_over else OLD}


PLANS = [
    Plan(events, way)
    for events in (
        (),
        (Event.STOP,),
        (Event.CUT,),
        (Event.CUT, Event.STOP),
        (Event.STOP, Event.CUT),
    )
    for way in Way
]


class Vm:
    """The process of one host's VM."""

    def __init__(self, image: Path, epoch: int, *how: str) -> None:
        argv = [*WRITER, str(image), str(epoch), *how]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE)
        self._text = b""

    def wait_said(self, *words: str) -> str:
        """The next line that begins with one of `words`; AssertionError at the deadline."""
        output = self.process.stdout
        assert output is not None
        deadline = time.monotonic() + DEADLINE_S
        while True:
            line, newline, rest = self._text.partition(b"\n")
            if newline:
                self._text = rest
                if line.decode().startswith(words):
                    return line.decode()
                continue
            left_s = deadline - time.monotonic()
            ready = select.select([output], [], [], max(left_s, 0))[0]
            assert ready, f"nobody said any of {words}"
            piece = os.read(output.fileno(), 65536)
            assert piece, f"it has ended, and said none of {words}"
            self._text += piece

    def forget(self) -> None:
        """Drops what it has said until now."""
        output = self.process.stdout
        assert output is not None
        while select.select([output], [], [], 0)[0] and (piece := os.read(output.fileno(), 65536)):
            self._text = piece
        self._text = b""

    def signal(self, number: signal.Signals) -> None:
        """Stops it, or lets it run on."""
        self.process.send_signal(number)

    def end(self) -> None:
        """Kills it."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


async def honest(fence: Fence) -> Proof:
    """The proof as it is."""
    return await fence.prove()


async def lying(_fence: Fence) -> Proof:
    """The control: a proof that proves nothing."""
    return Proven(Means.LOCK_REVOKED, "a lie")


async def run(server: RevokingServer, plan: Plan, prove: Prove = honest) -> Outcome:
    """One run; the images of a former one are written anew."""
    (server.backing / "disk.raw").write_bytes(bytes(BLOCKS * BLOCK_BYTES))
    old = Vm(server.mount("a") / "disk.raw", OLD, "lock")
    try:
        old.wait_said("writing")
        old.wait_said("pass")
        return await _strike(server, plan, prove, old)
    finally:
        server.restore("a")
        old.end()


async def _strike(server: RevokingServer, plan: Plan, prove: Prove, old: Vm) -> Outcome:
    for event in plan.events:
        if event is Event.CUT:
            server.cut("a")
        else:
            old.signal(signal.SIGSTOP)
    image = server.mount("b") / "disk.raw"
    ability = await storage_can(image, Where.ELSEWHERE, revoking=REVOKING)
    fence = Fence(Target("web", Where.ELSEWHERE), {"root": (image, ability)})
    try:
        proof = await _proof(fence, prove, expected=Event.CUT in plan.events)
        if not isinstance(proof, Proven):
            return _not_taken_over(server, plan, old, proof)
        return _taken_over(server, plan, old, proof)
    finally:
        fence.let_go()


async def _proof(fence: Fence, prove: Prove, *, expected: bool) -> Proof:
    loop = asyncio.get_running_loop()
    end = loop.time() + (DEADLINE_S if expected else REFUSED_S)
    while True:
        proof = await prove(fence)
        if not isinstance(proof, NotYet) or loop.time() >= end:
            return proof
        await asyncio.sleep(0.02)  # poll interval


def _come_back(server: RevokingServer, plan: Plan, old: Vm) -> None:
    if plan.way is Way.VM_FIRST:
        old.signal(signal.SIGCONT)
    server.restore("a")
    old.signal(signal.SIGCONT)


def _taken_over(server: RevokingServer, plan: Plan, old: Vm, proof: Proof) -> Outcome:
    """b's lock is the fence's: b writes, stands still after a pass, and a comes back."""
    old.forget()
    new = Vm(server.mount("b") / "disk.raw", NEW)
    try:
        new.wait_said("pass")
        new.signal(signal.SIGSTOP)
        while _state_of(new.process.pid) != "T":
            time.sleep(0.005)  # poll interval
        # A pass of b that was begun is not whole: what counts is whether a still writes.
        old.forget()
        _come_back(server, plan, old)
        # Of a pass that was complete before it was cut off, it may tell only now.
        said = ""
        for _ in range(2):
            said = old.wait_said("failed", "pass")
            if said.startswith("failed"):
                break
        end = said if said.startswith("failed") else ""
        return Outcome(proof, end, frozenset(epochs_of(server.backing / "disk.raw")))
    finally:
        new.end()


def _not_taken_over(server: RevokingServer, plan: Plan, old: Vm, proof: Proof) -> Outcome:
    """a was not to be fenced: it writes on, and nobody else has written."""
    _come_back(server, plan, old)
    old.forget()
    old.wait_said("pass")
    old.wait_said("pass")
    return Outcome(proof, "", frozenset(epochs_of(server.backing / "disk.raw")))


def _state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextlib.contextmanager
def _place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sv-split-", dir="/tmp") as name:
        yield Path(name)


async def campaign(runs: int, seed: int) -> int:
    """Runs of random plans; how many went wrong."""
    dice = random.Random(seed)
    counted: Counter[str] = Counter()
    wrong = 0
    with _place() as place, revoking_server(place, ("a", "b")) as server:
        for number in range(runs):
            plan = dice.choice(PLANS)
            outcome = await run(server, plan)
            expected = Event.CUT in plan.events
            good = outcome.one_writer and outcome.taken_over == expected
            wrong += not good
            counted[f"{'taken over' if outcome.taken_over else 'left alone'}: {plan}"] += 1
            if not good:
                print(f"run {number} (seed {seed}): {plan}: {outcome}", flush=True)  # noqa: T201
    for what, count in sorted(counted.items()):
        print(f"{count:5} {what}")  # noqa: T201
    print(f"{runs} runs, {wrong} with two writers or a needless take-over")  # noqa: T201
    return wrong


if __name__ == "__main__":
    asked = [int(argument) for argument in sys.argv[1:]]
    sys.exit(1 if asyncio.run(campaign(*(asked + [300, 1][len(asked) :]))) else 0)
