"""Writes stamps over an image, pass after pass, as the VM of one host: a process of its own.

    python writer.py IMAGE EPOCH [lock]

With `lock` it first waits for the image's lock, as semper-blkd does. It says "writing", then
"pass N" after each pass, and "failed NAME" when a write fails, which is its end.

    a stamp: the epoch, the pass, the number of the block; the rest of the block is zero
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import time
from pathlib import Path

from sempervirt.disk.image_lock import ImageLock, try_lock

BLOCK_BYTES = 4096
BLOCKS = 32
STAMP = struct.Struct("<QQQ")


def epochs_of(image: Path) -> set[int]:
    """Whose stamps stand in an image."""
    content = image.read_bytes()
    return {STAMP.unpack_from(content, at)[0] for at in range(0, len(content), BLOCK_BYTES)}


def _say(text: str) -> None:
    os.write(sys.stdout.fileno(), f"{text}\n".encode())


def _main(path: str, epoch: str, *how: str) -> None:
    image = Path(path)
    if "lock" in how:
        while not isinstance(try_lock(image), ImageLock):
            time.sleep(0.01)  # poll interval
    file = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    _say("writing")
    number = 0
    try:
        while True:
            number += 1
            for block in range(BLOCKS):
                stamp = STAMP.pack(int(epoch), number, block).ljust(BLOCK_BYTES, b"\0")
                os.pwrite(file, stamp, block * BLOCK_BYTES)
            os.fdatasync(file)
            _say(f"pass {number}")
    except OSError as error:
        _say(f"failed {errno.errorcode.get(error.errno or 0, '?')}")


if __name__ == "__main__":
    _main(*sys.argv[1:])
