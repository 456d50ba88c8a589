"""What becomes of the VMs of a host that goes down: in which order, and in how much time.

    what the VM file says     what is done; whatever fails, the VM is powered off in the end
    move                      another host takes it (`evacuation`), in the order of that
    power-off                 the guest is asked to; its QEMU is killed after its time
    save                      its state is kept on this host

Those that stay are ended first, VMs of the lowest priority before those of a higher one, all of one
priority at the same time: what others depend on ends last. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from sempervirt.qemu.spec import VmSpec

# No group gets less, however late it is: a guest that is killed is what all of this is against.
LEAST_S = 5.0


def in_order(specs: Iterable[VmSpec]) -> list[list[VmSpec]]:
    """The groups to end, one after the other."""
    ranked = sorted(specs, key=lambda spec: (spec.ha.priority, spec.name))
    return [[*group] for _, group in groupby(ranked, key=lambda spec: spec.ha.priority)]


def share_s(left_s: float, groups: int, most_s: float) -> float:
    """The seconds that the next of so many groups gets, of those that are left for all."""
    return min(most_s, max(LEAST_S, left_s / groups))


def moving_s(left_s: float, most_s: float) -> float:
    """The seconds for moves: what is left when those that could not move are powered off after."""
    return max(LEAST_S, left_s - min(most_s, left_s / 3))
