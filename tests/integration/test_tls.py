"""The door itself: which versions of TLS are spoken, who one is by a certificate and until when,
and how soon one who was revoked is a stranger on every host, also while the store is silent.

How hosts join, and what strangers meet: test_hosts.py. How certificates are renewed:
test_certificates.py.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lab.etcd import Etcd, Relay
from lab.ports import free_address
from sempervirt.api.client import Client
from sempervirt.cluster.cluster import begin_cluster, read_settings, write_settings
from sempervirt.cluster.joining import join_cluster
from sempervirt.core.errors import (
    AgentUnavailable,
    NotAllowed,
    OutcomeUnknown,
    SempervirtError,
)
from sempervirt.trust.authority import KEY_FILE, Authority, Issued
from sempervirt.trust.identity import Identity, KeyRequest, host_context
from sempervirt.trust.keyfiles import read_private, show
from sempervirt.vm.config import AgentConfig
from tests.integration.test_hosts import Served, in_force, served

DEADLINE_S = 90.0
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
Config = Callable[[str], AgentConfig]


@pytest.fixture
def etcd() -> Iterator[Etcd]:
    with Etcd.running() as server:
        yield server


@pytest.fixture
def config_of(place: Path) -> Config:
    def make(name: str) -> AgentConfig:
        config = AgentConfig(place / name / "s", place / name / "r")
        config.state_dir.mkdir(parents=True)
        return config

    return make


@pytest.fixture
async def first(config_of: Config, etcd: Etcd) -> AsyncIterator[Served]:
    config = config_of("a")
    await begin_cluster(config, "lab", "a", free_address(), [etcd.url])
    async with served(config) as host:
        yield host


async def answers(host: Served, name: str, tls: ssl.SSLContext) -> bool:
    """Whether the agent of a host answers one who shows that."""
    try:
        async with Client.connect_host(host.address, name, tls) as client:
            await client.agent()
    except SempervirtError:
        return False
    return True


# Versions


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1", "TLSv1_2", "TLSv1_3"])
async def test_one_version_of_tls_is_spoken(first: Served, version: str) -> None:
    """By those who ask as well: one who answers with less is not asked."""
    wanted = ssl.TLSVersion[version]
    tls = first.cluster.identity.client_context()
    tls.set_ciphers("ALL:@SECLEVEL=0")  # else OpenSSL itself would refuse the oldest
    tls.minimum_version = tls.maximum_version = wanted
    assert await answers(first, "a", tls) is (wanted is ssl.TLSVersion.TLSv1_3)
    old = first.cluster.identity.server_context()
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = old.maximum_version = wanted
    listener = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=old)
    async with listener:
        host, port = listener.sockets[0].getsockname()
        asking = first.cluster.identity.client_context()
        try:
            _, writer = await asyncio.open_connection(host, port, ssl=asking, server_hostname="a")
        except (ssl.SSLError, ConnectionError):
            agreed = False
        else:
            agreed = True
            writer.close()
    assert agreed is (wanted is ssl.TLSVersion.TLSv1_3)


# Names and times


def certified(
    authority: Authority,
    directory: Path,
    names: list[x509.GeneralName],
    *,
    begins: datetime | None = None,
    common_name: str = "b",
) -> tuple[ec.EllipticCurvePrivateKey, str]:
    """A certificate as the authority would never give out, but signed by it; good for a day."""
    key, signing = ec.generate_private_key(ec.SECP256R1()), read_private(directory / KEY_FILE)
    assert signing is not None
    begins = begins or datetime.now(UTC) - timedelta(minutes=1)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + DAY)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), False
        )
    )
    return key, Issued(builder.sign(signing, hashes.SHA256())).pem


def urn(kind: str, name: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(f"urn:sempervirt:{kind}:{name}")


A, B = urn("host", "a"), urn("host", "b")
NAMES: dict[str, tuple[list[x509.GeneralName], bool, bool]] = {
    # Names: is it answered as a host by a; does one who asks for a believe it.
    "the host": ([A], True, True),
    "with an address": ([A, x509.DNSName("elsewhere")], True, True),
    "another host": ([B], True, False),
    "an address alone": ([x509.DNSName("a")], False, False),
    "two hosts": ([A, B], False, False),
    "a longer name": ([urn("host", "a.b")], True, False),
    "another case": ([x509.UniformResourceIdentifier("URN:SEMPERVIRT:HOST:a")], False, False),
    "an operator of the wrong authority": ([urn("operator", "a")], False, False),
    "an invitation of the wrong authority": ([urn("invitation", "a")], False, False),
    "another kind": ([urn("root", "a")], False, False),
}


@pytest.mark.parametrize("what", NAMES)
async def test_one_is_who_the_urn_says_and_nobody_else(first: Served, what: str) -> None:
    names, is_host, is_a = NAMES[what]
    directory = first.config.trust_dir
    authority = Authority.load(directory)
    key, pem = certified(authority, directory, names, common_name="a")
    asking = host_context()
    asking.load_verify_locations(directory / "authority.crt")
    show(asking, key, pem)
    assert await answers(first, "a", asking) is is_host
    await believed(first, key, pem, believed_as_a=is_a)


async def believed(
    first: Served, key: ec.EllipticCurvePrivateKey, pem: str, *, believed_as_a: bool
) -> None:
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    show(serving, key, pem)
    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=serving) as listener:
        address = "{}:{}".format(*listener.sockets[0].getsockname())
        tls = first.cluster.identity.client_context()
        async with Client.connect_host(address, "a", tls) as client:
            if believed_as_a:
                assert await client.vms() == []
            else:
                with pytest.raises(NotAllowed):
                    await client.vms()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n[]")
    writer.close()


@pytest.mark.parametrize(("passed", "good"), [(-HOUR, False), (HOUR, True), (DAY + HOUR, False)])
async def test_a_certificate_is_good_in_its_time(
    first: Served, passed: timedelta, good: bool
) -> None:
    """Neither before nor after; of one who asks, and of one who is asked."""
    directory, begins = first.config.trust_dir, datetime.now(UTC) - passed
    key, pem = certified(Authority.load(directory), directory, [A], begins=begins)
    asking = host_context()
    asking.load_verify_locations(directory / "authority.crt")
    show(asking, key, pem)
    assert await answers(first, "a", asking) is good
    await believed(first, key, pem, believed_as_a=good)


# Revocation


async def test_a_revocation_is_in_force_on_every_host_and_outlives_the_silence_of_the_store(
    first: Served, config_of: Config, etcd: Etcd
) -> None:
    for name in "bcdef":
        config = config_of(name)
        await join_cluster(config, await first.cluster.invite(name, HOUR), free_address())
    configs = {name: AgentConfig(first.config.state_dir.parents[1] / name / "s",
                                 first.config.state_dir.parents[1] / name / "r")
               for name in "bcdef"}  # fmt: skip
    tls = {name: Identity(config.trust_dir).client_context() for name, config in configs.items()}
    async with AsyncExitStack() as stack:
        hosts = {"a": first}
        for name in "cdef":
            hosts[name] = await stack.enter_async_context(served(configs[name]))

        async def answering(asked_by: str) -> set[str]:
            found = [name for name, host in hosts.items() if name != asked_by]
            said = [await answers(hosts[name], name, tls[asked_by]) for name in found]
            return {name for name, does in zip(found, said, strict=True) if does}

        serials = {}
        for name, config in configs.items():
            issued = Identity(config.trust_dir).certificate
            assert issued is not None
            serials[name] = issued.serial
        assert await answering("b") == {*"acdef"}
        await first.cluster.revoke("b", "stolen")
        await in_force(
            lambda: all(host.membership.is_revoked(serials["b"]) for host in hosts.values())
        )
        assert await answering("b") == set()
        assert await answering("c") == {*"adef"}  # the control
        # The store is silent: what was known is in force, and nothing new can be.
        await asyncio.to_thread(etcd.kill)
        assert await answering("b") == set()
        with pytest.raises(SempervirtError):
            await first.cluster.revoke("c", "stolen")
        assert await answering("c") == {*"adef"}
        # It comes back: what is revoked then is in force as soon.
        await asyncio.to_thread(etcd.start)
        await until_revoked(first, "c")
        async with asyncio.timeout(DEADLINE_S):  # a watch begins again after a pause
            while not all(  # noqa: ASYNC110
                host.membership.is_revoked(serials["c"]) for host in hosts.values()
            ):
                await asyncio.sleep(0.02)  # poll interval
        assert await answering("c") == set()
        assert await answering("b") == set()
        assert await answering("d") == {*"acef"}


async def until_revoked(first: Served, name: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await first.cluster.revoke(name, "stolen")
            except SempervirtError:
                await asyncio.sleep(0.05)  # poll interval
            else:
                return


async def is_answered(client: Client) -> bool | None:
    """Whether whoever has an open connection is, and not told that this is not allowed; None: it
    had to be made anew, and could not be.
    """
    try:
        await client.agent()
    except NotAllowed:
        return False
    except (AgentUnavailable, OutcomeUnknown):
        return None
    return True


async def test_a_host_that_is_cut_off_from_the_store_keeps_what_it_knew(
    first: Served, config_of: Config, etcd: Etcd
) -> None:
    """Also on connections that were open before; and hears the rest as soon as it can."""
    relay = Relay(etcd.port)
    await relay.start()
    configs = {name: config_of(name) for name in "bcf"}
    for name, config in configs.items():
        await join_cluster(config, await first.cluster.invite(name, HOUR), free_address())
    settings = read_settings(configs["f"])
    assert settings is not None
    write_settings(configs["f"], replace(settings, store=(relay.url,)))
    tls = {name: Identity(config.trust_dir).client_context() for name, config in configs.items()}
    told: set[tuple[str, str]] = set()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(relay.close)
        hosts = {"a": first, "f": await stack.enter_async_context(served(configs["f"]))}
        open_before = {
            (who, name): await stack.enter_async_context(
                Client.connect_host(host.address, name, tls[who])
            )
            for who in "bc"
            for name, host in hosts.items()
        }

        asking = {pair: asyncio.Lock() for pair in open_before}

        async def keep_open() -> None:
            """A connection on which nothing is asked for seconds is closed by both ends."""
            while True:
                for pair, client in open_before.items():
                    async with asking[pair]:
                        with suppress(SempervirtError):
                            if await is_answered(client) is False:
                                told.add(pair)
                await asyncio.sleep(0.5)  # poll interval

        keeping = asyncio.create_task(keep_open())
        stack.callback(keeping.cancel)

        async def refused(who: str, name: str) -> bool:
            """On both kinds of connections, which are of one mind."""
            said = await answers(hosts[name], name, tls[who])
            async with asking[who, name]:
                answered = await is_answered(open_before[who, name])
            if answered is False:
                told.add((who, name))
            assert said is (answered is True)
            return not said

        async def wait_refused(who: str, name: str, within_s: float) -> None:
            issued = Identity(configs[who].trust_dir).certificate
            assert issued is not None
            async with asyncio.timeout(within_s):
                while not hosts[name].membership.is_revoked(issued.serial):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)  # poll interval
            assert await refused(who, name)

        assert not any([await refused(who, name) for who in "bc" for name in "af"])
        await first.cluster.revoke("b", "stolen")
        for name in "af":
            await wait_refused("b", name, DEADLINE_S)
        relay.freeze()  # f hears nothing, and does not know that
        await first.cluster.revoke("c", "stolen")
        await wait_refused("c", "a", DEADLINE_S)
        assert await refused("b", "f")
        assert not await refused("c", "f")  # the control: what it has not heard
        relay.drop()  # now it knows that it hears nothing
        assert await refused("b", "f")
        relay.heal()
        await wait_refused("c", "f", DEADLINE_S)
        assert await refused("b", "f")
    assert any(name == "f" for _, name in told), "no connection to f was open for long enough"


async def test_an_agent_that_does_not_know_who_is_revoked_serves_nobody(
    config_of: Config, etcd: Etcd
) -> None:
    """It begins while the store is silent: better no answer than one to a stranger."""
    a, b = config_of("a"), config_of("b")
    await begin_cluster(a, "lab", "a", free_address(), [etcd.url])
    async with served(a) as first:
        await join_cluster(b, await first.cluster.invite("b", HOUR), free_address())
        await first.cluster.revoke("b", "stolen")
    await asyncio.to_thread(etcd.kill)
    tls = Identity(b.trust_dir).client_context()
    async with AsyncExitStack() as stack:
        starting = asyncio.create_task(stack.enter_async_context(served(a)))
        try:
            done, _ = await asyncio.wait([starting], timeout=1)
            assert not done
            assert not await answers(first, "a", tls)
            await asyncio.to_thread(etcd.start)
            again = await asyncio.wait_for(starting, DEADLINE_S)
            assert not await answers(again, "a", tls)
            own = first.cluster.identity.client_context()
            assert await answers(again, "a", own)
        finally:
            starting.cancel()


def test_a_request_for_a_certificate_has_to_be_signed_by_its_key(tmp_path: Path) -> None:
    """Else one could have a certificate made for the key of another."""
    authority = Authority.create(tmp_path, "lab")
    asked = KeyRequest.made("a").text
    request = x509.load_pem_x509_csr(asked.encode())
    assert authority.issue_host(asked, "a").certificate.public_key() == request.public_key()
    lines = asked.splitlines()
    lines[-3] = lines[-3][::-1]
    with pytest.raises(SempervirtError, match="signing request"):
        authority.issue_host("\n".join(lines), "a")
