"""The network of a standby: up from the start, and leading nowhere until it takes over.

    made ─► the standby's own tap, up, a port of no bridge ── take-over ─► a port of the first VM's
            the guest speaks, and nobody hears it                          bridge, and announced

A guest whose link comes up only at the take-over is silent for seconds; one whose link was up, and
that has spoken, is not. The taps stay the VM's when the standby has taken over.

All calls are made in the agent's thread: another thread may be in another network namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import zlib
from collections.abc import Mapping, Sequence

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.host import tap as taps
from sempervirt.host.dhcp import Requests
from sempervirt.qemu.spec import VmSpec

log = logging.getLogger(__name__)

SPOKE_S = 5.0
SPOKE_POLL_S = 0.1
# What `tap_of` gives: a tap of another name is its owner's.
_OURS = re.compile(r"sb[0-9a-f]{8}n[0-9]+")

Bridges = Mapping[str, str]


def bridges_of(spec: VmSpec, number: int) -> dict[str, str]:
    """The bridges to which the taps of standby `number` of a VM will be led, by tap. Raises
    InvalidRequest for a tap that is no port of a bridge.
    """
    found = {}
    for index, nic in enumerate(spec.nics):
        if nic.tap is None:
            continue
        try:
            bridge = taps.bridge_of(nic.tap)
        except OSError as error:
            raise InvalidRequest(f"the tap {nic.tap} is not there: {error.strerror}") from error
        if bridge is None:
            raise InvalidRequest(
                f"the tap {nic.tap} is no port of a bridge, so another one cannot take its place",
                remedy=f"make it one: ip link set {nic.tap} master BRIDGE",
            )
        found[tap_of(spec.name, number, index)] = bridge
    return found


def tap_of(vm: str, number: int, index: int) -> str:
    """The tap of a card of a standby: at most 15 bytes."""
    return f"sb{zlib.crc32(f'{vm}/{number}'.encode()):08x}n{index}"


def isolated(spec: VmSpec, number: int) -> VmSpec:
    """The VM with the taps of that standby. Its addresses are those of `spec`."""
    nics = tuple(
        nic if nic.tap is None else nic.model_copy(update={"tap": tap_of(spec.name, number, index)})
        for index, nic in enumerate(spec.nics)
    )
    return spec.model_copy(update={"nics": nics})


def prepare(spec: VmSpec) -> None:
    """Makes the taps of a standby. Raises Unavailable."""
    for nic in spec.nics:
        if nic.tap is None:
            continue
        try:
            taps.make(nic.tap, several=nic.queues > 1)
        except OSError as error:
            raise Unavailable(
                f"the tap {nic.tap} of the standby cannot be made: {error.strerror}",
                remedy="the agent needs CAP_NET_ADMIN for that",
            ) from error


def prepare_again(spec: VmSpec, bridges: Bridges) -> None:
    """Makes those taps of a VM that a standby has brought, and leads them to their bridges. Raises
    Unavailable.
    """
    ours = tuple(nic for nic in spec.nics if nic.tap in bridges)
    prepare(spec.model_copy(update={"nics": ours}))
    lead({nic.tap: bridges[nic.tap] for nic in ours if nic.tap is not None})


def listen(spec: VmSpec) -> list[Requests]:
    """Hears from now on whether a standby asks for an address on its taps. Where that cannot be
    heard nobody is told of it.
    """
    heard = []
    for nic in spec.nics:
        if nic.tap is not None:
            with contextlib.suppress(OSError):
                heard.append(Requests(nic.tap))
    return heard


def require_own_addresses(heard: Sequence[Requests]) -> None:
    """Raises Unavailable for a guest that needs a DHCP server: while it is isolated none answers,
    and what waits would have no address.
    """
    for requests in heard:
        if requests.seen():
            raise Unavailable(
                f"its guest asks for an address by DHCP on {requests.interface}, where nobody "
                "answers while it is isolated: it would go on without one",
                remedy="give the guest a fixed address",
            )


async def wait_spoken(spec: VmSpec) -> tuple[str, ...]:
    """Returns when each tap of a standby has heard its guest, or SPOKE_S are over; notes."""
    deadline = time.monotonic() + SPOKE_S
    silent = [nic.tap for nic in spec.nics if nic.tap is not None]
    while silent and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            silent = [tap for tap in silent if taps.packets_from(tap) == 0]
        if silent:
            await asyncio.sleep(SPOKE_POLL_S)
    return tuple(
        f"the guest has sent nothing on {tap}: it may be silent there for seconds when it goes on"
        for tap in silent
    )


def lead(bridges: Bridges) -> None:
    """Leads the taps of a standby to the first VM's bridges. Raises Unavailable."""
    for tap, bridge in bridges.items():
        try:
            taps.join(tap, bridge)
        except OSError as error:
            raise Unavailable(
                f"the tap {tap} is not led to the bridge {bridge}: {error.strerror}",
                remedy=f"by hand: ip link set {tap} master {bridge}",
            ) from error


def remove(spec: VmSpec) -> None:
    """Removes the taps of a standby that will not take over."""
    for nic in spec.nics:
        if nic.tap is None or _OURS.fullmatch(nic.tap) is None:
            continue
        try:
            taps.Remover(nic.tap).remove()
        except OSError as error:
            log.info("standby tap=%s is not removed: %s", nic.tap, error.strerror)
