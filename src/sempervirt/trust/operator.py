"""The identity of an operator: one PEM file with a key, a certificate, and whom to trust.

    the private key            PKCS #8
    the operator's certificate of the doors' authority
    the hosts' authority       whom the operator believes to be a host

Whoever has the file is that operator until the certificate ends or is revoked.
"""

from __future__ import annotations

import ssl
import stat
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.host.records import read_file
from sempervirt.trust.authority import Authority, Issued
from sempervirt.trust.identity import host_context
from sempervirt.trust.keyfiles import MALFORMED, KeyExposed, private_pem

NO_FILE = "name a file of semper operator add that you may read: --key FILE"


@dataclass(frozen=True)
class OperatorKey:
    """A certificate with its key, as it is handed to a person."""

    issued: Issued
    key: ec.EllipticCurvePrivateKey
    authority: x509.Certificate

    def text(self) -> str:
        """The file."""
        return private_pem(self.key).decode() + self.issued.pem + Issued(self.authority).pem


def make_operator_key(
    authority: Authority,
    doors: Authority,
    name: str,
    valid: timedelta,
    now: datetime | None = None,
) -> OperatorKey:
    """A new one."""
    key = ec.generate_private_key(ec.SECP256R1())
    issued = doors.issue_operator(key.public_key(), name, valid, now)
    return OperatorKey(issued, key, authority.certificate)


@dataclass(frozen=True)
class Life:
    """Of a certificate, in seconds since the epoch."""

    begins: float
    ends: float


def life_of(path: Path) -> Life:
    """Of the certificate in an operator's file. Raises Unavailable, InvalidRequest."""
    try:
        issued = Issued(x509.load_pem_x509_certificate(read_file(path, follow=True)))
    except OSError as error:
        raise Unavailable(f"cannot read {path}: {error.strerror}", remedy=NO_FILE) from error
    except MALFORMED as error:
        raise InvalidRequest(f"{path} is no operator's key: {error}") from error
    return Life(issued.not_before, issued.not_after)


def operator_context(path: Path) -> ssl.SSLContext:
    """For asking a host as the operator whose file is at `path`.

    Raises KeyExposed when others can read the file, Unavailable, InvalidRequest.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        content = read_file(path, follow=True)
    except OSError as error:
        raise Unavailable(f"cannot read {path}: {error.strerror}", remedy=NO_FILE) from error
    if mode & 0o077:
        raise KeyExposed(
            f"the key {path} can be read by others (mode {mode:04o})",
            remedy="who may have read it? If nobody: chmod 600; otherwise have it revoked",
        )
    context = host_context()
    try:
        _, authority = x509.load_pem_x509_certificates(content)
        context.load_cert_chain(path)
        context.load_verify_locations(cadata=Issued(authority).pem)
    except (OSError, *MALFORMED) as error:  # ssl.SSLError is an OSError
        raise InvalidRequest(
            f"{path} is no operator's key: {error}", remedy="make one: semper operator add NAME"
        ) from error
    return context
