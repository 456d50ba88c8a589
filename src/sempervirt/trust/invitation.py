"""An invitation (join token): a certificate with its key, good for one host, once, for a while.

    "semper1." + base64url of a JSON object, without padding

    {"host": "b", "inviter": "a", "address": "10.0.0.1:7443", "expires": 1795384877.0,
     "authority": base64 DER, "certificate": base64 DER, "key": base64, 32 bytes}

The digit in "semper1." is the version. Whoever has the text can join as that host: it is a secret
until it was used or has expired. The cluster keeps only the SHA-256 of the certificate. Since it
brings the authority's certificate, the joining host knows whom it speaks to from the first byte,
and since it shows a certificate itself, no port has to be open to strangers.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sempervirt.core.errors import InvalidRequest
from sempervirt.trust.authority import Authority, Issued
from sempervirt.trust.identity import host_context
from sempervirt.trust.keyfiles import MALFORMED, write_private, write_public

PREFIX = "semper1."
_KEY_BYTES = 32


@dataclass(frozen=True)
class Invitation:
    """The content of a token. `inviter` is the name of the host that listens at `address`."""

    host: str
    inviter: str
    address: str
    expires: float
    authority: x509.Certificate
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def text(self) -> str:
        """The token."""
        number = self.key.private_numbers().private_value
        content = {
            "host": self.host,
            "inviter": self.inviter,
            "address": self.address,
            "expires": self.expires,
            "authority": _b64(self.authority.public_bytes(serialization.Encoding.DER)),
            "certificate": _b64(self.certificate.public_bytes(serialization.Encoding.DER)),
            "key": _b64(number.to_bytes(_KEY_BYTES)),
        }
        packed = json.dumps(content, separators=(",", ":")).encode()
        return PREFIX + base64.urlsafe_b64encode(packed).decode().rstrip("=")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate: what the cluster keeps of an invitation."""
        return Issued(self.certificate).fingerprint

    def client_context(self) -> ssl.SSLContext:
        """For joining. The key touches a file of our own for a moment: ssl wants one."""
        context = host_context()
        context.load_verify_locations(cadata=Issued(self.authority).pem)
        memory = Path("/dev/shm")
        where = memory if os.access(memory, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="semper-", dir=where) as directory:
            key, certificate = Path(directory) / "key", Path(directory) / "crt"
            write_private(key, self.key)
            write_public(certificate, Issued(self.certificate).pem)
            context.load_cert_chain(certificate, key)
        return context


def invite(
    authority: Authority,
    doors: Authority,
    host: str,
    inviter: str,
    address: str,
    *,
    valid: timedelta,
    now: datetime | None = None,
) -> Invitation:
    """A new one: signed by the `doors`, for one who then trusts the `authority`."""
    now = now or datetime.now(UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    issued = doors.issue_invitation(key.public_key(), host, valid, now)
    return Invitation(
        host=host,
        inviter=inviter,
        address=address,
        expires=issued.not_after,
        authority=authority.certificate,
        certificate=issued.certificate,
        key=key,
    )


def parse_invitation(text: str) -> Invitation:
    """The invitation in a token. Raises InvalidRequest."""
    text = "".join(text.split())
    if not text.startswith(PREFIX):
        raise InvalidRequest(
            f'this is no join token: it does not begin with "{PREFIX}"',
            remedy="make one on the first host: semper host add NAME",
        )
    packed = text.removeprefix(PREFIX)
    try:
        content = json.loads(base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)))
        number = int.from_bytes(base64.b64decode(content["key"]))
        return Invitation(
            host=str(content["host"]),
            inviter=str(content["inviter"]),
            address=str(content["address"]),
            expires=float(content["expires"]),
            authority=x509.load_der_x509_certificate(base64.b64decode(content["authority"])),
            certificate=x509.load_der_x509_certificate(base64.b64decode(content["certificate"])),
            key=ec.derive_private_key(number, ec.SECP256R1()),
        )
    except (*MALFORMED, KeyError) as error:
        raise InvalidRequest(
            "this join token is damaged", remedy="copy it whole; it is one long word"
        ) from error


def _b64(content: bytes) -> str:
    return base64.b64encode(content).decode()
