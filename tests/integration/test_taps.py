"""Taps that leave their bridges with a VM that is another host's, and go back with it: real ones,
in a network namespace.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.namespaces import inside, ip, remove
from sempervirt.host import tap as taps
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.taps import leave_bridges, return_to_bridges

pytestmark = pytest.mark.root
SPEC = VmSpec.model_validate({"name": "web", "nics": [{"type": "tap", "tap": "tap0"}]})


@pytest.fixture
def namespace() -> Iterator[str]:
    tag = f"svt{os.getpid()}"
    name = f"{tag}-taps"
    ip("netns", "add", name)
    try:
        for bridge in ("br0", "br1"):
            ip("-n", name, "link", "add", bridge, "type", "bridge")
        ip("-n", name, "tuntap", "add", "tap0", "mode", "tap")
        ip("-n", name, "link", "set", "tap0", "master", "br0")
        yield name
    finally:
        remove(tag)


@pytest.fixture
def bridge(namespace: str) -> Callable[[], str | None]:
    """The one that the tap is a port of."""
    return lambda: inside(namespace, lambda: taps.bridge_of("tap0"))


def test_a_tap_goes_back_to_the_bridge_that_it_was_taken_from(
    tmp_path: Path, namespace: str, bridge: Callable[[], str | None]
) -> None:
    assert inside(namespace, lambda: return_to_bridges(tmp_path, SPEC)) == []  # the control
    (said,) = inside(namespace, lambda: leave_bridges(tmp_path, SPEC))
    assert "was taken from the bridge br0" in said
    assert bridge() is None
    assert inside(namespace, lambda: leave_bridges(tmp_path, SPEC)) == []
    returned = inside(namespace, lambda: return_to_bridges(tmp_path, SPEC))
    assert returned == ["tap tap0 is on the bridge br0 again"]
    assert bridge() == "br0"
    assert inside(namespace, lambda: return_to_bridges(tmp_path, SPEC)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_tap_that_has_a_bridge_by_now_stays_there(
    tmp_path: Path, namespace: str, bridge: Callable[[], str | None]
) -> None:
    inside(namespace, lambda: leave_bridges(tmp_path, SPEC))
    ip("-n", namespace, "link", "set", "tap0", "master", "br1")
    assert inside(namespace, lambda: return_to_bridges(tmp_path, SPEC)) == []
    assert bridge() == "br1"
    assert list(tmp_path.iterdir()) == []


def test_a_bridge_that_is_gone_is_told_with_what_to_do(tmp_path: Path, namespace: str) -> None:
    inside(namespace, lambda: leave_bridges(tmp_path, SPEC))
    ip("-n", namespace, "link", "del", "br0")
    (said,) = inside(namespace, lambda: return_to_bridges(tmp_path, SPEC))
    assert "ip link set tap0 master BRIDGE" in said


@pytest.mark.parametrize("record", ["", "{", '{"version": 1, "left": ["tap0"]}', '{"version": 9}'])
def test_a_damaged_note_keeps_no_tap_on_its_bridge_and_no_vm_from_starting(
    tmp_path: Path, namespace: str, bridge: Callable[[], str | None], record: str
) -> None:
    (tmp_path / "taps.json").write_text(record)
    assert inside(namespace, lambda: return_to_bridges(tmp_path, SPEC)) == []
    assert bridge() == "br0"
    assert len(inside(namespace, lambda: leave_bridges(tmp_path, SPEC))) == 1
    assert bridge() is None
