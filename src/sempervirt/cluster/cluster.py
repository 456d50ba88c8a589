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
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import TypeAdapter

from sempervirt.core.errors import InvalidRequest, NotAllowed, NotFound, StateConflict, Unavailable
from sempervirt.core.names import check_name, suggest
from sempervirt.host.places import Places
from sempervirt.host.records import (
    RecordDamaged,
    make_directory,
    read_record,
    write_record,
)
from sempervirt.store.etcd import Credentials, EtcdStore
from sempervirt.store.etcd_rights import (
    ROOT_USER,
    admit_host,
    dismiss_host,
    divide,
    new_credentials,
    secure,
)
from sempervirt.store.guarded import GuardedStore
from sempervirt.store.port import Delete, Put, Snapshot, Store, Write
from sempervirt.store.records import (
    Certificate,
    ClusterLevel,
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

HOSTS, REVOKED, LIST_KEY, ALIVE = "hosts/", "revoked/", "lists/hosts", "alive/"
OPERATORS, LEVEL_KEY = "operators/", "cluster/level"
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
        state = await self.store.read(HOSTS, ALIVE, REVOKED)
        present = {presence.host: presence for presence in _present(state)}
        return [
            Member(host, present.get(host.name), REVOKED + host.serial in state.entries)
            for host in _values(Host, state, HOSTS)
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
        key = f"tokens/{host}"
        state = await self.store.read(key)
        await self.store.commit([Put(key, token.text())], expect={key: state.revision_of(key)})
        return invitation

    async def admit(
        self, peer: Peer, request: str, address: str, level: int
    ) -> tuple[Issued, Credentials]:
        """The certificate for a host that shows an invitation, which is used up by it, and who the
        host is to the store: nobody, if the store has no users.

        Raises NotAllowed for an invitation that was used, withdrawn or has expired, StateConflict
        for a host whose release does not know the cluster's `level`.
        """
        if peer.holder is not Holder.INVITATION:
            raise NotAllowed("only an invitation asks for a certificate")
        authority = Authority.load(self.identity.directory)
        requested_key(request)
        key = f"tokens/{peer.name}"
        state = await self.store.read(key, HOSTS + peer.name, REVOKED, LIST_KEY, LEVEL_KEY)
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
        if (needed := level_of(state)) > level:
            raise StateConflict(
                f"the cluster's level is {needed}, and the release of {peer.name} knows {level}",
                remedy=f"install a newer release on {peer.name}, then join with the same token",
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
        key = HOSTS + peer.name
        state = await self.store.read(key, REVOKED + peer.serial)
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
        key, own = HOSTS + self.settings.host, self.identity.certificate
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
        return store.etcd if isinstance(store, GuardedStore) and store.etcd.credentials else None

    @property
    def doors(self) -> str:
        """The certificate of the doors' authority (PEM), where the authority is."""
        return Issued(
            Authority.doors(self.identity.directory, self.settings.cluster).certificate
        ).pem

    def client_context(self) -> ssl.SSLContext:
        """For asking other hosts. Raises StateConflict, Unavailable."""
        kept = _remembered.get(self.config.cluster_file)
        return self.identity.client_context() if kept is None else kept.client

    @property
    def wire_trust(self) -> Path:
        """Where the programs of a move find this host's pair and its authority."""
        kept = self.config.cluster_file in _remembered
        return self.config.wire_trust_dir if kept else self.identity.directory

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
        state = await self.store.read(HOSTS, f"tokens/{host}", REVOKED, LIST_KEY)
        known = {entry.name: entry for entry in _values(Host, state, HOSTS)}
        if host not in known:
            raise NotFound(f"there is no host {host}", remedy=suggest(host, known))
        writes: list[Write] = _revocations(known[host], reason)
        if f"tokens/{host}" in state.entries:
            writes.append(Delete(f"tokens/{host}"))
        writes += self._listed(Authority.load(self.identity.directory), state, writes)
        # Not if a certificate is renewed in between: it would not be among those.
        seen = {HOSTS + host: state.revision_of(HOSTS + host), **_expected(state, writes)}
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

    May be repeated after Unavailable, also with other addresses: what was made stays, for the
    certificates may serve for etcd itself. The settings are written last, when the store has the
    host's entry: before, this host belongs to no cluster.
    """
    _check(host)
    for endpoint in store:
        check_endpoint(endpoint)
    present = read_settings(config)
    valid_s = host_valid.total_seconds()
    settings = Settings(cluster, host, check_address(address), tuple(store), valid_s, etcd_files)
    if present is not None and present != settings:
        raise StateConflict(
            f"this host belongs to the cluster {present.cluster} as {present.host} already",
            remedy=f"see {config.cluster_file}",
        )
    identity = Identity(config.trust_dir)
    again = present is None and Authority.is_in(config.trust_dir)
    if present is None:
        authority = Authority.begun(config.trust_dir, cluster)
        asked = KeyRequest.made(host)
        issued = authority.issue_host(asked.text, host, address, valid=host_valid)
        identity.keep(asked, issued.pem, Issued(authority.certificate).pem)
        identity.keep_list(authority.revocation_list([]))
        Authority.doors(config.trust_dir, cluster)
        if _is_secure(store) and not trust_hosts and read_credentials(config) is None:
            write_credentials(config, new_credentials(ROOT_USER))
    lend(identity, settings)
    own = identity.certificate
    assert own is not None
    opened = open_store(config, settings)
    try:
        users = isinstance(opened, GuardedStore) and opened.etcd.credentials is not None
        if isinstance(opened, GuardedStore) and users:
            await secure(opened.etcd)
        state = await opened.read(HOSTS, REVOKED)
        if isinstance(opened, GuardedStore) and users:
            known = {entry.name for entry in _values(Host, state, HOSTS)}
            await divide(opened.etcd, known - {host})
        # Again: with the same authority, of which the store has an earlier certificate.
        if again or HOSTS + host not in state.entries:
            writes = _registration(state, host, address, own, authority=True)
            await opened.commit(writes, expect=_expected(state, writes))
    finally:
        await opened.close()
    if present is None:
        write_settings(config, settings)
    return own


def lend(identity: Identity, settings: Settings) -> None:
    """Copies what this host's etcd needs to where the settings say, if they do. Raises
    Unavailable.
    """
    if settings.etcd_files:
        identity.lend(Path(settings.etcd_files))


@dataclass(frozen=True)
class Remembered:
    """What a connection takes of this host's files. `stamp` changes when the files do."""

    stamp: Hashable
    settings: Settings
    client: ssl.SSLContext
    store: ssl.SSLContext | None
    credentials: Credentials | None


# Of an agent that takes part in its cluster, by where the settings are.
_remembered: dict[Path, Remembered] = {}


def remember(config: Places) -> None:
    """Keeps in memory what a connection takes of this host's files: from now on none is read for
    one, and on a host that dies a disk that hangs holds nobody. To be repeated, for files that
    others change. Raises SempervirtError; what was remembered stays then.

    The programs of a move read the pair themselves: they have a copy in the run directory, which is
    memory where the system's own is.
    """
    files = (config.cluster_file, config.trust_dir / CREDENTIALS_FILE)
    identity = Identity(config.trust_dir)
    stamp = identity.stamp(), tuple(_stamp(path) for path in files)
    kept = _remembered.get(config.cluster_file)
    if kept is not None and kept.stamp == stamp:
        return
    settings = _read_settings(config)
    if settings is None:
        forget(config)
        return
    try:
        make_directory(config.wire_trust_dir, 0o700)
    except OSError as error:
        raise Unavailable(f"{config.wire_trust_dir} cannot be made: {error.strerror}") from error
    identity.lend(config.wire_trust_dir)
    _remembered[config.cluster_file] = Remembered(
        stamp,
        settings,
        identity.client_context(),
        identity.store_context() if _is_secure(settings.store) else None,
        read_credentials(config),
    )


def forget(config: Places) -> None:
    """The files are read again."""
    _remembered.pop(config.cluster_file, None)


def _stamp(path: Path) -> Hashable:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def read_settings(config: Places) -> Settings | None:
    """This host's settings, None when it belongs to no cluster. Raises RecordDamaged."""
    kept = _remembered.get(config.cluster_file)
    return _read_settings(config) if kept is None else kept.settings


def _read_settings(config: Places) -> Settings | None:
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
    forget(config)
    write_record(config.cluster_file, VERSION, asdict(settings), durable=True)


def open_store(config: Places, settings: Settings) -> Store:
    """The store; etcd behind https is shown this host's certificate. Raises Unavailable."""
    if not settings.store:
        return SqliteStore.open(config.state_dir / "store.db")
    kept = _remembered.get(config.cluster_file)
    if kept is not None and kept.settings == settings:
        tls, credentials = kept.store, kept.credentials
    else:
        tls = Identity(config.trust_dir).store_context() if _is_secure(settings.store) else None
        credentials = read_credentials(config)
    etcd = EtcdStore(settings.store, tls=tls, credentials=credentials)
    return etcd if tls is None and credentials is None else GuardedStore(etcd)


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
    forget(config)
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


def check_endpoint(endpoint: str) -> str:
    """`endpoint`, if it is the URL of a member of etcd. Raises InvalidRequest."""
    scheme, separator, address = endpoint.partition("://")
    if not separator or scheme not in ("http", "https"):
        raise InvalidRequest(
            f'the store\'s address "{endpoint}" does not say how it is spoken to',
            remedy=f"write http://{address or endpoint}, or https:// for an etcd with certificates",
        )
    try:
        check_address(address.rstrip("/"))
    except InvalidRequest as error:
        raise InvalidRequest(
            f'"{endpoint}" is no address of a store',
            remedy="write the URL of a member of etcd, for example http://10.0.0.1:2379",
        ) from error
    return endpoint


def _check(host: str) -> None:
    try:
        check_name(host)
    except ValueError as error:
        raise InvalidRequest.of(error) from error


def level_of(state: Snapshot) -> int:
    """The cluster's level (`cluster.level`), of what was read. Raises RecordDamaged."""
    entry = state.entries.get(LEVEL_KEY)
    return parse(ClusterLevel, LEVEL_KEY, entry.value).level if entry is not None else 1


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
    writes: list[Write] = [Put(HOSTS + name, host.text())]
    earlier = state.entries.get(HOSTS + name)
    if earlier is not None:
        was = parse(Host, HOSTS + name, earlier.value)
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


def _present(state: Snapshot) -> list[Presence]:
    """Who is alive, by the keys: a host writes its own entry and nobody else's. One that says what
    cannot be read, or another host's name, is alive and gets no VM; the others are as they are.
    """
    found = []
    for key, entry in state.entries.items():
        if not key.startswith(ALIVE):
            continue
        name, why = key.removeprefix(ALIVE), "it says that it is another host"
        try:
            presence = parse(Presence, key, entry.value)
        except RecordDamaged as error:
            presence, why = None, error.message
        if presence is None or presence.host != name:
            presence = Presence(host=name, boot_id="", pid=0, since=0.0, out_of_service=why)
        found.append(presence)
    return found


def _values(kind: type[ValueT], state: Snapshot, prefix: str) -> list[ValueT]:
    found = ((key, entry) for key, entry in state.entries.items() if key.startswith(prefix))
    return [parse(kind, key, entry.value) for key, entry in found]
