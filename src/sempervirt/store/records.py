"""Entries of the store: keys, values, and the version of the values.

    hosts/NAME      Host         who belongs to the cluster, with the certificate it has
    alive/NAME      Presence     under a lease: its agent runs and reaches the store
    tokens/ID       Token        an invitation: used up by joining
    revoked/SERIAL  Revocation   a certificate that counts no more
    lists/hosts     RevocationList   the same certificates as a list that etcd understands
    operators/NAME  Operator     a person, with the certificate and the role that count
    vms/NAME        Ownership    which host may run the VM, under which claim
    images/ID       ImageClaim   the newest epoch of an image, and the VM that it was given for
    proposals/HOST/ID   Proposal     what a host wants changed of the last two (`proposals`)
    rights/divided  Divided      hosts propose, and none writes what is another's
    cluster/level   ClusterLevel what every member knows to read (`cluster.level`); absent: 1

Each value is a JSON object with "version": 1. A reader refuses a version that it does not know;
zero is never written. Revocations stay when their host is removed.

Members may be of several releases. A field that is not known here is kept by whoever changes the
rest. A form that is not known everywhere is not written before the cluster's level says that it is;
nor may a reader count a proposal before that which others refuse (`proposals`): two hosts would be
told that a VM is theirs.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sempervirt.host.records import RecordDamaged, RecordNewer

VERSION = 1
# What this release knows (`cluster.level`).
LEVEL = 2


class Value(BaseModel):
    """The text form of everything that is kept. Fields of a later release are kept as well."""

    model_config = ConfigDict(frozen=True, extra="allow")

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
    renewed, once that is late; "" while all is well. `out_of_service`: why no VM may come there; ""
    while VMs may. `level`: what its release knows. An agent of an earlier release says nothing of
    these.
    """

    host: str
    boot_id: str
    pid: int
    since: float
    certificate: str = ""
    out_of_service: str = ""
    level: int = 1


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


class Divided(Value):
    """That it is there says it."""


class ClusterLevel(Value):
    """See `cluster.level`."""

    level: int = Field(ge=1)


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

    @property
    def is_certain(self) -> bool:
        """Whether nobody but the owner can run it, or come to."""
        return self in (Custody.FREE, Custody.OWNED)


class Ownership(Value):
    """Who may run a VM. The epoch of a FREE one is that of its last claim. `standby` is the host
    that keeps standbys of the VM, "" if none but its owner does; `left` are images that the VM had
    before a standby with copies took over: they lack what was written since.
    """

    vm: str
    custody: Custody
    owner: str = ""
    epoch: int = Field(ge=0)
    claim: str = ""
    images: tuple[str, ...] = ()
    destination: str = ""
    why: str = ""
    standby: str = ""
    left: tuple[str, ...] = ()


class ImageClaim(Value):
    """The newest epoch of an image. `vm` is "" when it was released."""

    image: str
    epoch: int = Field(ge=1)
    claim: str
    vm: str


ValueT = TypeVar("ValueT", bound=Value)


def parse(kind: type[ValueT], key: str, text: str) -> ValueT:
    """The value of an entry. Raises RecordDamaged, RecordNewer."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("version",) and first["type"] == "literal_error":
            raise RecordNewer(
                f"{key} in the store has version {first['input']!r:.40}, this program knows "
                f"{VERSION}",
                remedy="install the release that wrote it; semper host level tells who is behind",
            ) from error
        raise RecordDamaged(
            f"{key} in the store cannot be read: {error.errors()[0]['msg']}",
            remedy="use the release that wrote it",
        ) from error
