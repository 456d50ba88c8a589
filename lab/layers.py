"""Tests of other things with layers below: `SEMPERVIRT_LAYERS=1` gives each new image of a guest a
layer before its VM starts, and the VM one of its own above that.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEADLINE_S = 20.0
WANTED = os.environ.get("SEMPERVIRT_LAYERS") == "1"


def laid(image: Path) -> Path:
    """The image; with a layer, if the environment says so."""
    if WANTED:
        take_snapshot(image)
    return image


def take_snapshot(image: Path) -> int:
    """Takes a snapshot of an image that nobody serves or has claimed; its number."""
    program = Path(sys.executable).parent / "semper-blkd"
    with tempfile.TemporaryDirectory(prefix="sv-lay-", dir="/dev/shm") as place:
        control = Path(place) / "control"
        command = [
            str(program), f"--blk-file={image}", f"--socket-path={place}/disk",
            f"--control-socket={control}", f"--layer-map={place}/map",
        ]  # fmt: skip
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            answer = _asked(control, process)
            return int(answer["ok"]["snapshot"])
        finally:
            process.terminate()
            process.communicate()


def _asked(control: Path, process: subprocess.Popen[bytes]) -> dict[str, dict[str, int]]:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        with socket.socket(socket.AF_UNIX) as asked:
            asked.settimeout(DEADLINE_S)
            try:
                asked.connect(str(control))
            except (FileNotFoundError, ConnectionRefusedError):
                assert process.poll() is None, "semper-blkd has ended"
                assert time.monotonic() < deadline, "semper-blkd does not begin"
                time.sleep(0.01)  # poll interval
                continue
            request = {"id": 1, "cmd": "snapshot", "wait": True}
            asked.sendall(json.dumps(request).encode() + b"\n")
            answer: dict[str, dict[str, int]] = json.loads(asked.makefile().readline())
            return answer
