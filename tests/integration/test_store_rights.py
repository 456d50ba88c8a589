"""What a joined host, one that was revoked, and a token can do to the store, past every agent.

The attacks are as they succeeded once, when etcd trusted every certificate of the one authority.
"""

from __future__ import annotations

import asyncio
import ssl
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from lab.etcd import Etcd
from sempervirt.cluster import operators
from sempervirt.cluster.cluster import (
    Cluster,
    begin_cluster,
    open_store,
    read_credentials,
    read_settings,
)
from sempervirt.cluster.joining import join_cluster
from sempervirt.cluster.membership import Membership
from sempervirt.core.errors import (
    InvalidRequest,
    NotAllowed,
    OutcomeUnknown,
    StateConflict,
    Unavailable,
)
from sempervirt.core.roles import Role
from sempervirt.store.etcd import Credentials, EtcdStore
from sempervirt.store.port import Delete, Put, Store, Write
from sempervirt.store.registry import Registry
from sempervirt.trust.authority import Authority
from sempervirt.trust.identity import Identity
from sempervirt.vm.config import AgentConfig
from tests.integration.test_hosts import free_address, served

pytestmark = pytest.mark.timeout(120)
DEADLINE_S = 30.0
HOUR = timedelta(hours=1)


@dataclass
class Lab:
    """Host a, with the authority; host b, which has joined; etcd, which a's certificate serves."""

    a: Cluster
    b: AgentConfig
    etcd: Etcd

    def store_of_b(self) -> Store:
        """The store, as whoever has all files of b reaches it."""
        return store_of(self.b)


def store_of(config: AgentConfig) -> Store:
    """The store, as whoever has all files of a host reaches it."""
    settings = read_settings(config)
    assert settings is not None
    return open_store(config, settings)


@pytest.fixture
def configs(place: Path) -> tuple[AgentConfig, AgentConfig]:
    a, b = (AgentConfig(place / name / "s", place / name / "r") for name in "ab")
    for config in (a, b):
        config.state_dir.mkdir(parents=True)
    return a, b


@pytest.fixture
def etcd(configs: tuple[AgentConfig, AgentConfig]) -> Iterator[Etcd]:
    server = Etcd(configs[0].trust_dir)
    try:
        yield server
    finally:
        server.remove()


@pytest.fixture
async def lab(configs: tuple[AgentConfig, AgentConfig], etcd: Etcd) -> AsyncIterator[Lab]:
    a, b = configs
    address = free_address()
    with pytest.raises(Unavailable, match="etcd does not answer"):
        await begin_cluster(a, "lab", "a", address, [etcd.url])
    await asyncio.to_thread(etcd.start)
    await begin_cluster(a, "lab", "a", address, [etcd.url])
    async with served(a) as first:
        await join_cluster(b, await first.cluster.invite("b", HOUR), free_address())
        yield Lab(first.cluster, b, etcd)


async def write(store: Store, *writes: Write) -> None:
    """Commits, as one who has read what there is, if that may be read."""
    state = await store.read()
    await store.commit(writes, expect={one.key: state.revision_of(one.key) for one in writes})


async def test_a_host_changes_nothing_that_is_anothers(lab: Lab) -> None:
    await operators.add_operator(lab.a, "alice", Role.VIEWER, HOUR)
    await lab.a.invite("c", HOUR)
    store = lab.store_of_b()
    entries = (await store.read()).entries
    mine = {"alive/b", "vms/web", "images/1"}
    for key in (*entries, "revoked/1", "tokens/d", "operators/eve", "hosts/d", "alive/d", "other"):
        if key in mine:
            continue
        with pytest.raises(NotAllowed, match="permission denied"):
            await write(store, Put(key, "{}"))
        with pytest.raises(NotAllowed, match="permission denied"):
            await write(store, Delete(key))
        with pytest.raises(NotAllowed, match="permission denied"):  # hidden beside what it may
            await write(store, Put("vms/web", "{}"), Put(key, "{}"))
    assert (await lab.a.store.read()).entries == entries
    # Negative control: what a host has to do it can, and root can do all of it.
    await Registry(store).claim("web", "b", ["1"])
    await write(lab.a.store, Put("revoked/1", "{}"), Delete("tokens/c"))
    await store.close()


async def test_no_host_gives_itself_or_others_rights(lab: Lab) -> None:
    store = lab.store_of_b()
    assert isinstance(store, EtcdStore)
    await store.read()
    root = {"user": "host:b", "role": "root"}
    for call, body in (
        ("auth/user/grant", root),
        ("auth/user/add", {"name": "eve", "password": "eve"}),
        ("auth/user/delete", {"name": "host:a"}),
        ("auth/user/changepw", {"name": "root", "password": "eve"}),
        ("auth/role/grant", {"name": "host:b", "perm": {"permType": "WRITE", "key": "AA=="}}),
        ("auth/disable", {}),
    ):
        with pytest.raises(NotAllowed, match="permission denied"):
            await store.administer(call, body)
    await store.close()


async def test_who_is_revoked_cannot_take_that_back(lab: Lab) -> None:
    """A revoked host deleted revoked/SERIAL with its certificate, and was answered again."""
    store = lab.store_of_b()
    issued = Identity(lab.b.trust_dir).certificate
    assert issued is not None
    await write(store, Put("vms/web", "{}"))
    await lab.a.revoke("b", "stolen")
    key = f"revoked/{issued.serial}"
    assert key in (await lab.a.store.read()).entries
    again = lab.store_of_b()  # on new connections, which etcd does not take
    # And if it had the certificate of another: who it is, is told by the password.
    credentials = read_credentials(lab.b)
    tls = lab.a.identity.store_context()
    disguised = EtcdStore([lab.etcd.url], tls=tls, credentials=credentials)
    for one, said in (
        (store, "etcd does not (know host:b any more|answer)"),
        (again, "etcd does not answer"),
        (disguised, "etcd does not know host:b any more"),
    ):
        with pytest.raises((NotAllowed, Unavailable), match=said):
            await write(one, Delete(key))
        with pytest.raises((NotAllowed, Unavailable, OutcomeUnknown), match="etcd"):
            await one.commit([Delete(key)], expect={key: 0})
        await one.close()
    assert key in (await lab.a.store.read()).entries
    await lab.a.revoke("b", "again")  # may be repeated
    # It may be taken back, under another password.
    earlier = (lab.b.trust_dir / "store.json").read_text()
    await join_cluster(lab.b, await lab.a.invite("b", HOUR), free_address())
    assert (lab.b.trust_dir / "store.json").read_text() != earlier
    back = lab.store_of_b()
    await write(back, Put("vms/web", "{}"))
    await back.close()


async def test_a_revocation_is_in_force_on_every_host_within_two_seconds(
    lab: Lab, place: Path
) -> None:
    """Also in etcd itself, which looks at the list for each connection."""
    c = AgentConfig(place / "c" / "s", place / "c" / "r")
    c.state_dir.mkdir(parents=True)
    await join_cluster(c, await lab.a.invite("c", HOUR), free_address())
    issued = Identity(lab.b.trust_dir).certificate
    assert issued is not None

    async def refusal() -> str:
        """What etcd says to b, on a new connection and without a password."""
        tls = Identity(lab.b.trust_dir).store_context()
        store = EtcdStore([lab.etcd.url], tls=tls, timeout_s=5)
        with pytest.raises(Unavailable) as caught:
            await store.read()
        await store.close()
        return str(caught.value)

    async with served(c) as third:
        assert "user name is empty" in await refusal()  # TLS was agreed on
        await lab.a.revoke("b", "stolen")
        begun = asyncio.get_running_loop().time()
        async with asyncio.timeout(2):
            while not (  # noqa: ASYNC110
                third.membership.is_revoked(issued.serial) and is_listed(c, issued.serial)
            ):
                await asyncio.sleep(0.01)  # poll interval
        assert "user name is empty" not in await refusal()
        assert asyncio.get_running_loop().time() - begun < 2
    own = store_of(c)
    await own.read()  # the others are as they were
    await own.close()


def is_listed(config: AgentConfig, serial: str) -> bool:
    path = config.trust_dir / "revoked.crl"
    if not path.exists():
        return False
    found = x509.load_pem_x509_crl(path.read_bytes())
    return found.get_revoked_certificate_by_serial_number(int(serial, 16)) is not None


async def test_a_list_that_the_authority_has_not_signed_is_not_kept(lab: Lab, place: Path) -> None:
    other = Authority.create(place / "other", "lab")
    before = (lab.a.identity.directory / "revoked.crl").read_bytes()
    for text in (other.revocation_list(["7"]), "nonsense"):
        with pytest.raises(InvalidRequest, match="list of revoked certificates"):
            lab.a.identity.keep_list(text)
    assert (lab.a.identity.directory / "revoked.crl").read_bytes() == before


async def test_neither_a_token_nor_a_certificate_alone_opens_the_store(lab: Lab) -> None:
    """The certificate in a used token read the whole store, wrote its token back, joined again."""
    invitation = await lab.a.invite("c", HOUR)
    made = await operators.add_operator(lab.a, "eve", Role.ADMIN, HOUR)
    operator = lab.b.state_dir / "eve.pem"
    operator.write_text(made.text())

    def bearing(path: Path) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=lab.a.identity.directory / "authority.crt")
        context.load_cert_chain(path)
        return context

    thief = invitation.client_context()
    thief.sslobject_class = ssl.SSLObject
    for tls in (thief, bearing(operator)):
        store = EtcdStore([lab.etcd.url], tls=tls, timeout_s=5)
        with pytest.raises(Unavailable, match="etcd does not answer"):
            await store.read()
        await store.close()
    host = Identity(lab.b.trust_dir).store_context()
    for credentials in (None, Credentials("root", ""), Credentials("host:a", "x")):
        store = EtcdStore([lab.etcd.url], tls=host, credentials=credentials)
        with pytest.raises((NotAllowed, Unavailable), match=r"user name is empty|does not know"):
            await store.read()
        await store.close()


async def test_the_password_is_its_owners_and_etcd_may_begin_anew(lab: Lab) -> None:
    for directory in (lab.a.identity.directory, lab.b.trust_dir):
        assert stat.S_IMODE((directory / "store.json").stat().st_mode) == 0o600
    async with (
        Cluster.opened(lab.b) as cluster,
        Membership.kept(cluster, lease_s=5) as membership,
    ):
        await asyncio.wait_for(membership.known.wait(), DEADLINE_S)
        # etcd forgets its tokens, and a host gets another by itself.
        await asyncio.to_thread(lab.etcd.kill)
        await asyncio.to_thread(lab.etcd.start)
        await write(lab.a.store, Put("revoked/7", "{}"))
        async with asyncio.timeout(DEADLINE_S), aclosing(lab.a.store.watch("alive/")) as states:
            async for state in states:
                if "alive/b" in state.entries:
                    break
        async with asyncio.timeout(DEADLINE_S):
            while not membership.is_revoked("7"):  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # poll interval


async def test_an_etcd_of_others_is_left_alone(
    configs: tuple[AgentConfig, AgentConfig], etcd: Etcd
) -> None:
    a, _ = configs
    address = free_address()
    with pytest.raises(Unavailable, match="etcd does not answer"):
        await begin_cluster(a, "lab", "a", address, [etcd.url])
    await asyncio.to_thread(etcd.start)
    tls = Identity(a.trust_dir).store_context()
    others = EtcdStore([etcd.url], tls=tls, root="others/")
    await write(others, Put("key", "value"))
    with pytest.raises(StateConflict, match="keys that are not of sempervirt"):
        await begin_cluster(a, "lab", "a", address, [etcd.url])
    assert "key" in (await others.read()).entries
    await write(others, Delete("key"))
    await begin_cluster(a, "lab", "a", address, [etcd.url])
    with pytest.raises(Unavailable, match="user name is empty"):
        await others.read()
    await others.close()
