"""The identity of one host: its key, its certificate, and the TLS contexts made from them.

    host.pem            the key and its certificate, one file: replaced by one rename
    host.key, host.crt  links to that file, for etcd, which reads both anew for each connection

A directory of an earlier release has the two as files of their own, until an agent settles that.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sempervirt.core.errors import InvalidRequest, StateConflict, Unavailable
from sempervirt.trust.authority import (
    CERTIFICATE_FILE as AUTHORITY_FILE,
)
from sempervirt.trust.authority import DOORS_FILE, Issued, is_of_doors, serial_text
from sempervirt.trust.keyfiles import (
    MALFORMED,
    RESTORE,
    lend_file,
    link_file,
    read_certificate,
    read_pair,
    read_private,
    show,
    write_pair,
    write_public,
)

PAIR_FILE = "host.pem"
# Links to the pair, for etcd; in a state directory of an earlier release the two files themselves.
KEY_FILE, CERTIFICATE_FILE = "host.key", "host.crt"
LIST_FILE = "revoked.crl"
# As OpenSSL calls a certificate of another name (X509_V_ERR_HOSTNAME_MISMATCH, x509_vfy.h).
NOT_THAT_HOST = 62


@dataclass(frozen=True)
class KeyRequest:
    """A new key, which has not left this process, and the request (PEM) to have it signed."""

    key: ec.EllipticCurvePrivateKey
    text: str

    @classmethod
    def made(cls, host: str) -> KeyRequest:
        """A new one for a host."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        signed = (
            x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
        )
        return cls(key, signed.public_bytes(serialization.Encoding.PEM).decode())


class Identity:
    """The files of one host in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def keep(self, asked: KeyRequest, certificate: str, authority: str, doors: str = "") -> None:
        """Puts a pair in force, with the certificates of the authorities. A process that dies in
        here leaves the pair before or this one. Raises Unavailable, InvalidRequest.
        """
        write_public(self.directory / AUTHORITY_FILE, authority)
        if doors:
            write_public(self.directory / DOORS_FILE, doors)
        self.renew(asked, certificate)

    def renew(self, asked: KeyRequest, certificate: str) -> None:
        """As `keep`, with the authorities that are there."""
        try:
            issued = x509.load_pem_x509_certificate(certificate.encode())
            fits = issued.public_key() == asked.key.public_key()
        except MALFORMED as error:
            raise InvalidRequest(f"not a certificate: {error!s:.200}") from error
        if not fits:
            raise InvalidRequest("the certificate is not for the key that it was asked for")
        write_pair(self.directory / PAIR_FILE, asked.key, Issued(issued).pem)
        self._link()

    def settle(self) -> Path:
        """Has key and certificate in one file, as well those of an earlier release, and the names
        that etcd knows lead there. Returns where it is. Raises KeyExposed, Unavailable.
        """
        path = self.directory / PAIR_FILE
        if not path.exists() and (found := self._pair()) is not None:
            write_pair(path, found[0], Issued(found[1]).pem)
        if path.exists():
            self._link()
        return path

    def lend(self, directory: Path) -> None:
        """Copies what an etcd needs that runs as another user into a directory of that user: the
        pair, the authority's certificate and the list of what is revoked. Raises Unavailable.
        """
        for name in (PAIR_FILE, AUTHORITY_FILE, LIST_FILE):
            lend_file(self.directory / name, directory)

    def _link(self) -> None:
        for name in (KEY_FILE, CERTIFICATE_FILE):
            link_file(self.directory / name, PAIR_FILE)

    @property
    def certificate(self) -> Issued | None:
        """This host's own certificate, None when it has none. Raises KeyExposed, Unavailable."""
        found = self._pair()
        return None if found is None else Issued(found[1])

    def stamp(self) -> Hashable:
        """Something else whenever another pair was put in force."""
        try:
            found = (self.directory / PAIR_FILE).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _pair(self) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate] | None:
        found = read_pair(self.directory / PAIR_FILE)
        if found is not None:
            return found
        key = read_private(self.directory / KEY_FILE)
        certificate = read_certificate(self.directory / CERTIFICATE_FILE)
        return None if key is None or certificate is None else (key, certificate)

    def keep_list(self, revocations: str) -> None:
        """Puts a list of revoked certificates (PEM) where this host's etcd looks for it.

        Raises InvalidRequest for one that the hosts' authority has not signed, Unavailable.
        """
        authority = read_certificate(self.directory / AUTHORITY_FILE)
        if authority is None:
            raise Unavailable(f"{self.directory / AUTHORITY_FILE} is gone", remedy=RESTORE)
        key = authority.public_key()
        try:
            signed = x509.load_pem_x509_crl(revocations.encode())
            valid = isinstance(key, ec.EllipticCurvePublicKey) and signed.is_signature_valid(key)
        except MALFORMED as error:
            raise InvalidRequest(f"not a list of revoked certificates: {error}") from error
        if not valid:
            raise InvalidRequest("a list of revoked certificates that the authority has not signed")
        write_public(self.directory / LIST_FILE, revocations)

    def server_context(self) -> ssl.SSLContext:
        """For serving: TLS 1.3, and nobody without a certificate of one of the authorities."""
        context = self._filled(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        context.verify_mode = ssl.CERT_REQUIRED
        doors = read_certificate(self.directory / DOORS_FILE)
        if doors is not None:
            context.load_verify_locations(cadata=Issued(doors).pem)
        return context

    def client_context(self) -> ssl.SSLContext:
        """For asking: the other end has to be the host whose name is given with the request."""
        return self._filled(host_context())

    def store_context(self) -> ssl.SSLContext:
        """For the store, which is no host: it has to show a certificate for its address."""
        return self._filled(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    def _filled(self, context: ssl.SSLContext) -> ssl.SSLContext:
        pair = self._pair()
        if pair is None:
            raise StateConflict(
                "this host has no certificate",
                remedy="begin a cluster: semper host init; or join one: semper host join",
            )
        authority = read_certificate(self.directory / AUTHORITY_FILE)
        if authority is None:
            raise Unavailable(f"{self.directory / AUTHORITY_FILE} is gone", remedy=RESTORE)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            show(context, pair[0], Issued(pair[1]).pem)
            context.load_verify_locations(cadata=Issued(authority).pem)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise Unavailable(
                f"keys and certificates in {self.directory} do not fit together: {error}",
                remedy=RESTORE,
            ) from error
        return context


def host_context() -> ssl.SSLContext:
    """For asking a host: TLS 1.3, and the other end has to be the host that is named with each
    connection. Whom to trust, and what to show, is to be filled in.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The names that TLS itself would compare are addresses, and a host may be called as one.
    context.check_hostname = False
    context.sslobject_class = _HostObject
    context.sslsocket_class = _HostSocket
    return context


class _HostObject(ssl.SSLObject):
    """A connection with the host that is named as the server's name."""

    def do_handshake(self) -> None:
        """Raises SSLCertVerificationError unless the other end is that host."""
        super().do_handshake()
        _require_host(self.getpeercert(), self.server_hostname)


class _HostSocket(ssl.SSLSocket):
    """The same, for a socket that blocks."""

    def do_handshake(self, block: bool = False) -> None:
        """Raises SSLCertVerificationError unless the other end is that host."""
        super().do_handshake(block)
        _require_host(self.getpeercert(), self.server_hostname)


def _require_host(described: Mapping[str, Any] | None, host: str | None) -> None:
    names = [
        name
        for kind, name in (described or {}).get("subjectAltName", ())
        if kind == "URI" and name.startswith(Holder.HOST.prefix)
    ]
    if host is None or names != [Holder.HOST.prefix + host]:
        shown = ", ".join(name.removeprefix(Holder.HOST.prefix) for name in names) or "no host"
        error = ssl.SSLCertVerificationError(f"the certificate is of {shown}, and not of {host}")
        error.verify_code = NOT_THAT_HOST
        error.verify_message = f"its certificate is of {shown}, and not of {host}"
        raise error


class Holder(Enum):
    """What a certificate stands for."""

    HOST = "host"
    INVITATION = "invitation"
    OPERATOR = "operator"

    @property
    def prefix(self) -> str:
        """What its URN begins with."""
        return f"urn:sempervirt:{self.value}:"


@dataclass(frozen=True)
class Peer:
    """The other end of a connection, as its certificate says. `name` is that of a host, also of
    the one that is invited, or of an operator; `ends` is in seconds since the epoch; `address` is
    the one that a host's certificate names for etcd, if any.
    """

    holder: Holder
    name: str
    serial: str
    fingerprint: str
    ends: float = math.inf
    address: str = ""


def peer_of(connection: ssl.SSLObject | ssl.SSLSocket) -> Peer | None:
    """The other end; None when it showed nothing that the authority gives out."""
    raw = connection.getpeercert(binary_form=True)
    described: Mapping[str, Any] | None = connection.getpeercert()
    if not raw or not described:
        return None
    issued = Issued(x509.load_der_x509_certificate(raw))
    found = [
        (holder, name.removeprefix(holder.prefix))
        for kind, name in described.get("subjectAltName", ())
        for holder in Holder
        if kind == "URI" and name.startswith(holder.prefix)
    ]
    if len(found) != 1:
        return None
    holder, name = found[0]
    # The authority of the doors gives out no hosts, and the other one nothing else.
    if is_of_doors(issued.certificate) is (holder is Holder.HOST):
        return None
    serial, address = serial_text(issued.certificate.serial_number), _address(described)
    return Peer(holder, name, serial, issued.fingerprint, issued.not_after, address)


def _address(described: Mapping[str, Any]) -> str:
    for kind, name in described.get("subjectAltName", ()):
        if kind in {"DNS", "IP Address"}:
            return str(name)
    return ""
