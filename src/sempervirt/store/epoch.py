"""The epoch record: what an image itself knows about who may write it. A file beside the image.

Raw images have no header, and not every file system has extended attributes; a small file
beside the image works wherever the image does. `disk.raw` has `disk.raw.epoch`, 1024 bytes: two
slots of 512, of which the valid one with the greater sequence counts. The other is overwritten
next, so a write that is torn by a crash leaves the earlier record in force.

    offset size  one slot; numbers are little-endian, what is not named is zero
    0      8     magic "SVEPOCH1"
    8      4     version: 1; 2 while layers stand above the image (docs/design/snapshots.md), for
                 which programs that know none refuse it. Zero is never valid; a greater one is
                 refused, not overwritten
    12     4     CRC-32 (IEEE) of the 512 bytes, with these four as zero
    16     8     sequence, from 1; one more with each write, into slot (sequence modulo 2)
    24     8     epoch, from 1 (0: the image was given an id and never claimed); it never shrinks
    32     16    the image's id, random, given once
    48     16    the id of the claim that has this epoch
    64     4     flags; bit 0: released, the holder ended in order
    68     4     length of the holder's name
    72     40    the name of the host that holds it, UTF-8

Who reads, decides and writes holds a POSIX lock on the whole file meanwhile (fcntl F_OFD_SETLKW,
F_WRLCK), opened without following a last symbolic link. A file that is neither empty nor has a
valid slot is damaged: the image is refused. An empty one is a creation that was interrupted.

The rule, the same here and in semper-blkd (docs/design/ownership.md says when it looks): a claim
(epoch E, id C) on image I is admitted by a record (I, e, c) if E > e, and then the record
becomes (I, E, C); or if E = e and C = c. Everything else is stale.
"""

from __future__ import annotations

import fcntl
import os
import struct
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from sempervirt.core.errors import StateConflict, Unavailable
from sempervirt.core.names import NAME_MAX
from sempervirt.host.records import RecordDamaged, RecordNewer, flush_directory, read_file
from sempervirt.store.registry import Claim, StaleClaim

SLOT_BYTES = 512
FILE_BYTES = 2 * SLOT_BYTES
MAGIC = b"SVEPOCH1"
VERSION = 1
LAYERED_VERSION = 2
_SLOT = struct.Struct(f"<8sIIQQ16s16sII{NAME_MAX}s")
_RELEASED = 1


@dataclass(frozen=True)
class EpochRecord:
    """The content of a slot. `image` and `claim` are 32 hexadecimal digits.

    `layered`: the image is not all of the disk, layers stand above it.
    """

    image: str
    sequence: int = 1
    epoch: int = 0
    claim: str = "0" * 32
    holder: str = ""
    released: bool = False
    layered: bool = False


class Admission(Enum):
    """How a record judges a claim."""

    RENEWED = "renewed"  # it is the claim on record
    ADVANCED = "advanced"  # it is newer, and is put on record
    STALE = "stale"


def admit(record: EpochRecord, claim: Claim) -> Admission:
    """The rule of the module."""
    if claim.epoch > record.epoch:
        return Admission.ADVANCED
    if claim.epoch == record.epoch and claim.id == record.claim:
        return Admission.RENEWED
    return Admission.STALE


def encode(record: EpochRecord) -> bytes:
    """A slot."""
    holder = record.holder.encode()

    def packed(checksum: int) -> bytes:
        return _SLOT.pack(
            MAGIC,
            LAYERED_VERSION if record.layered else VERSION,
            checksum,
            record.sequence,
            record.epoch,
            bytes.fromhex(record.image),
            bytes.fromhex(record.claim),
            _RELEASED if record.released else 0,
            len(holder),
            holder,
        ).ljust(SLOT_BYTES, b"\0")

    return packed(zlib.crc32(packed(0)))


def decode(slot: bytes) -> EpochRecord | None:
    """The record in a slot, None if the slot is empty or torn. Raises RecordNewer."""
    if len(slot) != SLOT_BYTES:
        return None
    magic, version, checksum, sequence, epoch, image, claim, flags, length, holder = (
        _SLOT.unpack_from(slot)
    )
    blank = slot[:12] + bytes(4) + slot[16:]
    if magic != MAGIC or zlib.crc32(blank) != checksum or version == 0 or sequence == 0:
        return None
    if version > LAYERED_VERSION:
        raise RecordNewer(
            f"the epoch record has version {version}, this program knows {LAYERED_VERSION}",
            remedy="use the release that wrote it",
        )
    if length > NAME_MAX:
        return None
    return EpochRecord(
        image=image.hex(),
        sequence=sequence,
        epoch=epoch,
        claim=claim.hex(),
        holder=holder[:length].decode(errors="replace"),
        released=bool(flags & _RELEASED),
        layered=version == LAYERED_VERSION,
    )


def record_path(image: Path) -> Path:
    """Where the record of an image stands; links are followed first, so it stands once."""
    resolved = image.resolve()
    return resolved.with_name(resolved.name + ".epoch")


def read_epoch(path: Path) -> EpochRecord | None:
    """The record in the file `path`; None when there is none yet. Raises RecordDamaged."""
    try:
        content = read_file(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path, error) from error
    return _newest(path, content)


def identify(path: Path) -> str:
    """The image's id; it is given one if it has none. Raises RecordDamaged, Unavailable."""
    return present(path).image


def present(path: Path) -> EpochRecord:
    """The record as it is now; the image is given an id if it has none. Raises RecordDamaged,
    Unavailable.
    """
    with _locked(path) as descriptor:
        return _present(path, descriptor)


def advance(path: Path, claim: Claim) -> EpochRecord:
    """Puts a claim on record. Raises StaleClaim, RecordDamaged, Unavailable.

    From its return on no backend with an older claim is admitted. One that serves already is
    not stopped by this: the image's lock keeps it and its successor apart. A record of an image
    that the claim does not name, which came to this path later, is left as it is (StateConflict).
    """
    with _locked(path) as descriptor:
        found = _newest(path, os.pread(descriptor, FILE_BYTES, 0))
        if found is not None and claim.images and found.image not in claim.images:
            raise StateConflict(
                f"{path} is the record of another image than the one that {claim.host} has claimed",
                remedy=f"put the image of VM {claim.vm} and its record back to their places",
            )
        record = _present(path, descriptor)
        match admit(record, claim):
            case Admission.STALE:
                raise StaleClaim(
                    f"{path} is held by {record.holder or 'nobody'} under epoch {record.epoch}; "
                    f"the claim of {claim.host} has epoch {claim.epoch}",
                    remedy="stop what still runs of it here; it must not write",
                )
            case Admission.RENEWED if not record.released:
                _flush(path, descriptor)  # who wrote it may have died before the flush
                return record
            case _:
                return _write(path, descriptor, _held(record, claim))


@contextmanager
def held(path: Path, claim: Claim) -> Iterator[Callable[[Claim], EpochRecord]]:
    """While the record says that the image is `claim`'s, and nobody else can change that; gives
    what puts another claim in its place. Raises StaleClaim, RecordDamaged, Unavailable.
    """
    with _locked(path) as descriptor:
        record = _present(path, descriptor)
        if admit(record, claim) is not Admission.RENEWED:
            raise StaleClaim(
                f"{path} is held by {record.holder or 'nobody'} under epoch {record.epoch}, and by "
                f"{claim.host} under epoch {claim.epoch} no more"
            )
        yield lambda following: _write(path, descriptor, _held(record, following))


def release(path: Path, claim: Claim) -> None:
    """Notes that the holder ended in order. Raises StaleClaim, RecordDamaged, Unavailable."""
    with _locked(path) as descriptor:
        record = _present(path, descriptor)
        if admit(record, claim) is not Admission.RENEWED:
            raise StaleClaim(f"{path} is not held under epoch {claim.epoch} any more")
        _write(path, descriptor, replace(record, released=True))


def _held(record: EpochRecord, claim: Claim) -> EpochRecord:
    return replace(record, epoch=claim.epoch, claim=claim.id, holder=claim.host, released=False)


def _newest(path: Path, content: bytes) -> EpochRecord | None:
    slots = (content[:SLOT_BYTES], content[SLOT_BYTES:FILE_BYTES])
    records = [record for slot in slots if (record := decode(slot)) is not None]
    if records:
        return max(records, key=lambda record: record.sequence)
    if content.strip(b"\0"):
        raise RecordDamaged(
            f"{path} is damaged: it cannot tell who may write the image",
            remedy="make sure that no host uses the image, then remove the file",
        )
    return None


def _present(path: Path, descriptor: int) -> EpochRecord:
    record = _newest(path, os.pread(descriptor, FILE_BYTES, 0))
    if record is None:
        # Whoever makes the file flushes its name before it writes a record.
        flush_directory(path.parent)
        first = EpochRecord(image=uuid.uuid4().hex, sequence=0)
        record = _write(path, descriptor, first)
    return record


def _write(path: Path, descriptor: int, record: EpochRecord) -> EpochRecord:
    record = replace(record, sequence=record.sequence + 1)
    try:
        os.pwrite(descriptor, encode(record), record.sequence % 2 * SLOT_BYTES)
    except OSError as error:
        raise _unusable(path, error) from error
    _flush(path, descriptor)
    return record


def _flush(path: Path, descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise _unusable(path, error) from error


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        # The same structure on every 64-bit Linux: type, whence, padding, start, length, pid.
        everything = struct.pack("hhxxxxqqixxxx", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, everything)
        yield descriptor
    except OSError as error:
        raise _unusable(path, error) from error
    finally:
        os.close(descriptor)


def _unusable(path: Path, error: OSError) -> Unavailable:
    return Unavailable(
        f"cannot use {path}: {error.strerror}",
        remedy="check the directory of the image, its permissions and the space in it",
    )
