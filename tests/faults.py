"""Requests that fail on demand: a backend that is built for that, and the command that tells it so.

A released backend does not know the command (`tests/integration/test_released.py`).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sempervirt.core.errors import InvalidRequest
from sempervirt.disk.backend import PROGRAM
from sempervirt.disk.driver import Disk
from sempervirt.host.control import ControlSocket

ROOT = Path(__file__).parents[1]
BUILD_S = 600.0


def trial_backend() -> Path:
    """semper-blkd that can be told to fail requests, and to die; built if that is needed."""
    subprocess.run([ROOT / "scripts/trial-programs"], cwd=ROOT, check=True, timeout=BUILD_S)
    return ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "trials/semper-blkd"


async def inject_fault(disk: Disk, rule: dict[str, Any] | None) -> None:
    """Has requests of the disk's active backend fail by `rule` (`crates/blkd/src/faults.rs`)."""
    assert disk.generation is not None
    control = ControlSocket(disk.setup.files.control(disk.generation), PROGRAM)
    try:
        await control.ask("fault", rule=rule)
    except InvalidRequest as error:
        pytest.fail(f"the backend was built without the feature faults: {error}")
