"""What is asked of a binary before a disk is entrusted to it."""

from __future__ import annotations

import json

from sempervirt.core.errors import CommandFailed, SempervirtError, Unavailable
from sempervirt.disk.answers import Capabilities
from sempervirt.disk.backend import DiskOptions
from sempervirt.host import process
from sempervirt.host.answers import read_answer

DEADLINE_S = 10.0
_ASKED = "--print-capabilities"


async def check_binary(binary: str, options: DiskOptions) -> None:
    """Runs `binary --print-capabilities`. Raises Unavailable unless `binary` can serve the disk."""
    remedy = "install a working semper-blkd; the disk is served by the present one"
    try:
        done = await process.run([binary, _ASKED], timeout_s=DEADLINE_S)
    except CommandFailed as error:
        raise Unavailable(f"not upgraded: {error.message}", remedy=remedy) from error
    try:
        said = json.loads(done.stdout)
        capabilities = read_answer(Capabilities, said, binary, _ASKED)
    except (ValueError, RecursionError, SempervirtError) as error:
        why = error.message if isinstance(error, SempervirtError) else "that is no JSON"
        raise Unavailable(
            f"not upgraded: {binary} does not say what it can do: {why}", remedy=remedy
        ) from error
    needed = {"blk-file", "session", *(["read-only"] if options.read_only else [])}
    missing = needed - set(capabilities.features)
    if capabilities.type != "block" or missing:
        lacks = ", ".join(sorted(missing)) or "the type block"
        raise Unavailable(f"not upgraded: {binary} lacks {lacks}", remedy=remedy)
