"""What each host may change in etcd: etcd's own users and roles, one of each for a host.

    root         the host that has the authority: everything
    host:NAME    reads everything below the root of the store, and writes

        alive/NAME        its presence
        proposals/NAME/…  what it wants changed of VMs and images (`proposals`: what counts)

So no host can change who belongs to the cluster, what a token is good for, what an operator may do,
or what is revoked, nor whose a VM of another host is. A user is told by a password that only its
host has: over JSON etcd refuses certificates with a common name, and over gRPC it takes the name
for a user; ours have none.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from sempervirt.core.errors import NotAllowed, StateConflict, Unavailable
from sempervirt.store.etcd import Credentials, EtcdStore
from sempervirt.store.port import Put
from sempervirt.store.proposals import proposer_prefix
from sempervirt.store.records import Divided

ROOT_USER = "root"
# The entry that says that hosts propose: there is no commit without it being there, or not.
DIVIDED = "rights/divided"
# Where hosts of a cluster of an earlier release write themselves, until it is divided.
_SHARED = ("vms/", "images/")
PASSWORD_BYTES = 32
# What etcd says of a user, a role or a right that is there already, or gone already.
_DONE = ("already exists", "not found", "is not granted")


def new_credentials(user: str) -> Credentials:
    """With a password that nobody guesses."""
    return Credentials(user, secrets.token_urlsafe(PASSWORD_BYTES))


def host_user(host: str) -> str:
    """The user that a host is to etcd."""
    return f"host:{host}"


def host_of(user: str) -> str:
    """The host that a user of etcd is."""
    return user.removeprefix("host:")


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


async def divide(store: EtcdStore, hosts: Iterable[str]) -> None:
    """From now on hosts propose, and none of those writes what is another's. May be repeated.

    All agents have to be of a release that proposes: earlier ones claim and move nothing then.
    """
    known = set(hosts)
    for host in known:
        await _grant_proposals(store, host)
    state = await store.read(DIVIDED)
    if DIVIDED not in state.entries:
        await store.commit([Put(DIVIDED, Divided().text())], expect={DIVIDED: 0})
    for host in known:
        for shared in _SHARED:
            gone = {"role": host_user(host), **store.range_of(shared)}
            await _do(store, "role/revoke", gone)


async def admit_host(store: EtcdStore, host: str) -> Credentials:
    """A user for a host, or another password for the one that it had."""
    made = new_credentials(host_user(host))
    user = {"name": made.user, "password": made.password}
    await _do(store, "role/add", {"name": made.user})
    await _grant(store, made.user, "READ", store.range_of(""))
    await _grant(store, made.user, "READWRITE", store.range_of(f"alive/{host}"))
    await _grant_proposals(store, host)
    if DIVIDED not in (await store.read(DIVIDED)).entries:
        for shared in _SHARED:
            await _grant(store, made.user, "READWRITE", store.range_of(shared))
    await _do(store, "user/add", user)
    await _do(store, "user/changepw", user)
    await _do(store, "user/grant", {"user": made.user, "role": made.user})
    return made


async def dismiss_host(store: EtcdStore, host: str) -> None:
    """From now on etcd does nothing for that host."""
    await _do(store, "user/delete", {"name": host_user(host)})
    await _do(store, "role/delete", {"role": host_user(host)})


async def _grant_proposals(store: EtcdStore, host: str) -> None:
    await _grant(store, host_user(host), "READWRITE", store.range_of(proposer_prefix(host)))


async def _grant(store: EtcdStore, role: str, right: str, keys: Mapping[str, str]) -> None:
    await _do(store, "role/grant", {"name": role, "perm": {"permType": right, **keys}})


async def _do(store: EtcdStore, call: str, body: dict[str, Any]) -> None:
    """Changes a user or a role; what is there already, or gone already, is as it should be."""
    try:
        await store.administer(f"auth/{call}", body)
    except (NotAllowed, Unavailable) as error:
        if not any(said in error.message for said in _DONE):
            raise
