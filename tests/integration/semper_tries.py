"""Runs `semper` again and again, each time in a process of its own that has all of it imported.

Run by `tries` (below) as a program: each line of stdin is one try, as JSON. A process is forked for
it, so that nothing of a try is left for the next one, and the imports are paid for once.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGEST_S = 120.0
POLL_S = 0.002
FULL = "/dev/full"
# As of an interpreter that cannot write what it still has to.
UNFLUSHED = 120
_CAPABILITIES_V3 = 0x20080522


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> dict[str, str]:
        """The error that was told as JSON. Raises ValueError when anything else was."""
        found: dict[str, str] = json.loads(self.err)["error"]
        return found


@dataclass
class Tries:
    """Runs commands of `semper`, with the directories below `place`."""

    place: Path
    process: subprocess.Popen[str]
    count: int = 0

    def __call__(
        self,
        *words: str,
        variables: Mapping[str, str] | None = None,
        powerless: bool = False,
        full: bool = False,
    ) -> Said:
        """`powerless`: even root is told by a file's mode what it may; `full`: stdout takes
        nothing more.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.count += 1
        with tempfile.TemporaryDirectory() as folder:
            out, err = FULL if full else f"{folder}/out", f"{folder}/err"
            environment = {
                "PATH": os.environ["PATH"], "LANG": "C.UTF-8", "TERM": "dumb", "COLUMNS": "500",
                "SEMPERVIRT_STATE_DIR": f"{self.place}/state",
                "SEMPERVIRT_RUN_DIR": f"{self.place}/run", **(variables or {}),
            }  # fmt: skip
            asked = {"words": words, "environment": environment, "powerless": powerless,
                     "out": out, "err": err, "folder": str(self.place)}  # fmt: skip
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            code = int(self.process.stdout.readline())
            said = "" if full else Path(out).read_text(errors="replace")
            return Said(code, said, Path(err).read_text(errors="replace"))


@contextmanager
def tries(place: Path) -> Iterator[Tries]:
    """For commands that begin in `place`."""
    command = [sys.executable, __file__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Tries(place, process)
    finally:
        process.kill()
        process.wait()


def _import_all() -> None:
    import sempervirt.api.client
    import sempervirt.api.views
    import sempervirt.cli.cluster
    import sempervirt.cli.foreground
    import sempervirt.cli.main
    import sempervirt.disk.tuning.tune
    import sempervirt.qemu.facts  # noqa: F401
    from sempervirt.cli import program

    for noun in program.NOUNS:
        program.load(noun)


def _give_all_capabilities_up() -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0)
    if ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError("capset failed")


def _become(asked: dict[str, Any]) -> int:
    """Is the program; its exit code. What the interpreter would tidy up at its end is left."""
    environment: Mapping[str, str] = asked["environment"]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(asked["folder"])
    kinds = ((os.devnull, os.O_RDONLY), (asked["out"], os.O_WRONLY), (asked["err"], os.O_WRONLY))
    for number, (path, flags) in enumerate(kinds):
        writes = os.O_CREAT if flags == os.O_WRONLY and path != FULL else 0
        os.dup2(os.open(path, flags | writes, 0o600), number)
    if asked["powerless"]:
        _give_all_capabilities_up()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["semper", *asked["words"]]
    sys.stdin = os.fdopen(0)
    sys.stdout = os.fdopen(1, "w")
    from sempervirt.cli import main

    try:
        main.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - a fork must not go on as its parent
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        return UNFLUSHED
    return code


def _ended(pid: int) -> int:
    """The exit code of a try, which is killed when it takes too long."""
    give_up = time.monotonic() + LONGEST_S
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > give_up:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)  # poll interval


def main() -> None:
    """See the module."""
    _import_all()
    gc.freeze()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(_become(json.loads(line)))
        sys.stdout.write(f"{_ended(pid)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
