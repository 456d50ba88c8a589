"""Keys and certificates on disk: keys readable by their owner alone, written once and whole."""

from __future__ import annotations

import os
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


def write_public(path: Path, text: str) -> None:
    """Writes a certificate. Raises Unavailable."""
    _write(path, text.encode(), 0o644)


def read_private(path: Path) -> ec.EllipticCurvePrivateKey | None:
    """The key at `path`, None when there is none. Raises KeyExposed, Unavailable."""
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


def _write(path: Path, content: bytes, mode: int) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        make_directory(path.parent, 0o700)
        scratch.unlink(missing_ok=True)
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        flush_directory(path.parent)
    except OSError as error:
        raise Unavailable(f"cannot write {path}: {error.strerror}") from error
