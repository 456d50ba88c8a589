"""Keys and certificates on disk: keys readable by their owner alone, written once and whole.

What is renewed is a *pair* in one file, the key first and then its certificate: one rename puts
both in force, so that no death leaves the key of one pair beside the certificate of another.
"""

from __future__ import annotations

import os
import ssl
import stat
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sempervirt.core.errors import SempervirtError, Unavailable
from sempervirt.host.records import flush_directory, make_directory, read_file

RESTORE = "restore it from a backup, or join the cluster again: semper host join"
# What the parser raises for a key, a certificate, a request or a list that is none.
MALFORMED = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


class KeyExposed(SempervirtError):
    """A private key can be read by other users than its owner, so the key is not used."""


def write_private(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Writes a key with mode 0600. Raises Unavailable."""
    _write(path, private_pem(key), 0o600)


def write_pair(path: Path, key: ec.EllipticCurvePrivateKey, certificate: str) -> None:
    """Writes a key and its certificate (PEM) as one file, mode 0600. Raises Unavailable."""
    _write(path, private_pem(key) + certificate.encode(), 0o600)


def write_public(path: Path, text: str) -> None:
    """Writes a certificate. Raises Unavailable."""
    _write(path, text.encode(), 0o644)


def link_file(path: Path, target: str) -> None:
    """Makes `path` a symbolic link to `target`, in one step. Raises Unavailable."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.is_symlink() and str(path.readlink()) == target:
            return
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(target)
        scratch.replace(path)
        flush_directory(path.parent)
    except OSError as error:
        raise Unavailable(f"cannot make {path} a link: {error.strerror}") from error


def read_private(path: Path) -> ec.EllipticCurvePrivateKey | None:
    """The key at `path`, None when there is none. Raises KeyExposed, Unavailable."""
    content = _read_secret(path)
    return None if content is None else _private(path, content)


def read_pair(path: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate] | None:
    """The key and the certificate at `path`, of one moment; None when there are none.

    Raises KeyExposed, Unavailable, also for two that do not belong together.
    """
    content = _read_secret(path)
    if content is None:
        return None
    key = _private(path, content)
    try:
        certificate = x509.load_pem_x509_certificate(content)
        fits = certificate.public_key() == key.public_key()
    except MALFORMED as error:
        raise Unavailable(f"{path} holds no certificate: {error!s:.200}", remedy=RESTORE) from error
    if not fits:
        raise Unavailable(
            f"{path} holds a key and a certificate that do not fit together", remedy=RESTORE
        )
    return key, certificate


def show(context: ssl.SSLContext, key: ec.EllipticCurvePrivateKey, certificate: str) -> None:
    """Has `context` show a certificate (PEM). OpenSSL wants a file, opens it twice, and the name of
    one may mean another file by then: this one has no name. Raises OSError (ssl.SSLError is one).
    """
    descriptor = os.memfd_create("pair", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(private_pem(key) + certificate.encode())
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _read_secret(path: Path) -> bytes | None:
    try:
        mode = path.stat().st_mode
        content = read_file(path, follow=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unavailable(f"cannot read {path}: {error.strerror}") from error
    if stat.S_IMODE(mode) & 0o077:
        raise KeyExposed(
            f"the key {path} can be read by others (mode {stat.S_IMODE(mode):04o})",
            remedy="who may have read it? If nobody: chmod 600; otherwise make new certificates",
        )
    return content


def _private(path: Path, content: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(content, None)
    except MALFORMED as error:
        raise Unavailable(f"{path} holds no key: {error!s:.200}", remedy=RESTORE) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Unavailable(f"{path} holds a key of another kind")
    return key


def read_certificate(path: Path) -> x509.Certificate | None:
    """The certificate at `path`, None when there is none. Raises Unavailable."""
    try:
        return x509.load_pem_x509_certificate(read_file(path, follow=True))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unavailable(f"cannot read {path}: {error.strerror}") from error
    except MALFORMED as error:
        raise Unavailable(f"{path} holds no certificate: {error!s:.200}", remedy=RESTORE) from error


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A key as PKCS #8."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def lend_file(path: Path, directory: Path) -> None:
    """Copies a file into a directory whose owner may read the copy, and nobody else; in one that is
    setgid its group as well. Raises Unavailable; a file that is not there is no error.
    """
    try:
        owner, content = directory.stat(), read_file(path, follow=True)
    except FileNotFoundError as error:
        if Path(error.filename) == path:
            return
        raise Unavailable(f"cannot copy {path} to {directory}: {error.strerror}") from error
    except OSError as error:
        raise Unavailable(f"cannot copy {path} to {directory}: {error.strerror}") from error
    _write(directory / path.name, content, 0o600, owner)


def _give(descriptor: int, owner: os.stat_result) -> None:
    """Gives a file to the owner of its directory; without the capability for that (semperd's unit
    keeps none) to the group, which a file inherits in a directory that is setgid.
    """
    if owner.st_uid == os.geteuid() and not owner.st_mode & stat.S_ISGID:
        return
    try:
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
    except PermissionError:
        if os.fstat(descriptor).st_gid != owner.st_gid:
            raise
        os.fchmod(descriptor, 0o640)
    else:
        if owner.st_mode & stat.S_ISGID:
            os.fchmod(descriptor, 0o640)


def _write(path: Path, content: bytes, mode: int, owner: os.stat_result | None = None) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        make_directory(path.parent, 0o700)
        scratch.unlink(missing_ok=True)
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            if owner is not None:
                _give(file.fileno(), owner)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        flush_directory(path.parent)
    except OSError as error:
        raise Unavailable(f"cannot write {path}: {error.strerror}") from error
