"""How many queues of a disk each thread works on, and with which engine: decided at VM start.

The first of these that says something decides, for each setting by itself:

1. the VM file (`thread_map`, `queues_per_thread`, `engine`, `poll_us`);
2. the preset of the device's type on its storage, which `semper disk tune` measured, unless it
   is stale;
3. a built-in default.

The threads are created from the number of queues that each is to have: method of US11210127B2.
"""

from __future__ import annotations

from dataclasses import dataclass

from sempervirt.core.queue_map import (
    Binding,
    Choice,
    DevicePlan,
    DeviceType,
    Engine,
    ThreadMap,
    spread,
)
from sempervirt.disk.presets import Preset, Stale

# One thread has time for several queues: a guest rarely keeps all its processors' queues busy
# at once, and a thread that has more to do at each wake-up spends less on waking up.
QUEUES_PER_THREAD = 4

VM_FILE = "VM file"
BUILT_IN = "built-in default"

BLKD_ENGINES = frozenset({"sync", "nowait", "uring", "mmap"})


@dataclass(frozen=True)
class Wish:
    """What the VM file says of a disk; None where it leaves the choice.

    `engines` are those that this device and host have: a preset for another is of no use.
    """

    device: DeviceType
    queues: int
    engines: frozenset[str] = BLKD_ENGINES
    default_engine: Engine = "auto"
    thread_map: ThreadMap | None = None
    queues_per_thread: int | None = None
    engine: Engine | None = None
    poll_us: int | None = None


def plan(wish: Wish, found: Preset | Stale | None, processors: int) -> DevicePlan:
    """How the disk is served; `processors` are the host's."""
    preset = found if isinstance(found, Preset) and found.engine in wish.engines else None
    default = _why_default(found, preset)
    poll_us, poll_source = _polling(wish, preset, default)
    return DevicePlan(
        device=wish.device,
        binding=_binding(wish, preset, default, processors),
        engine=_engine(wish, preset, default),
        poll_us=poll_us,
        poll_source=poll_source,
    )


def _binding(wish: Wish, preset: Preset | None, default: str, processors: int) -> Binding:
    if wish.thread_map is not None:
        return Binding(wish.thread_map, VM_FILE)
    if wish.queues_per_thread is not None:
        return Binding(spread(wish.queues, wish.queues_per_thread), VM_FILE)
    # Nobody asked for more threads than there are processors.
    if preset is not None:
        thread_map = spread(wish.queues, preset.queues_per_thread, processors)
        return Binding(thread_map, named(preset))
    return Binding(spread(wish.queues, QUEUES_PER_THREAD, processors), default)


def _engine(wish: Wish, preset: Preset | None, default: str) -> Choice:
    if wish.engine is not None:
        return Choice(wish.engine, VM_FILE)
    if preset is not None:
        return Choice(preset.engine, named(preset))
    return Choice(wish.default_engine, default)


def _polling(wish: Wish, preset: Preset | None, default: str) -> tuple[int | None, str]:
    if wish.poll_us is not None:
        return wish.poll_us, VM_FILE
    if preset is not None:
        return preset.poll_us, named(preset)
    return None, default


def named(preset: Preset) -> str:
    """A preset as a source of decisions."""
    return f"preset of {preset.measured_at:%Y-%m-%d}"


def _why_default(found: Preset | Stale | None, used: Preset | None) -> str:
    if isinstance(found, Stale):
        return f"{BUILT_IN}; the {named(found.preset)} is stale: {found.reason}"
    if found is not None and used is None:
        return f"{BUILT_IN}; the {named(found)} names {found.engine}, which is not there"
    return BUILT_IN
