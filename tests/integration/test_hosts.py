"""Hosts that talk: certificates, invitations, strangers; over real sockets, with a real etcd."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from lab.etcd import Etcd
from lab.ports import free_address
from sempervirt.agent.agent import Agent
from sempervirt.api.client import Client
from sempervirt.api.server import serving, serving_hosts
from sempervirt.cluster.cluster import Cluster, begin_cluster, read_settings
from sempervirt.cluster.joining import ask_to_join, join_cluster
from sempervirt.cluster.membership import Membership
from sempervirt.core.errors import (
    AgentUnavailable,
    InvalidRequest,
    NotAllowed,
    NotFound,
    OutcomeUnknown,
    StateConflict,
    Unavailable,
)
from sempervirt.evacuation.values import Reason
from sempervirt.host.http import Connection
from sempervirt.migration.sides import side_of
from sempervirt.qemu.spec import VmSpec
from sempervirt.store import epoch
from sempervirt.store.etcd import EtcdStore
from sempervirt.store.records import LEVEL
from sempervirt.trust.authority import Authority, Issued
from sempervirt.trust.identity import Holder, Identity, KeyRequest, Peer
from sempervirt.trust.invitation import PREFIX, Invitation, parse_invitation
from sempervirt.trust.keyfiles import KeyExposed
from sempervirt.vm.config import AgentConfig

DEADLINE_S = 90.0
HOUR = timedelta(hours=1)


@pytest.fixture
def etcd() -> Iterator[Etcd]:
    with Etcd.running() as server:
        yield server


@dataclass
class Served:
    """A host whose agent serves the others."""

    config: AgentConfig
    agent: Agent
    cluster: Cluster
    membership: Membership

    @property
    def address(self) -> str:
        return self.cluster.settings.address


@asynccontextmanager
async def served(config: AgentConfig) -> AsyncIterator[Served]:
    async with (
        Agent.open(config) as agent,
        Cluster.opened(config) as cluster,
        Membership.kept(cluster, lease_s=5) as membership,
        serving(agent, config.socket),
        serving_hosts(agent, membership),
    ):
        yield Served(config, agent, cluster, membership)


Place = Callable[[str], AgentConfig]


@pytest.fixture
def host_config(place: Path) -> Place:
    return lambda name: AgentConfig(place / name / "s", place / name / "r", image_roots=(place,))


@pytest.fixture
async def first(host_config: Place, etcd: Etcd) -> AsyncIterator[Served]:
    """Host a, which has the authority."""
    config = host_config("a")
    config.state_dir.mkdir(parents=True)
    await begin_cluster(config, "lab", "a", free_address(), [etcd.url])
    async with served(config) as host:
        yield host


async def joined(first: Served, config: AgentConfig, name: str = "b") -> AgentConfig:
    config.state_dir.mkdir(parents=True)
    await join_cluster(config, await first.cluster.invite(name, HOUR), free_address())
    return config


# Joining


async def test_a_host_joins_by_its_token_and_is_known_by_its_certificate(
    first: Served, host_config: Place, etcd: Etcd
) -> None:
    config = host_config("b")
    config.state_dir.mkdir(parents=True)
    token = (await first.cluster.invite("b", HOUR)).text()
    settings = await join_cluster(config, parse_invitation(token), free_address())
    assert (settings.host, settings.cluster, settings.store) == ("b", "lab", (etcd.url,))
    assert read_settings(config) == settings

    issued = Identity(config.trust_dir).certificate
    assert issued is not None
    names = issued.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    urns = names.value.get_values_for_type(x509.UniformResourceIdentifier)
    assert urns == ["urn:sempervirt:host:b"]
    assert len(list(names.value)) == 1  # who joins says where it is, and is not believed
    assert time.time() + 6 * 86400 < issued.not_after < time.time() + 8 * 86400

    async with Client.connect_host(
        first.address, "a", Identity(config.trust_dir).client_context()
    ) as client:
        assert (await client.agent()).pid == os.getpid()

    members = {member.host.name: member for member in await first.cluster.members()}
    assert sorted(members) == ["a", "b"]
    assert members["b"].host.serial == issued.serial
    assert not members["b"].revoked
    assert members["b"].presence is None  # its agent does not run

    async with served(config) as second:
        await wait_presence(second, "b", there=True)
        # Both ways: a asks b.
        async with Client.connect_host(
            second.address, "b", Identity(first.config.trust_dir).client_context()
        ) as client:
            assert (await client.agent()).pid == os.getpid()
    await wait_presence(first, "b", there=False)


# Revocations are in force everywhere within two seconds.
IN_FORCE_S, LOOK_S = 2.0, 0.01


async def in_force(holds: Callable[[], bool]) -> None:
    """Waits for what has to be there within IN_FORCE_S, by a clock that stands still while this
    process gets no processor: all agents that are asked are in it.
    """
    for _ in range(round(IN_FORCE_S / LOOK_S)):
        if holds():
            return
        await asyncio.sleep(LOOK_S)  # poll interval
    raise AssertionError(f"not in force within {IN_FORCE_S:g} s")


async def wait_presence(seen_by: Served, host: str, *, there: bool) -> None:
    async with asyncio.timeout(DEADLINE_S), aclosing(seen_by.cluster.store.watch("alive/")) as all_:
        async for state in all_:
            if (f"alive/{host}" in state.entries) == there:
                return


async def test_secrets_are_in_files_of_their_owner_and_nowhere_else(
    first: Served, host_config: Place
) -> None:
    invitation = await first.cluster.invite("c", HOUR)
    config = await joined(first, host_config("b"))
    for directory in (first.config.trust_dir, config.trust_dir):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        for key in directory.glob("*.key"):
            assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert not (config.trust_dir / "authority.key").exists()
    kept = "".join(entry.value for entry in (await first.cluster.store.read()).entries.values())
    assert invitation.fingerprint in kept
    secret = invitation.text().removeprefix(PREFIX)
    number = invitation.key.private_numbers().private_value
    for form in (secret, secret[40:80], str(number), f"{number:x}", "PRIVATE"):
        assert form not in kept


async def test_a_token_is_good_once(first: Served, host_config: Place) -> None:
    invitation = await first.cluster.invite("b", HOUR)
    configs = [host_config(name) for name in ("b1", "b2", "b3")]
    for config in configs:
        config.state_dir.mkdir(parents=True)
    both = await asyncio.gather(
        *(join_cluster(config, invitation, free_address()) for config in configs[:2]),
        return_exceptions=True,
    )
    refused = [answer for answer in both if isinstance(answer, BaseException)]
    assert len(refused) == 1
    assert isinstance(refused[0], NotAllowed | StateConflict)
    with pytest.raises(NotAllowed, match=r"was used already.*semper host add b"):
        await join_cluster(configs[2], invitation, free_address())
    assert read_settings(configs[2]) is None


async def test_a_later_token_withdraws_the_earlier_one(first: Served, host_config: Place) -> None:
    config = host_config("b")
    config.state_dir.mkdir(parents=True)
    earlier = await first.cluster.invite("b", HOUR)
    later = await first.cluster.invite("b", HOUR)
    with pytest.raises(NotAllowed, match="withdrawn"):
        await join_cluster(config, earlier, free_address())
    await join_cluster(config, later, free_address())


async def test_an_expired_token_is_refused_here_and_there(
    first: Served, host_config: Place
) -> None:
    config = host_config("b")
    config.state_dir.mkdir(parents=True)
    expired = await first.cluster.invite("b", HOUR, now=datetime.now(UTC) - 2 * HOUR)
    with pytest.raises(NotAllowed, match=r"has expired.*on a: semper host add b"):
        await join_cluster(config, expired, free_address())
    # A host with a wrong clock, or a thief, asks all the same.
    assert await whispers(first, expired.client_context(), b"POST /v1/join") == b""
    peer = await admitted(first, expired, config)
    assert isinstance(peer, NotAllowed)
    assert "has expired" in str(peer)


async def admitted(first: Served, invitation: Invitation, config: AgentConfig) -> BaseException:
    """What `admit` itself says, behind TLS."""
    issued = Issued(invitation.certificate)
    peer = Peer(Holder.INVITATION, invitation.host, issued.serial, issued.fingerprint)
    try:
        await first.cluster.admit(peer, KeyRequest.made("b").text, "127.0.0.1:1", LEVEL)
    except NotAllowed as error:
        return error
    raise AssertionError("admitted")


async def test_an_invitation_opens_no_other_door(first: Served) -> None:
    invitation = await first.cluster.invite("b", HOUR)
    async with Client.connect_host(first.address, "a", invitation.client_context()) as client:
        for ask in (client.agent, client.vms, client.disks, client.host):
            with pytest.raises(NotAllowed, match="good for joining"):
                await ask()
    async with Connection.to_host(first.address, "a", invitation.client_context()) as connection:
        with pytest.raises(InvalidRequest, match="not a certificate signing request"):
            await ask_to_join(connection, "nonsense", "127.0.0.1:1")
    # The token was not used up by that.
    assert "tokens/b" in (await first.cluster.store.read("tokens/")).entries


async def test_a_member_cannot_join_in_anothers_name(first: Served, host_config: Place) -> None:
    config = await joined(first, host_config("b"))
    identity = Identity(config.trust_dir)
    async with Connection.to_host(first.address, "a", identity.client_context()) as connection:
        with pytest.raises(NotAllowed, match="join is for: invitation"):
            await ask_to_join(connection, KeyRequest.made("a").text, "127.0.0.1:1")


@pytest.mark.parametrize("text", ["", "nonsense", PREFIX, PREFIX + "AAAA", PREFIX + "e30"])
def test_what_is_no_token_is_said_to_be_none(text: str) -> None:
    with pytest.raises(InvalidRequest, match="join token"):
        parse_invitation(text)


# Strangers


async def whispers(
    first: Served, tls: ssl.SSLContext | None, sent: bytes, name: str = "a"
) -> bytes:
    """Everything that the server says to one who connects so; b"" when it says nothing."""
    host, _, port = first.address.rpartition(":")
    heard = b""
    try:
        async with asyncio.timeout(DEADLINE_S):
            reader, writer = await asyncio.open_connection(
                host, int(port), ssl=tls, server_hostname=name if tls else None
            )
            writer.write(sent + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            while piece := await reader.read(4096):
                heard += piece
    except OSError:
        pass
    return heard


def without_certificate(first: Served) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(first.config.trust_dir / "authority.crt")
    return context


async def test_a_stranger_gets_nothing(first: Served) -> None:
    member = first.cluster.identity.client_context()
    assert b"200 OK" in await whispers(first, member, b"GET /v1/agent")  # who is none
    for path in (b"GET /v1/agent", b"POST /v1/join", b"GET /"):
        assert await whispers(first, without_certificate(first), path) == b""
    plain = await whispers(first, None, b"GET /v1/agent")
    assert b"HTTP" not in plain


async def test_nothing_older_than_tls_1_3_is_spoken(first: Served, host_config: Place) -> None:
    config = await joined(first, host_config("b"))
    present = Identity(config.trust_dir).client_context()
    async with Client.connect_host(first.address, "a", present) as client:
        await client.agent()
    old = Identity(config.trust_dir).client_context()
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(AgentUnavailable):
        async with Client.connect_host(first.address, "a", old) as client:
            await client.agent()


async def test_another_authority_is_nobody(first: Served, place: Path, etcd: Etcd) -> None:
    """Same names, same everything, another authority: refused by the server and by the client."""
    elsewhere = place / "elsewhere"
    other = Authority.create(elsewhere, "lab")
    identity = Identity(elsewhere)
    asked = KeyRequest.made("a")
    issued = other.issue_host(asked.text, "a", first.address)
    identity.keep(asked, issued.pem, (elsewhere / "authority.crt").read_text())
    with pytest.raises(NotAllowed, match="not to be trusted"):
        async with Client.connect_host(first.address, "a", identity.client_context()) as client:
            await client.agent()
    # One who does not care whom it speaks to gets no further.
    careless = identity.client_context()
    careless.sslobject_class = ssl.SSLObject
    careless.check_hostname = False
    careless.verify_mode = ssl.CERT_NONE
    assert await whispers(first, careless, b"GET /v1/agent") == b""
    async with Client.connect_host(first.address, "a", careless) as client:
        with pytest.raises((OutcomeUnknown, AgentUnavailable)):
            await client.agent()


async def test_an_address_that_leads_to_another_host_is_noticed(
    first: Served, host_config: Place
) -> None:
    config = await joined(first, host_config("b"))
    tls = Identity(config.trust_dir).client_context()
    async with Client.connect_host(first.address, "c", tls) as client:
        with pytest.raises(NotAllowed, match="is of a, and not of c"):
            await client.agent()


async def test_a_host_that_says_to_be_where_another_is_called_is_not_that_one(
    first: Served, host_config: Place, etcd: Etcd
) -> None:
    """Its address, `a:7443`, stood in its certificate, so it was `a` to whoever asked for that."""
    config = host_config("b")
    config.state_dir.mkdir(parents=True)
    await join_cluster(config, await first.cluster.invite("b", HOUR), "a:7443")
    liar = Identity(config.trust_dir)
    # And so is one whose certificate does name that, by whomever it was vouched for.
    authority = Authority.load(first.config.trust_dir)
    vouched = Identity(config.state_dir / "vouched")
    asked = KeyRequest.made("b")
    issued = authority.issue_host(asked.text, "b", "a:7443")
    vouched.keep(asked, issued.pem, (first.config.trust_dir / "authority.crt").read_text())
    tls = first.cluster.identity.client_context()
    for identity in (liar, vouched):
        async with AsyncExitStack() as stack:
            listener = await asyncio.start_server(
                answer_as_an_agent, "127.0.0.1", 0, ssl=identity.server_context()
            )
            await stack.enter_async_context(listener)
            port = listener.sockets[0].getsockname()[1]
            async with Client.connect_host(f"127.0.0.1:{port}", "a", tls) as client:
                with pytest.raises(NotAllowed, match="is of b, and not of a"):
                    await client.agent()
            async with Client.connect_host(f"127.0.0.1:{port}", "b", tls) as client:
                assert await client.vms() == []


async def answer_as_an_agent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
    writer.write(head + b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n[]")
    writer.close()


async def test_an_expired_certificate_is_refused(first: Served, place: Path) -> None:
    authority = Authority.load(first.config.trust_dir)
    late = Identity(place / "late")
    asked = KeyRequest.made("b")
    issued = authority.issue_host(
        asked.text, "b", "127.0.0.1:1", now=datetime.now(UTC) - timedelta(days=366)
    )
    late.keep(asked, issued.pem, (first.config.trust_dir / "authority.crt").read_text())
    assert await whispers(first, late.client_context(), b"GET /v1/agent") == b""


async def ask_on(client: Client) -> None:
    """Keeps the connection in use, until something is wrong: both ends close one on which nothing
    was asked for some seconds.
    """
    async with asyncio.timeout(DEADLINE_S):
        while True:
            await client.agent()
            await asyncio.sleep(0.02)  # poll interval


async def test_who_is_revoked_is_a_stranger(first: Served, host_config: Place) -> None:
    config = await joined(first, host_config("b"))
    tls = Identity(config.trust_dir).client_context()
    serial = Identity(config.trust_dir).certificate
    assert serial is not None
    with pytest.raises(NotFound, match='did you mean "b"'):
        await first.cluster.revoke("bb", "typing")
    async with Client.connect_host(first.address, "a", tls) as client:
        await client.agent()
        await first.cluster.revoke("b", "stolen")
        with pytest.raises(NotAllowed, match="was revoked"):  # on the connection that it had
            await ask_on(client)
        assert first.membership.is_revoked(serial.serial)
    assert await whispers(first, tls, b"GET /v1/agent") == b""
    assert [member.revoked for member in await first.cluster.members()] == [False, True]
    # It may be taken back, with a new certificate.
    await join_cluster(config, await first.cluster.invite("b", HOUR), free_address())
    tls = Identity(config.trust_dir).client_context()
    async with Client.connect_host(first.address, "a", tls) as client:
        await client.agent()
    assert [member.revoked for member in await first.cluster.members()] == [False, False]


# What is not there


async def test_a_key_that_others_can_read_is_not_used(first: Served) -> None:
    key = first.config.trust_dir / "host.key"
    key.chmod(0o640)
    with pytest.raises(KeyExposed, match=r"mode 0640.*chmod 600"):
        first.cluster.identity.server_context()


async def test_a_store_of_one_host_admits_no_other(host_config: Place) -> None:
    config = host_config("a")
    config.state_dir.mkdir(parents=True)
    with pytest.raises(StateConflict, match="semper host init"):
        async with Cluster.opened(config):
            pass
    await begin_cluster(config, "lab", "a", free_address(), [])
    async with served(config) as host:
        with pytest.raises(StateConflict, match=r"file of this host.*--store"):
            await host.cluster.invite("b", HOUR)
        assert [member.host.name for member in await host.cluster.members()] == ["a"]
        async with Client.connect_host(
            host.address, "a", host.cluster.identity.client_context()
        ) as client:
            assert (await client.agent()).pid == os.getpid()
    with pytest.raises(StateConflict, match="already"):
        await begin_cluster(config, "other", "a", free_address(), [])


async def test_an_agent_waits_for_its_store_and_recovers_from_its_loss(
    host_config: Place, etcd: Etcd
) -> None:
    config = host_config("a")
    config.state_dir.mkdir(parents=True)
    await begin_cluster(config, "lab", "a", free_address(), [etcd.url])
    etcd.kill()
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(Cluster.opened(config))
        membership = await stack.enter_async_context(Membership.kept(cluster, lease_s=1))
        assert not membership.known.is_set()
        for _ in range(2):
            await asyncio.to_thread(etcd.start)
            await asyncio.wait_for(membership.known.wait(), DEADLINE_S)
            async with asyncio.timeout(DEADLINE_S), AsyncExitStack() as watching:
                other = EtcdStore([etcd.url])
                watching.push_async_callback(other.close)
                states = await watching.enter_async_context(aclosing(other.watch("alive/")))
                async for state in states:
                    if "alive/a" in state.entries:
                        break
            etcd.kill()


async def test_etcd_can_be_reached_by_members_alone(host_config: Place) -> None:
    """The certificates come first, etcd takes one of them, and the cluster goes on from there."""
    config = host_config("a")
    config.state_dir.mkdir(parents=True)
    address = free_address()
    etcd = Etcd(config.trust_dir)
    try:
        for _ in range(2):  # with the certificates made, and with them found
            with pytest.raises(Unavailable, match="etcd does not answer"):
                await begin_cluster(config, "lab", "a", address, [etcd.url])
        await asyncio.to_thread(etcd.start)
        await begin_cluster(config, "lab", "a", address, [etcd.url])
        async with served(config) as first:
            second = await joined(first, host_config("b"))
            async with Cluster.opened(second) as cluster:
                assert len(await cluster.members()) == 2
        anybody = without_certificate(first)
        stranger = EtcdStore([etcd.url], tls=anybody, timeout_s=2)
        with pytest.raises(Unavailable):
            await stranger.read()
        await stranger.close()
    finally:
        etcd.remove()


# What would stop a migration


async def test_what_would_stop_a_migration_is_all_listed(
    first: Served, host_config: Place, firmware_spec: Callable[..., VmSpec]
) -> None:
    """Two agents on one machine: their storage is shared, and the VM's own network is not."""
    spec = firmware_spec(nics=[{"type": "user"}])
    await first.agent.run_vm(spec)
    async with Client.connect(first.config.socket) as client:
        with pytest.raises(NotFound, match="there is no host b"):
            await client.migration_obstacles("web", "b")
        with pytest.raises(StateConflict, match="a is this host"):
            await client.migration_obstacles("web", "a")
        config = await joined(first, host_config("b"))
        (silent,) = await client.migration_obstacles("web", "b")
        assert "the agent of b is silent" in silent.what
        async with served(config) as second:
            await wait_presence(first, "b", there=True)
            (network,) = await client.migration_obstacles("web", "b")
            assert "user-mode networking" in network.what
            # A copy at the same path would have no id, or another one.
            record = epoch.record_path(spec.disks[0].image)
            assert (found := epoch.read_epoch(record)) is not None
            assert (found.epoch, found.holder) == (1, "a")  # claimed when it was run
            facts = await second.agent.host()
            side = await side_of(facts, "b", spec, vm_state=None, source=False)
            assert side.images["root"].id == found.image
            record.unlink()
            side = await side_of(facts, "b", spec, vm_state=None, source=False)
            assert side.images["root"].id == ""
    await first.agent.vm("web").kill()


async def test_where_a_vm_could_go_and_what_there_is_room_for(
    first: Served, host_config: Place, firmware_spec: Callable[..., VmSpec]
) -> None:
    """Two agents that ask each other. A VM whose network keeps it from moving can be started
    elsewhere all the same, and that is what counts when its host is lost.
    """
    spec = firmware_spec(nics=[{"type": "user"}])
    await first.agent.run_vm(spec)
    config = await joined(first, host_config("b"))
    async with Client.connect(first.config.socket) as client:
        with pytest.raises(NotFound, match="no VM"):
            await client.places("absent")
        silent, own = (await client.places("web")).hosts
        assert (silent.host, silent.against) == ("b", ["the agent of b is silent"])
        assert (own.host, own.against) == ("a", ["it runs there"])
        alone = await client.capacity(1)
        assert [one.host for one in alone.absent] == ["b"]
        assert not alone.whole
        with pytest.raises(StateConflict, match="hosts that answer: 1; 2 of them"):
            await client.capacity(2)
        assert [(loss.hosts, loss.vms, len(loss.down)) for loss in alone.losses] == [(["a"], 1, 1)]
        async with served(config) as second:
            await wait_presence(first, "b", there=True)
            there, own = (await client.places("web")).hosts
            assert (there.host, there.fits) == ("b", False)
            assert "user-mode networking" in there.against[0]
            found = await client.capacity(1)
            assert found.fits
            assert found.whole
            losses = {tuple(loss.hosts): (loss.vms, loss.down) for loss in found.losses}
            assert losses == {("a",): (1, []), ("b",): (0, [])}
            (both,) = (await client.capacity(2)).losses
            assert [(one.vm, one.why) for one in both.down] == [
                ("web", "a: it is lost as well; b: it is lost as well")
            ]
            async with Client.connect(second.config.socket) as of_b:
                assert (await of_b.capacity(1)).fits  # whoever is asked
            second.agent.config = replace(second.agent.config, guest_memory=1 << 20)
            worst, other = (await client.capacity(1)).losses
            assert (worst.hosts, other.down) == (["a"], [])
            assert worst.down[0].reason is Reason.NO_MEMORY
            assert "b has the most left: 1M" in worst.down[0].why
    await first.agent.vm("web").kill()


# The programs


# Some twenty programs are started, each of which imports its libraries first.
async def test_two_hosts_by_the_command_line(host_config: Place, etcd: Etcd) -> None:
    a, b = host_config("a"), host_config("b")
    addresses = free_address(), free_address()
    await semper(a, "host", "init", "a", "--listen", addresses[0], "--store", etcd.url)
    async with semperd(a):
        token = await semper(a, "host", "add", "b", "--valid", "5")
        assert token.startswith(PREFIX)
        file = b.state_dir.parent / "b.token"
        file.parent.mkdir()
        file.write_text(token)
        said = await semper(b, "host", "join", str(file), "--listen", addresses[1])
        assert "this host is b of the cluster sempervirt" in said
        async with semperd(b):
            await wait_states(b, {"a": "alive", "b": "alive"})
            assert "no VM web" in await semper(a, "vm", "migrate", "web", "--to", "b", code=4)
            assert "no host was named" in await semper(a, "vm", "migrate", "web", code=2)
            refused = await semper(a, "vm", "resolve", "web", "--owner=b", "--evidence=x", code=4)
            assert "no host ever owned a VM web" in refused
            refused = await semper(a, "vm", "migrate", "web", "--to", "b", "--dry-run", code=4)
            assert "there is no VM web" in refused
            listed = await semper(a, "host", "list")
            assert "until 20" in listed
            assert addresses[1] in listed
        await wait_states(a, {"a": "alive", "b": "silent"})
        await semper(a, "host", "revoke", "b", "--reason", "test")
        await wait_states(a, {"a": "alive", "b": "revoked"})


def environment(config: AgentConfig) -> dict[str, str]:
    own = {"SEMPERVIRT_STATE_DIR": config.state_dir, "SEMPERVIRT_RUN_DIR": config.run_dir}
    return {**os.environ, **{key: str(value) for key, value in own.items()}, "COLUMNS": "160"}


async def semper(config: AgentConfig, *arguments: str, code: int = 0) -> str:
    program = str(Path(sys.executable).with_name("semper"))
    process = await asyncio.create_subprocess_exec(
        program,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(config),
    )
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate()
    assert process.returncode == code, err.decode()
    return (err if code else out).decode()


@asynccontextmanager
async def semperd(config: AgentConfig) -> AsyncIterator[None]:
    program = str(Path(sys.executable).with_name("semperd"))
    log = config.state_dir.parent / "semperd.log"
    with log.open("ab") as output:
        process = subprocess.Popen([program], stderr=output, env=environment(config))  # noqa: ASYNC220
    try:
        async with asyncio.timeout(DEADLINE_S):
            while "serve hosts" not in log.read_text():
                assert process.poll() is None, log.read_text()
                await asyncio.sleep(0.05)  # poll interval
        yield
        process.terminate()
        await asyncio.to_thread(process.wait, DEADLINE_S)
    finally:
        process.kill()
        process.wait()


async def wait_states(config: AgentConfig, wanted: dict[str, str]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            members = json.loads(await semper(config, "host", "list", "--output", "json"))
            if {member["name"]: member["state"] for member in members} == wanted:
                return
