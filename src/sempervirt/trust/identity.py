"""The identity of one host: its key, its certificate, and the TLS contexts made from them."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
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
    read_certificate,
    read_private,
    write_private,
    write_public,
)

KEY_FILE, CERTIFICATE_FILE = "host.key", "host.crt"
LIST_FILE = "revoked.crl"


class Identity:
    """The files of one host in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def request(self, host: str) -> str:
        """A signing request for this host's key, which is made if there is none."""
        path = self.directory / KEY_FILE
        key = read_private(path)
        if key is None:
            key = ec.generate_private_key(ec.SECP256R1())
            write_private(path, key)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        signed = (
            x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
        )
        return signed.public_bytes(serialization.Encoding.PEM).decode()

    def keep(self, certificate: str, authority: str, doors: str = "") -> None:
        """Puts the certificate in force, with those of the authorities."""
        write_public(self.directory / AUTHORITY_FILE, authority)
        if doors:
            write_public(self.directory / DOORS_FILE, doors)
        write_public(self.directory / CERTIFICATE_FILE, certificate)

    @property
    def certificate(self) -> Issued | None:
        """This host's own certificate, None when it has none. Raises Unavailable."""
        found = read_certificate(self.directory / CERTIFICATE_FILE)
        return None if found is None else Issued(found)

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
        key = self.directory / KEY_FILE
        if read_private(key) is None or self.certificate is None:
            raise StateConflict(
                "this host has no certificate",
                remedy="begin a cluster: semper host init; or join one: semper host join",
            )
        # OpenSSL opens whatever has the name, and waits for a pipe's writer.
        authority = read_certificate(self.directory / AUTHORITY_FILE)
        if authority is None:
            raise Unavailable(f"{self.directory / AUTHORITY_FILE} is gone", remedy=RESTORE)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_cert_chain(self.directory / CERTIFICATE_FILE, key)
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
    the one that is invited, or of an operator.
    """

    holder: Holder
    name: str
    serial: str
    fingerprint: str


def peer_of(connection: ssl.SSLObject | ssl.SSLSocket) -> Peer | None:
    """The other end; None when it showed nothing that the authority gives out."""
    raw = connection.getpeercert(binary_form=True)
    described: Mapping[str, Any] | None = connection.getpeercert()
    if not raw or not described:
        return None
    issued = Issued(x509.load_der_x509_certificate(raw))
    for kind, name in described.get("subjectAltName", ()):
        for holder in Holder:
            # The authority of the doors gives out no hosts, and the other one nothing else.
            fits = is_of_doors(issued.certificate) is (holder is not Holder.HOST)
            if kind == "URI" and name.startswith(holder.prefix) and fits:
                serial = serial_text(issued.certificate.serial_number)
                return Peer(holder, name.removeprefix(holder.prefix), serial, issued.fingerprint)
    return None
