"""The certificate authority of a cluster: issues what hosts and invitations show to each other.

Keys are ECDSA on P-256. What a certificate stands for is a URI among its alternative names:

    urn:sempervirt:host:NAME         a host
    urn:sempervirt:invitation:NAME   may ask for the certificate of host NAME, and nothing else
    urn:sempervirt:operator:NAME     a person, who may do what the store says of that person

The other names in a host's certificate are addresses, which whoever invites the host has vouched
for: etcd is found by them, and no host is. A host may be called as another's address is.

There are two authorities. The one of the hosts is trusted by hosts and by etcd. The one of the
doors signs invitations and operators, and only the agents' servers trust it: what it signs opens no
store.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sempervirt.core.errors import InvalidRequest, StateConflict, Unavailable
from sempervirt.trust.keyfiles import (
    MALFORMED,
    read_certificate,
    read_private,
    write_private,
    write_public,
)

KEY_FILE, CERTIFICATE_FILE = "authority.key", "authority.crt"
DOORS_KEY_FILE, DOORS_FILE = "doors.key", "doors.crt"
DOORS = "doors"
AUTHORITY_DAYS = 3650
HOST_VALID = timedelta(days=7)
# Clocks of hosts differ.
EARLY = timedelta(minutes=5)

_PEM = serialization.Encoding.PEM

HOST_URI = "urn:sempervirt:host:"
INVITATION_URI = "urn:sempervirt:invitation:"
OPERATOR_URI = "urn:sempervirt:operator:"


@dataclass(frozen=True)
class Issued:
    """A certificate. `serial` is hexadecimal, `not_after` in seconds since the epoch."""

    certificate: x509.Certificate

    @property
    def pem(self) -> str:
        """The certificate as text (PEM)."""
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def serial(self) -> str:
        """The serial number in hexadecimal, as the other end of a connection sees it."""
        return serial_text(self.certificate.serial_number)

    @property
    def not_before(self) -> float:
        """When the certificate begins, in seconds since the epoch."""
        return self.certificate.not_valid_before_utc.timestamp()

    @property
    def not_after(self) -> float:
        """When the certificate ends, in seconds since the epoch."""
        return self.certificate.not_valid_after_utc.timestamp()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, in hexadecimal."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()


class Authority:
    """A certificate authority. Made by `create`, or `load`."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self.certificate = certificate

    @classmethod
    def create(cls, directory: Path, cluster: str, now: datetime | None = None) -> Authority:
        """Makes an authority in `directory`. Raises StateConflict when one is there."""
        if (directory / KEY_FILE).exists():
            raise StateConflict(f"there is an authority in {directory} already")
        made = cls._make(_authority_name(cluster, doors=False), now)
        write_public(directory / CERTIFICATE_FILE, Issued(made.certificate).pem)
        write_private(directory / KEY_FILE, made._key)
        return made

    @staticmethod
    def is_in(directory: Path) -> bool:
        """Whether an authority was made in `directory`."""
        return (directory / KEY_FILE).exists()

    @classmethod
    def begun(cls, directory: Path, cluster: str) -> Authority:
        """The authority of a cluster that is begun: an earlier attempt may have made it.

        Raises StateConflict when the one that is there was made for another name.
        """
        if not cls.is_in(directory):
            return cls.create(directory, cluster)
        there = cls.load(directory)
        if there.certificate.subject != _authority_name(cluster, doors=False):
            raise StateConflict(
                f"there is an authority in {directory} already, of a cluster with another name",
                remedy=f"give the name of that cluster, or, if the authority was never in force, "
                f"remove {directory}",
            )
        return there

    @classmethod
    def _make(cls, name: x509.Name, now: datetime | None) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        now = now or datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - EARLY)
            .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate)

    @classmethod
    def doors(cls, directory: Path, cluster: str) -> Authority:
        """The authority of the doors, beside that of the hosts; made if there is none yet.

        Raises StateConflict where there is no authority, Unavailable.
        """
        cls.load(directory)
        key = read_private(directory / DOORS_KEY_FILE)
        if key is None:
            made = cls._make(_authority_name(cluster, doors=True), None)
            write_public(directory / DOORS_FILE, Issued(made.certificate).pem)
            write_private(directory / DOORS_KEY_FILE, made._key)
            return made
        certificate = read_certificate(directory / DOORS_FILE)
        if certificate is None:
            raise Unavailable(
                f"{directory / DOORS_FILE} is gone", remedy="restore it from a backup"
            )
        return cls(key, certificate)

    @classmethod
    def load(cls, directory: Path) -> Authority:
        """Reads the authority in `directory`. Raises StateConflict when there is none."""
        key = read_private(directory / KEY_FILE)
        if key is None:
            raise StateConflict(
                "the authority of this cluster is not on this host",
                remedy="use the host on which semper host init was run",
            )
        certificate = read_certificate(directory / CERTIFICATE_FILE)
        if certificate is None:
            raise Unavailable(
                f"the certificate of the authority, {directory / CERTIFICATE_FILE}, is gone",
                remedy="restore it from a backup",
            )
        return cls(key, certificate)

    def issue_host(
        self,
        request: str,
        host: str,
        address: str = "",
        *,
        valid: timedelta = HOST_VALID,
        now: datetime | None = None,
    ) -> Issued:
        """The certificate of a host. Of the request (PEM) nothing but its key counts. `address`,
        "HOST:PORT", is what the certificate is to name beside the host; "": nothing.

        Raises InvalidRequest for a request that its sender cannot have signed.
        """
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(HOST_URI + host)]
        if (place := address_name(address)) is not None:
            names.append(place)
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        return self._issue(requested_key(request), f"host {host}", names, usage, valid, now)

    def issue_invitation(
        self, key: ec.EllipticCurvePublicKey, host: str, valid: timedelta, now: datetime
    ) -> Issued:
        """The certificate of an invitation for `host`; see `invitation`."""
        names = [x509.UniformResourceIdentifier(INVITATION_URI + host)]
        usage = [ExtendedKeyUsageOID.CLIENT_AUTH]
        return self._issue(key, f"invitation {host}", names, usage, valid, now)

    def issue_operator(
        self, key: ec.EllipticCurvePublicKey, name: str, valid: timedelta, now: datetime | None
    ) -> Issued:
        """The certificate of an operator."""
        names = [x509.UniformResourceIdentifier(OPERATOR_URI + name)]
        usage = [ExtendedKeyUsageOID.CLIENT_AUTH]
        return self._issue(key, f"operator {name}", names, usage, valid, now)

    def revocation_list(self, serials: Iterable[str], now: datetime | None = None) -> str:
        """The serial numbers of certificates that count no more, signed (PEM, RFC 5280)."""
        now = now or datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - EARLY)
            .next_update(now + timedelta(days=AUTHORITY_DAYS))
        )
        for serial in sorted(serials):
            revoked = x509.RevokedCertificateBuilder().serial_number(int(serial, 16))
            builder = builder.add_revoked_certificate(revoked.revocation_date(now).build())
        return builder.sign(self._key, hashes.SHA256()).public_bytes(_PEM).decode()

    def _issue(
        self,
        key: ec.EllipticCurvePublicKey,
        name: str,
        names: list[x509.GeneralName] | list[x509.UniformResourceIdentifier],
        usage: list[x509.ObjectIdentifier],
        valid: timedelta,
        now: datetime | None,
    ) -> Issued:
        now = now or datetime.now(UTC)
        authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return Issued(
            x509.CertificateBuilder()
            # No common name: etcd takes one for a user, and refuses those who have one and a token.
            .subject_name(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, name)]))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - min(EARLY, valid / 10))
            .not_valid_after(now + valid)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .add_extension(authority_id, critical=False)
            .sign(self._key, hashes.SHA256())
        )


def is_of_doors(certificate: x509.Certificate) -> bool:
    """Whether the authority of the doors has signed it, as one of both is known to have done."""
    units = certificate.issuer.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    return [unit.value for unit in units] == [DOORS]


def _authority_name(cluster: str, *, doors: bool) -> x509.Name:
    name = [x509.NameAttribute(NameOID.COMMON_NAME, f"sempervirt {cluster}")]
    if doors:
        name.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, DOORS))
    return x509.Name(name)


def serial_text(serial: int) -> str:
    """A serial number as text."""
    return f"{serial:x}"


def requested_key(request: str) -> ec.EllipticCurvePublicKey:
    """The key of a signing request. Raises InvalidRequest."""
    try:
        parsed = x509.load_pem_x509_csr(request.encode())
        key = parsed.public_key()
        valid = parsed.is_signature_valid
    except MALFORMED as error:
        raise InvalidRequest(f"not a certificate signing request: {error}") from error
    if not valid or not isinstance(key, ec.EllipticCurvePublicKey):
        raise InvalidRequest("the signing request is not signed by its own elliptic-curve key")
    return key


def address_name(address: str) -> x509.GeneralName | None:
    """The host part of "HOST:PORT" as an alternative name: etcd and browsers look for it."""
    host = address.rpartition(":")[0].strip("[]")
    if not host:
        return None
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
