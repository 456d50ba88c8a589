"""What each host may change in etcd: etcd's own users and roles, one of each for a host.

    root         the host that has the authority: everything
    host:NAME    reads everything below the root of the store, and writes

        alive/NAME    its presence
        vms/…         owners of VMs: all, since etcd has no rights that depend on a value
        images/…      epochs of images: the same

So no host can change who belongs to the cluster, what a token is good for, what an operator may do,
or what is revoked. A user is told by a password that only its host has: over JSON etcd refuses
certificates with a common name, and over gRPC it takes the name for a user; ours have none.
"""

from __future__ import annotations

import base64
import secrets
from typing import Any

from sempervirt.core.errors import NotAllowed, StateConflict, Unavailable
from sempervirt.store.etcd import Credentials, EtcdStore

ROOT_USER = "root"
SHARED = ("vms/", "images/")
PASSWORD_BYTES = 32


def new_credentials(user: str) -> Credentials:
    """With a password that nobody guesses."""
    return Credentials(user, secrets.token_urlsafe(PASSWORD_BYTES))


def host_user(host: str) -> str:
    """The user that a host is to etcd."""
    return f"host:{host}"


async def secure(store: EtcdStore) -> None:
    """Has etcd ask for users, of which the store's own is root. Does nothing if it does already.

    Raises StateConflict for an etcd that has keys of others, NotAllowed for one that knows another
    root, Unavailable, OutcomeUnknown: it may be repeated.
    """
    assert store.credentials is not None
    if await store.authenticate():
        return
    if await store.count_others():
        raise StateConflict(
            "etcd has keys that are not of sempervirt, whose users would be locked out",
            remedy="give the cluster an etcd of its own; or leave etcd's users alone, and trust "
            "every host with the whole store: semper host init --trust-hosts",
        )
    password = store.credentials.password
    await _do(store, "role/add", {"name": ROOT_USER})
    await _do(store, "user/add", {"name": ROOT_USER, "password": password})
    await _do(store, "user/changepw", {"name": ROOT_USER, "password": password})
    await _do(store, "user/grant", {"user": ROOT_USER, "role": ROOT_USER})
    await _do(store, "enable", {})


async def admit_host(store: EtcdStore, host: str) -> Credentials:
    """A user for a host, or another password for the one that it had."""
    made = new_credentials(host_user(host))
    user, key = {"name": made.user, "password": made.password}, store.root + f"alive/{host}"
    await _do(store, "role/add", {"name": made.user})
    await _grant(store, made.user, "READ", store.root, prefix=True)
    await _grant(store, made.user, "READWRITE", key, prefix=False)
    for shared in SHARED:
        await _grant(store, made.user, "READWRITE", store.root + shared, prefix=True)
    await _do(store, "user/add", user)
    await _do(store, "user/changepw", user)
    await _do(store, "user/grant", {"user": made.user, "role": made.user})
    return made


async def dismiss_host(store: EtcdStore, host: str) -> None:
    """From now on etcd does nothing for that host."""
    await _do(store, "user/delete", {"name": host_user(host)})
    await _do(store, "role/delete", {"role": host_user(host)})


async def _grant(store: EtcdStore, role: str, right: str, key: str, *, prefix: bool) -> None:
    end = key[:-1] + chr(ord(key[-1]) + 1) if prefix else ""
    perm = {"permType": right, "key": _encoded(key), "range_end": _encoded(end)}
    await _do(store, "role/grant", {"name": role, "perm": perm})


async def _do(store: EtcdStore, call: str, body: dict[str, Any]) -> None:
    """Changes a user or a role; what is there already, or gone already, is as it should be."""
    try:
        await store.administer(f"auth/{call}", body)
    except (NotAllowed, Unavailable) as error:
        if not any(said in error.message for said in ("already exists", "not found")):
            raise


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
