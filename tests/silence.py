"""Monitors that count as silent soon, for tests that stop a QEMU."""

from __future__ import annotations

import pytest

from sempervirt.qemu.link import Patience

# A test's agents have little patience with the monitors of their QEMUs.
soon_silent = pytest.mark.parametrize(
    "patience", [Patience(connect_s=30, command_s=3, heartbeat_s=1)], ids=["little patience"]
)
