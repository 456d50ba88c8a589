"""Entries of the store: keys, values, and the version of the values.

    hosts/NAME      Host         who belongs to the cluster, with the certificate it has
    alive/NAME      Presence     under a lease: its agent runs and reaches the store
    tokens/ID       Token        an invitation: used up by joining
    revoked/SERIAL  Revocation   a certificate that counts no more
    lists/hosts     RevocationList   the same certificates as a list that etcd understands
    operators/NAME  Operator     a person, with the certificate and the role that count
    vms/NAME        Ownership    which host may run the VM, under which claim
    images/ID       ImageClaim   the newest epoch of an image, and the VM that it was given for

Each value is a JSON object with "version": 1. A reader refuses a version that it does not know;
zero is never written. Revocations stay when their host is removed.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sempervirt.host.records import RecordDamaged

VERSION = 1


class Value(BaseModel):
    """The text form of everything that is kept."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1] = 1

    def text(self) -> str:
        """The record as the store keeps it: JSON."""
        return self.model_dump_json()


class Certificate(BaseModel):
    """A certificate that a host had before the newest, and that has not ended by itself."""

    serial: str
    not_after: float


class Host(Value):
    """A host of the cluster. `not_after` ends its newest certificate (seconds since the epoch).

    `authority`: it has the authority, and renews the certificates of the others. `earlier` ones
    count until they end, for a host may not have got the newest; a revocation revokes all of them.
    """

    name: str
    address: str = Field(description='where its agent listens, "HOST:PORT"; "" if nowhere')
    serial: str
    not_after: float
    joined: float
    authority: bool = False
    earlier: tuple[Certificate, ...] = ()


class Presence(Value):
    """The agent of a host, alive. `certificate`: what keeps the host's certificate from being
    renewed, once that is late; "" while all is well.
    """

    host: str
    boot_id: str
    pid: int
    since: float
    certificate: str = ""


class Token(Value):
    """An invitation: the certificate of which the SHA-256 is `fingerprint` may join, once."""

    host: str
    fingerprint: str
    expires: float
    names: str = Field(default="", description='an address for its certificate, "HOST:PORT"')


class Operator(Value):
    """A person who may ask agents over TLS. `not_after` ends the certificate."""

    name: str
    role: Literal["admin", "operator", "viewer"]
    serial: str
    not_after: float


class Revocation(Value):
    """A certificate of which the holder is a stranger from now on."""

    serial: str
    host: str
    time: float
    reason: str


class RevocationList(Value):
    """All revoked certificates, signed by the hosts' authority (PEM)."""

    pem: str


class Custody(Enum):
    """What the store knows of the runner of a VM.

    FREE: nobody; a host may claim it. OWNED: its owner alone. MOVING: its owner still, while a
    destination prepares. UNKNOWN: perhaps its owner, perhaps `destination`, perhaps nobody:
    nothing is started before evidence settles it.
    """

    FREE = "free"
    OWNED = "owned"
    MOVING = "moving"
    UNKNOWN = "unknown"


class Ownership(Value):
    """Who may run a VM. The epoch of a FREE one is that of its last claim."""

    vm: str
    custody: Custody
    owner: str = ""
    epoch: int = Field(ge=0)
    claim: str = ""
    images: tuple[str, ...] = ()
    destination: str = ""
    why: str = ""


class ImageClaim(Value):
    """The newest epoch of an image. `vm` is "" when it was released."""

    image: str
    epoch: int = Field(ge=1)
    claim: str
    vm: str


ValueT = TypeVar("ValueT", bound=Value)


def parse(kind: type[ValueT], key: str, text: str) -> ValueT:
    """The value of an entry. Raises RecordDamaged."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise RecordDamaged(
            f"{key} in the store cannot be read: {error.errors()[0]['msg']}",
            remedy="use the release that wrote it",
        ) from error
