"""Network namespaces: doing something inside one, and ending them for certain.

`python -m lab.namespaces TAG` is the cleaner: when its standard input ends, which happens
also when the test that holds the other end is killed, it kills every process in a namespace
whose name begins with `TAG-`, and removes these namespaces and the directories it was given.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

CLONE_NEWNET = 0x4000_0000
END_S = 90.0
_libc = ctypes.CDLL(None, use_errno=True)

Result = TypeVar("Result")


def enter(namespace: str) -> None:
    """Puts the calling thread into a namespace, for good."""
    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(descriptor, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    finally:
        os.close(descriptor)


def inside(namespace: str, function: Callable[[], Result]) -> Result:
    """What `function` gives, called by a thread in that namespace (or here, if it is ""); its
    sockets stay there.
    """
    if not namespace:
        return function()
    results: list[Result] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            enter(namespace)
            results.append(function())
        except Exception as error:  # noqa: BLE001 - raised again by who asked
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def ip(*words: str) -> str:
    """What `ip` says. Raises AssertionError with its complaint."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


def within(namespace: str, *argv: str) -> list[str]:
    """A command line that runs another one in a namespace (or here, if it is "")."""
    return ["ip", "netns", "exec", namespace, *argv] if namespace else list(argv)


def pids(namespace: str) -> list[int]:
    """The processes in a namespace."""
    return [int(pid) for pid in ip("netns", "pids", namespace).split()]


def namespaces(tag: str) -> list[str]:
    """Those of a tag."""
    listed = json.loads(ip("-json", "netns", "list") or "[]")
    return sorted(entry["name"] for entry in listed if entry["name"].startswith(f"{tag}-"))


def remove(tag: str) -> None:
    """Kills what runs in the namespaces of a tag, and removes them."""
    for namespace in namespaces(tag):
        deadline = time.monotonic() + END_S
        while left := pids(namespace):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline, f"{namespace}: {left} do not end"
            time.sleep(0.01)  # poll interval
        ip("netns", "del", namespace)


class Cleaner:
    """Removes the namespaces of a tag, and directories, at `end` or when this process dies."""

    def __init__(self, tag: str, *directories: Path) -> None:
        argv = [sys.executable, "-m", "lab.namespaces", tag, *map(str, directories)]
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[1],
            start_new_session=True,
        )

    def end(self) -> None:
        """Returns when they are gone."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(2 * END_S) == 0


def main() -> int:
    """The cleaner."""
    tag, *directories = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    remove(tag)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
