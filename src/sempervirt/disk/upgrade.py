"""What is asked of a binary before a disk is entrusted to it."""

from __future__ import annotations

import json

from sempervirt.core.errors import CommandFailed, Unavailable
from sempervirt.disk.backend import DiskOptions
from sempervirt.host import process

DEADLINE_S = 10.0


async def check_binary(binary: str, options: DiskOptions) -> None:
    """Runs `binary --print-capabilities`. Raises Unavailable unless it can serve the disk."""
    remedy = "install a working semper-blkd; the disk is served by the present one"
    try:
        done = await process.run([binary, "--print-capabilities"], timeout_s=DEADLINE_S)
        capabilities = json.loads(done.stdout)
        kind, features = capabilities["type"], capabilities["features"]
    except CommandFailed as error:
        raise Unavailable(f"not upgraded: {error.message}", remedy=remedy) from error
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable(
            f"not upgraded: {binary} does not say what it can do", remedy=remedy
        ) from error
    missing = {"blk-file", *(["read-only"] if options.read_only else [])} - set(features)
    if kind != "block" or missing:
        lacks = ", ".join(sorted(missing)) or "the type block"
        raise Unavailable(f"not upgraded: {binary} lacks {lacks}", remedy=remedy)
