"""The cluster that this host belongs to: its settings, its store, its identity.

STATE_DIR/cluster.json   {"version": 1, "cluster": "lab", "host": "a", "address": "10.0.0.1:7443",
                          "store": ["https://10.0.0.1:2379", …] or [],
                          "host_valid_s": how long certificates of hosts are good, in seconds,
                          "etcd_files": a directory for what this host's etcd reads, or ""}
STATE_DIR/trust/         keys and certificates (sempervirt.trust)
STATE_DIR/store.db       the store, where "store" is empty: SQLite, for this host alone
"""

from __future__ import annotations

import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import TypeAdapter

from sempervirt.core.errors import InvalidRequest, NotAllowed, NotFound, StateConflict
from sempervirt.core.names import check_name, suggest
from sempervirt.host.places import Places
from sempervirt.host.records import RecordDamaged, read_record, write_record
from sempervirt.store.etcd import Credentials, EtcdStore
from sempervirt.store.etcd_rights import (
    ROOT_USER,
    admit_host,
    dismiss_host,
    new_credentials,
    secure,
)
from sempervirt.store.port import Delete, Put, Snapshot, Store, Write
from sempervirt.store.records import (
    Certificate,
    Host,
    Presence,
    Revocation,
    RevocationList,
    Token,
    ValueT,
    parse,
)
from sempervirt.store.sqlite import SqliteStore
from sempervirt.trust.authority import HOST_VALID, KEY_FILE, Authority, Issued, requested_key
from sempervirt.trust.identity import Holder, Identity, KeyRequest, Peer
from sempervirt.trust.invitation import Invitation, invite

REVOKED, LIST_KEY = "revoked/", "lists/hosts"
VERSION = 1
PORT = 7443
# Clocks of hosts differ by less; a certificate counts as alive for that much longer.
CLOCKS_S = 86400.0
# One that is renewed as it should be has one; more if answers were lost.
CERTIFICATES_MAX = 16


@dataclass(frozen=True)
class Settings:
    """The content of cluster.json. `store` holds etcd's endpoints; none: SQLite. `host_valid_s` is
    looked at on the host that has the authority. `etcd_files`: an etcd of this host that runs as
    another user finds certificates there, renewed with those of the host.
    """

    cluster: str
    host: str
    address: str
    store: tuple[str, ...] = ()
    host_valid_s: float = HOST_VALID.total_seconds()
    etcd_files: str = ""


_SETTINGS = TypeAdapter(Settings)
_CREDENTIALS = TypeAdapter(Credentials)
CREDENTIALS_FILE = "store.json"


@dataclass(frozen=True)
class Member:
    """A host of the cluster, as `semper host list` shows it."""

    host: Host
    presence: Presence | None
    revoked: bool


class Cluster:
    """This host's membership. Made by `opened`, which does not ask the store for anything."""

    def __init__(self, config: Places, settings: Settings, store: Store) -> None:
        self.config = config
        self.settings = settings
        self.store = store
        self.identity = Identity(config.trust_dir)

    @classmethod
    @asynccontextmanager
    async def opened(cls, config: Places) -> AsyncIterator[Cluster]:
        """Raises StateConflict when this host belongs to no cluster."""
        settings = read_settings(config)
        if settings is None:
            raise StateConflict(
                "this host belongs to no cluster",
                remedy="begin one: semper host init NAME; or join one: semper host join",
            )
        store = open_store(config, settings)
        try:
            yield cls(config, settings, store)
        finally:
            await store.close()

    async def members(self) -> list[Member]:
        """All hosts, by name."""
        state = await self.store.read()
        present = {presence.host: presence for presence in _values(Presence, state, "alive/")}
        return [
            Member(host, present.get(host.name), f"revoked/{host.serial}" in state.entries)
            for host in _values(Host, state, "hosts/")
        ]

    async def invite(
        self, host: str, valid: timedelta, now: datetime | None = None, *, names: str = ""
    ) -> Invitation:
        """An invitation for a host, which may be one that joins again. Earlier ones end. `names`,
        "HOST:PORT", is an address for the host's certificate, for an etcd that it shows it for.

        Raises InvalidRequest, StateConflict where there is no authority or no shared store.
        """
        _check(host)
        if host == self.settings.host:
            raise InvalidRequest(f"{host} is this host, and belongs to the cluster already")
        if not self.settings.store:
            raise StateConflict(
                "the store of this cluster is a file of this host, which others cannot reach",
                remedy="give it etcd: semper host init NAME --store http://127.0.0.1:2379",
            )
        authority = Authority.load(self.identity.directory)
        doors = Authority.doors(self.identity.directory, self.settings.cluster)
        settings = self.settings
        invitation = invite(
            authority, doors, host, settings.host, settings.address, valid=valid, now=now
        )
        token = Token(
            host=host, fingerprint=invitation.fingerprint, expires=invitation.expires, names=names
        )
        state = await self.store.read("tokens/")
        key = f"tokens/{host}"
        await self.store.commit([Put(key, token.text())], expect={key: state.revision_of(key)})
        return invitation

    async def admit(self, peer: Peer, request: str, address: str) -> tuple[Issued, Credentials]:
        """The certificate for a host that shows an invitation, which is used up by it, and who the
        host is to the store: nobody, if the store has no users.

        Raises NotAllowed for an invitation that was used, withdrawn or has expired.
        """
        if peer.holder is not Holder.INVITATION:
            raise NotAllowed("only an invitation asks for a certificate")
        authority = Authority.load(self.identity.directory)
        requested_key(request)
        state = await self.store.read()
        key = f"tokens/{peer.name}"
        entry = state.entries.get(key)
        token = parse(Token, key, entry.value) if entry else None
        if token is None or token.fingerprint != peer.fingerprint:
            raise NotAllowed(
                f"this join token for {peer.name} was used already, or withdrawn",
                remedy=f"make another one: semper host add {peer.name}",
            )
        if token.expires <= time.time():
            raise NotAllowed(
                f"this join token for {peer.name} has expired",
                remedy=f"make another one: semper host add {peer.name}",
            )
        issued = authority.issue_host(request, peer.name, token.names, valid=self.host_valid)
        writes = [Delete(key), *_registration(state, peer.name, address, issued)]
        writes += self._listed(authority, state, writes)
        await self.store.commit(writes, expect=_expected(state, writes))
        if (guarded := self._guarded_store) is None:
            return issued, Credentials("", "")
        return issued, await admit_host(guarded, peer.name)

    async def renew(self, peer: Peer, request: str) -> Issued:
        """Another certificate for a host that shows one which has not ended.

        Raises NotAllowed for a host that was revoked, or has had too many certificates lately;
        InvalidRequest, StateConflict where there is no authority, Unavailable, OutcomeUnknown: it
        may be asked again.
        """
        if peer.holder is not Holder.HOST:
            raise NotAllowed("only a host has its certificate renewed")
        authority = Authority.load(self.identity.directory)
        requested_key(request)
        state = await self.store.read()
        key = f"hosts/{peer.name}"
        entry = state.entries.get(key)
        host = parse(Host, key, entry.value) if entry else None
        if (
            host is None
            or REVOKED + peer.serial in state.entries
            or peer.serial not in {host.serial, *(was.serial for was in host.earlier)}
        ):
            raise NotAllowed(
                f"this certificate of {peer.name} counts no more, and is not renewed",
                remedy=f"was {peer.name} revoked? To take it back: semper host add {peer.name}",
            )
        alive = _alive(host)
        if len(alive) > CERTIFICATES_MAX:
            raise NotAllowed(
                f"{peer.name} has had {len(alive)} certificates that have not ended yet",
                remedy=f"is that really {peer.name}? If not: semper host revoke {peer.name}",
            )
        issued = authority.issue_host(
            request, peer.name, f"{peer.address}:0" if peer.address else "", valid=self.host_valid
        )
        # Not if the host is revoked in between; `revoke` looks at the host's entry likewise.
        seen = {one: state.revision_of(one) for one in (key, REVOKED + peer.serial)}
        await self.store.commit([Put(key, _renewed(host, issued).text())], expect=seen)
        return issued

    async def enter_own(self) -> None:
        """Tells the store of this host's certificate, where the host has issued it for itself, and
        that the others may ask here. Does nothing if the store knows. Raises StateConflict for a
        change that comes between, Unavailable, OutcomeUnknown, NotAllowed: it may be repeated.
        """
        key, own = f"hosts/{self.settings.host}", self.identity.certificate
        state = await self.store.read(key)
        entry = state.entries.get(key)
        if own is None or entry is None:
            return
        host = parse(Host, key, entry.value)
        renewed = host if host.serial == own.serial else _renewed(host, own)
        renewed = renewed.model_copy(update={"authority": True})
        if renewed != host:
            put = Put(key, renewed.text())
            await self.store.commit([put], expect={key: state.revision_of(key)})

    @property
    def has_authority(self) -> bool:
        """Whether certificates are issued on this host."""
        return (self.identity.directory / KEY_FILE).exists()

    @property
    def host_valid(self) -> timedelta:
        """How long certificates of hosts are good."""
        return timedelta(seconds=self.settings.host_valid_s)

    def _listed(
        self, authority: Authority, state: Snapshot, writes: Sequence[Write]
    ) -> list[Write]:
        """The list of what is revoked, once `writes` are done; nothing if they revoke nothing. This
        host has the list at once, whether or not its agent runs.
        """
        new = {write.key for write in writes if write.key.startswith(REVOKED)}
        if not new:
            return []
        known = {key for key in state.entries if key.startswith(REVOKED)}
        pem = authority.revocation_list(key.removeprefix(REVOKED) for key in known | new)
        self.identity.keep_list(pem)
        lend(self.identity, self.settings)
        return [Put(LIST_KEY, RevocationList(pem=pem).text())]

    @property
    def _guarded_store(self) -> EtcdStore | None:
        """The store, where it has users."""
        store = self.store
        return store if isinstance(store, EtcdStore) and store.credentials is not None else None

    @property
    def doors(self) -> str:
        """The certificate of the doors' authority (PEM), where the authority is."""
        return Issued(
            Authority.doors(self.identity.directory, self.settings.cluster).certificate
        ).pem

    def server_context(self) -> ssl.SSLContext:
        """For serving other hosts, and whom the doors' authority has signed. Raises Unavailable."""
        if self.has_authority:
            _ = self.doors  # made now, if an earlier release began the cluster
        return self.identity.server_context()

    async def revoke(self, host: str, reason: str) -> None:
        """Makes a host a stranger, to the agents and to the store; may be repeated.

        Raises NotFound, InvalidRequest for this host itself, NotAllowed where the authority is not.
        """
        if host == self.settings.host:
            raise InvalidRequest(f"{host} is this host: revoke it from another one")
        state = await self.store.read()
        known = {entry.name: entry for entry in _values(Host, state, "hosts/")}
        if host not in known:
            raise NotFound(f"there is no host {host}", remedy=suggest(host, known))
        writes: list[Write] = _revocations(known[host], reason)
        if f"tokens/{host}" in state.entries:
            writes.append(Delete(f"tokens/{host}"))
        writes += self._listed(Authority.load(self.identity.directory), state, writes)
        # Not if a certificate is renewed in between: it would not be among those.
        seen = {f"hosts/{host}": state.revision_of(f"hosts/{host}"), **_expected(state, writes)}
        await self.store.commit(writes, expect=seen)
        if (guarded := self._guarded_store) is not None:
            await dismiss_host(guarded, host)


async def begin_cluster(
    config: Places,
    cluster: str,
    host: str,
    address: str,
    store: Sequence[str],
    *,
    trust_hosts: bool = False,
    host_valid: timedelta = HOST_VALID,
    etcd_files: str = "",
) -> Issued:
    """Makes the authority, this host's certificate and its entry. Raises StateConflict. An etcd
    behind https has users from then on, unless all hosts are trusted. Certificates of hosts are
    good for `host_valid`.

    May be repeated after Unavailable: what was made stays, and the certificates may serve for
    etcd itself.
    """
    _check(host)
    present = read_settings(config)
    valid_s = host_valid.total_seconds()
    settings = Settings(cluster, host, check_address(address), tuple(store), valid_s, etcd_files)
    if present is not None and present != settings:
        raise StateConflict(
            f"this host belongs to the cluster {present.cluster} as {present.host} already",
            remedy=f"see {config.cluster_file}",
        )
    identity = Identity(config.trust_dir)
    if present is None:
        authority = Authority.create(config.trust_dir, cluster)
        asked = KeyRequest.made(host)
        issued = authority.issue_host(asked.text, host, address, valid=host_valid)
        identity.keep(asked, issued.pem, Issued(authority.certificate).pem)
        identity.keep_list(authority.revocation_list([]))
        Authority.doors(config.trust_dir, cluster)
        if _is_secure(store) and not trust_hosts:
            write_credentials(config, new_credentials(ROOT_USER))
        write_settings(config, settings)
    lend(identity, settings)
    own = identity.certificate
    assert own is not None
    opened = open_store(config, settings)
    try:
        if isinstance(opened, EtcdStore) and opened.credentials is not None:
            await secure(opened)
        state = await opened.read()
        if f"hosts/{host}" not in state.entries:
            writes = _registration(state, host, address, own, authority=True)
            await opened.commit(writes, expect=_expected(state, writes))
    finally:
        await opened.close()
    return own


def lend(identity: Identity, settings: Settings) -> None:
    """Copies what this host's etcd needs to where the settings say, if they do. Raises
    Unavailable.
    """
    if settings.etcd_files:
        identity.lend(Path(settings.etcd_files))


def read_settings(config: Places) -> Settings | None:
    """This host's settings, None when it belongs to no cluster. Raises RecordDamaged."""
    content = read_record(config.cluster_file, VERSION)
    if content is None:
        return None
    try:
        settings = _SETTINGS.validate_python(content)
        check_name(settings.host)
        check_address(settings.address)
    except (ValueError, InvalidRequest) as error:
        raise RecordDamaged(
            f"{config.cluster_file} is damaged: {str(error)[:200]}",
            remedy="restore it from a backup, or join the cluster again: semper host join",
        ) from error
    return settings


def write_settings(config: Places, settings: Settings) -> None:
    """Puts the settings in force."""
    write_record(config.cluster_file, VERSION, asdict(settings), durable=True)


def open_store(config: Places, settings: Settings) -> Store:
    """The store; etcd behind https is shown this host's certificate. Raises Unavailable."""
    if not settings.store:
        return SqliteStore.open(config.state_dir / "store.db")
    tls = Identity(config.trust_dir).store_context() if _is_secure(settings.store) else None
    return EtcdStore(settings.store, tls=tls, credentials=read_credentials(config))


def _is_secure(store: Sequence[str]) -> bool:
    return any(endpoint.startswith("https:") for endpoint in store)


def read_credentials(config: Places) -> Credentials | None:
    """Who this host is to etcd; None where etcd has no users. Raises RecordDamaged."""
    content = read_record(config.trust_dir / CREDENTIALS_FILE, VERSION)
    if content is None:
        return None
    try:
        return _CREDENTIALS.validate_python(content)
    except ValueError as error:
        raise RecordDamaged(
            f"{config.trust_dir / CREDENTIALS_FILE} is damaged",
            remedy="restore it from a backup, or join the cluster again: semper host join",
        ) from error


def write_credentials(config: Places, credentials: Credentials) -> None:
    """Keeps them, readable by their owner alone."""
    path = config.trust_dir / CREDENTIALS_FILE
    write_record(path, VERSION, asdict(credentials), durable=True)


def check_address(address: str) -> str:
    """`address`, if it is "HOST:PORT". Raises InvalidRequest."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536) or (
        ":" in host and not host.startswith("[")
    ):
        raise InvalidRequest(
            f'"{address}" is not an address', remedy=f"write HOST:PORT, for example 10.0.0.1:{PORT}"
        )
    return address


def _check(host: str) -> None:
    try:
        check_name(host)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


def _registration(
    state: Snapshot, name: str, address: str, issued: Issued, *, authority: bool = False
) -> list[Write]:
    """The entry of a host that joins; what it had before counts no more."""
    host = Host(
        name=name,
        address=address,
        serial=issued.serial,
        not_after=issued.not_after,
        joined=time.time(),
        authority=authority,
    )
    writes: list[Write] = [Put(f"hosts/{name}", host.text())]
    earlier = state.entries.get(f"hosts/{name}")
    if earlier is not None:
        was = parse(Host, f"hosts/{name}", earlier.value)
        writes += _revocations(was, "joined again")
    return writes


def _revocations(host: Host, reason: str) -> list[Write]:
    """Of every certificate of a host that has not ended, and of the newest."""
    return [
        Put(
            REVOKED + serial,
            Revocation(serial=serial, host=host.name, time=time.time(), reason=reason).text(),
        )
        for serial in dict.fromkeys([host.serial, *(was.serial for was in _alive(host))])
    ]


def _alive(host: Host) -> list[Certificate]:
    """The earlier certificates of a host that somebody could still believe."""
    return [was for was in host.earlier if was.not_after > time.time() - CLOCKS_S]


def _renewed(host: Host, issued: Issued) -> Host:
    """The entry of a host that has another certificate."""
    before = Certificate(serial=host.serial, not_after=host.not_after)
    changed = {
        "serial": issued.serial,
        "not_after": issued.not_after,
        "earlier": (*_alive(host), before),
    }
    return host.model_copy(update=changed)


def _expected(state: Snapshot, writes: Sequence[Write]) -> dict[str, int]:
    return {write.key: state.revision_of(write.key) for write in writes}


def _values(kind: type[ValueT], state: Snapshot, prefix: str) -> list[ValueT]:
    found = ((key, entry) for key, entry in state.entries.items() if key.startswith(prefix))
    return [parse(kind, key, entry.value) for key, entry in found]
