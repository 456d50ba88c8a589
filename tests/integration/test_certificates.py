"""Certificates of days that renew themselves: in force without a restart, told if they do not.

Certificates of seconds where time has to pass; else ones whose time has passed already.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import stat
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from cryptography import x509

from lab.etcd import Etcd
from lab.ports import free_address
from sempervirt.api.client import Client
from sempervirt.cli import cluster as commands
from sempervirt.cluster import certificate, peer
from sempervirt.cluster.certificate import OwnCertificate, RenewRequest, RenewView, read_standing
from sempervirt.cluster.cluster import Cluster, begin_cluster, read_settings
from sempervirt.cluster.joining import join_cluster
from sempervirt.cluster.standing import Age, age
from sempervirt.core.errors import (
    InvalidRequest,
    NotAllowed,
    SempervirtError,
    StateConflict,
    Unavailable,
)
from sempervirt.store.port import Put, Write
from sempervirt.store.records import Host, Presence, parse
from sempervirt.trust.authority import Authority, Issued
from sempervirt.trust.identity import Holder, Identity, KeyRequest, Peer
from sempervirt.trust.keyfiles import (
    lend_file,
    read_certificate,
    read_private,
    write_private,
    write_public,
)
from sempervirt.vm.config import AgentConfig
from tests.integration.test_hosts import Served, ask_on, served

DEADLINE_S = 120.0
HOUR = timedelta(hours=1)
SECONDS = timedelta(seconds=20)
Config = Callable[[str], AgentConfig]


@pytest.fixture
def config_of(place: Path) -> Config:
    def make(name: str) -> AgentConfig:
        config = AgentConfig(place / name / "s", place / name / "r")
        config.state_dir.mkdir(parents=True)
        return config

    return make


@pytest.fixture
def etcd() -> Iterator[Etcd]:
    with Etcd.running() as server:
        yield server


@asynccontextmanager
async def host_a(config: AgentConfig, etcd: Etcd) -> AsyncIterator[Served]:
    """The host with the authority; its agent runs until the block is left."""
    present = read_settings(config)
    address = present.address if present else free_address()
    await begin_cluster(config, "lab", "a", address, [etcd.url])
    async with served(config) as host:
        yield host


async def join(first: Served, config: AgentConfig) -> None:
    await join_cluster(config, await first.cluster.invite("b", HOUR), free_address())


async def give_aged(a: AgentConfig, b: AgentConfig, *, valid: timedelta, passed: timedelta) -> None:
    """Puts a pair in force at b of which so much time has passed, and has the store know it."""
    authority = Authority.load(a.trust_dir)
    asked, now = KeyRequest.made("b"), datetime.now(UTC) - passed
    issued = authority.issue_host(asked.text, "b", valid=valid, now=now)
    Identity(b.trust_dir).renew(asked, issued.pem)
    async with Cluster.opened(a) as cluster:
        state = await cluster.store.read("hosts/b")
        host = parse(Host, "hosts/b", state.entries["hosts/b"].value)
        known = host.model_copy(update={"serial": issued.serial, "not_after": issued.not_after})
        put = Put("hosts/b", known.text())
        await cluster.store.commit([put], expect={put.key: state.revision_of(put.key)})


async def until(what: str, holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # poll interval
    assert holds(), what


async def wait_presence(cluster: Cluster, fits: Callable[[Presence], bool]) -> Presence:
    """Waits for what host b tells the others of itself."""
    async with asyncio.timeout(DEADLINE_S), aclosing(cluster.store.watch("alive/b")) as states:
        async for state in states:
            for key, entry in state.entries.items():
                if fits(found := parse(Presence, key, entry.value)):
                    return found
    raise AssertionError("the store has ended")


async def shown_by(address: str, tls: ssl.SSLContext, host: str) -> str:
    """The serial number of the certificate that is shown there to one who connects now."""
    name, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(name, int(port), ssl=tls, server_hostname=host)
    raw: Any = writer.get_extra_info("ssl_object")
    der = raw.getpeercert(binary_form=True)
    writer.close()
    return Issued(x509.load_der_x509_certificate(der)).serial


# In force without a restart


async def test_hosts_and_store_outlive_every_certificate_that_they_began_with(
    config_of: Config,
) -> None:
    a, b = config_of("a"), config_of("b")
    etcd, address = Etcd(a.trust_dir), free_address()
    lent = a.state_dir / "etcd"
    lent.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(lent, 65534, 65534)

    async def begin() -> None:
        store, files = [etcd.url], str(lent)
        await begin_cluster(a, "lab", "a", address, store, host_valid=SECONDS, etcd_files=files)

    try:
        with pytest.raises(Unavailable, match="etcd does not answer"):
            await begin()
        await asyncio.to_thread(etcd.start)
        await begin()
        async with served(a) as first:
            await join(first, b)
            async with served(b) as second:
                await outlive(first, second)
            await until("etcd finds what is in force", lambda: is_lent(a.trust_dir, lent))
    finally:
        etcd.remove()


def is_lent(trust: Path, directory: Path) -> bool:
    """Whether etcd's user has what the host has, and nobody else."""
    owner = directory.stat().st_uid
    for name in ("host.pem", "authority.crt", "revoked.crl"):
        found = (directory / name).stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, owner)
        if (directory / name).read_bytes() != (trust / name).read_bytes():
            return False
    return True


async def outlive(first: Served, second: Served) -> None:
    hosts = {"a": first, "b": second}
    began = {name: host.cluster.identity.certificate for name, host in hosts.items()}

    def all_ended() -> bool:
        return all(one is not None and one.not_after < time.time() - 1 for one in began.values())

    with ExitStack() as stack:
        # Open meanwhile, so that no later file has the number of an earlier one.
        first_files = {
            name: stack.enter_context((host.config.trust_dir / "host.pem").open("rb"))
            for name, host in hosts.items()
        }
        await until("the first certificates have ended", all_ended)
        for name, host in hosts.items():
            present = host.cluster.identity.certificate
            assert present is not None
            assert present.not_after > time.time()
            pair = host.config.trust_dir / "host.pem"
            assert stat.S_IMODE(pair.stat().st_mode) == 0o600
            assert pair.stat().st_ino != os.fstat(first_files[name].fileno()).st_ino
            earlier = began[name]
            assert earlier is not None
            assert present.certificate.public_key() != earlier.certificate.public_key()
    # Both servers show what is in force, both are asked with it, and the store takes it: over new
    # connections, for etcd has ended none of those that were made with the first certificate.
    for asking, asked, name in ((first, second, "b"), (second, first, "a")):
        tls = asking.cluster.identity.client_context()
        shown = await shown_by(asked.address, tls, name)
        entry = (await asking.cluster.store.read(f"hosts/{name}")).entries[f"hosts/{name}"]
        known = parse(Host, f"hosts/{name}", entry.value)
        assert shown in {known.serial, *(one.serial for one in known.earlier)}
        before = began[name]
        assert before is not None
        assert shown != before.serial
        async with peer.connect(asking.cluster, name, asked.address) as connection:
            await connection.call("GET", "/agent")
        async with Cluster.opened(asking.config) as anew:
            await anew.store.read()
    await wait_presence(first.cluster, lambda presence: presence.certificate == "")
    found = await asyncio.to_thread(read_standing, second.config)
    assert found is not None
    assert found.failure == ""
    # An earlier certificate that is alive is revoked with the newest.
    entry = (await first.cluster.store.read("hosts/b")).entries["hosts/b"]
    known = parse(Host, "hosts/b", entry.value)
    assert known.earlier
    await first.cluster.revoke("b", "stolen")
    revoked = (await first.cluster.store.read("revoked/")).entries
    for serial in (known.serial, known.earlier[-1].serial):
        assert f"revoked/{serial}" in revoked


async def test_without_renewal_a_certificate_of_seconds_ends_and_nobody_answers(
    config_of: Config, etcd: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above; and who has connected is not answered for longer."""

    async def never(_: OwnCertificate) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(OwnCertificate, "keep", never)
    a, b = config_of("a"), config_of("b")
    async with host_a(a, etcd) as first:
        await join(first, b)
        await give_aged(a, b, valid=timedelta(seconds=10), passed=timedelta())
        tls = Identity(b.trust_dir).client_context()
        own = Identity(b.trust_dir).certificate
        assert own is not None
        async with Client.connect_host(first.address, "a", tls) as early:
            with pytest.raises(NotAllowed, match="or has ended"):
                await ask_on(early)
        assert own.not_after <= time.time() < own.not_after + 30
        async with Client.connect_host(first.address, "a", tls) as late:
            with pytest.raises(SempervirtError):
                await late.agent()


# Who gets one


async def renewed(
    asking: AgentConfig, first: Served, name: str = "b"
) -> tuple[KeyRequest, RenewView]:
    """What host a answers to one with the files of a host."""
    asked = KeyRequest.made(name)
    async with (
        Cluster.opened(asking) as cluster,
        peer.connect(cluster, "a", first.address) as connection,
    ):
        body = RenewRequest(request=asked.text).model_dump()
        answer = await connection.call("POST", "/renew", body=body)
    return asked, RenewView.model_validate(answer)


async def test_a_host_gets_a_certificate_of_its_own_name_alone(
    config_of: Config, etcd: Etcd
) -> None:
    a, b = config_of("a"), config_of("b")
    async with host_a(a, etcd) as first:
        await join_cluster(
            b, await first.cluster.invite("b", HOUR, names="10.0.0.2:0"), free_address()
        )
        _, answer = await renewed(b, first, name="a")  # what the request says of a name is nothing
        issued = x509.load_pem_x509_certificate(answer.certificate.encode())
        names = issued.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        urns = names.get_values_for_type(x509.UniformResourceIdentifier)
        assert urns == ["urn:sempervirt:host:b"]
        # And the address that whoever invited it has vouched for.
        assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.2"]
        assert abs(answer.time - time.time()) < 60
        with pytest.raises(InvalidRequest, match="not a certificate signing request"):
            async with peer.connect(first.cluster, "a", first.address) as connection:
                await connection.call("POST", "/renew", body={"request": "nonsense"})
        # An answer that was lost is asked for again, with the certificate that is there.
        await renewed(b, first)
        with pytest.raises(NotAllowed, match="17 certificates that have not ended yet"):
            await as_often_as_it_likes(lambda: renewed(b, first))
        async with served(b) as second:
            with pytest.raises(StateConflict, match="is not on this host"):
                await second.cluster.renew(peer_of(a), KeyRequest.made("a").text)


async def as_often_as_it_likes(ask: Callable[[], Awaitable[object]]) -> None:
    for _ in range(20):
        await ask()


def peer_of(config: AgentConfig, name: str = "a") -> Peer:
    issued = Identity(config.trust_dir).certificate
    assert issued is not None
    return Peer(Holder.HOST, name, issued.serial, issued.fingerprint)


async def test_who_is_revoked_gets_none_also_in_between(
    config_of: Config, etcd: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = config_of("a"), config_of("b")
    async with host_a(a, etcd) as first:
        await join(first, b)
        known = peer_of(b, "b")
        cluster, store = first.cluster, first.cluster.store
        commit, request = store.commit, KeyRequest.made("b").text
        meanwhile: list[Callable[[], Any]] = []

        async def interposed(writes: list[Write], *, expect: dict[str, int]) -> int:
            while meanwhile:
                await meanwhile.pop()()
            return await commit(writes, expect=expect)

        monkeypatch.setattr(store, "commit", interposed)
        # A certificate is renewed while its host is being revoked: either is done again.
        meanwhile.append(lambda: cluster.renew(known, request))
        with pytest.raises(StateConflict, match="changed in the meantime"):
            await cluster.revoke("b", "stolen")
        meanwhile.append(lambda: cluster.revoke("b", "stolen"))
        with pytest.raises(StateConflict, match="changed in the meantime"):
            await cluster.renew(known, request)
        entry = (await store.read("hosts/b")).entries["hosts/b"]
        host = parse(Host, "hosts/b", entry.value)
        revoked = (await store.read("revoked/")).entries
        for serial in (host.serial, *(one.serial for one in host.earlier)):
            assert f"revoked/{serial}" in revoked
        with pytest.raises(NotAllowed, match=r"counts no more.*semper host add b"):
            await cluster.renew(known, request)
        with pytest.raises(NotAllowed):
            await cluster.renew(replace(known, serial="7"), request)
        with pytest.raises(NotAllowed, match="only a host"):
            await cluster.renew(replace(known, holder=Holder.OPERATOR), request)
        with pytest.raises(SempervirtError):
            await renewed(b, first)


# What is told


async def test_what_keeps_a_certificate_from_being_renewed_is_told_and_then_it_is_renewed(
    config_of: Config, etcd: Etcd, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = config_of("a"), config_of("b")
    async with host_a(a, etcd) as first:
        await join(first, b)
    await give_aged(a, b, valid=timedelta(minutes=6), passed=timedelta(seconds=305))
    async with served(b) as second:
        told = await wait_presence(second.cluster, lambda presence: presence.certificate != "")
        assert "and is not renewed: no agent answers" in told.certificate
        assert "is semperd running on a" in told.certificate
        assert "this host's certificate: it ends on" in caplog.text
        found = await asyncio.to_thread(read_standing, b)
        assert found is not None
        assert found.age is Age.LATE
        assert "no agent answers" in found.failure
        async with host_a(a, etcd):
            await wait_presence(second.cluster, lambda presence: presence.certificate == "")
        found = await asyncio.to_thread(read_standing, b)
        assert found is not None
        assert (found.age, found.failure) == (Age.FRESH, "")


async def test_a_host_that_slept_past_the_end_is_told_what_to_do_and_comes_back(
    config_of: Config, etcd: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = config_of("a"), config_of("b")
    async with host_a(a, etcd) as first:
        await join(first, b)
        await give_aged(a, b, valid=timedelta(minutes=2), passed=timedelta(minutes=3))
        async with served(b) as second:
            told = await wait_presence(second.cluster, lambda presence: presence.certificate != "")
            for words in ("it has ended on", "by the clock of this host", "VMs run on"):
                assert words in told.certificate
            assert "semper host add b > b.token" in told.certificate
            assert "semper host renew b.token" in told.certificate
            found = await asyncio.to_thread(read_standing, b)
            assert found is not None
            assert found.age is Age.ENDED
            assert "semper host renew b.token" in found.failure
            monkeypatch.setenv("SEMPERVIRT_STATE_DIR", str(b.state_dir))
            monkeypatch.setenv("SEMPERVIRT_RUN_DIR", str(b.run_dir))
            invitation = await first.cluster.invite("b", HOUR)
            assert (await commands.renew(invitation)).address == second.address
            # The agent that runs takes it into use.
            await wait_presence(second.cluster, lambda presence: presence.certificate == "")
            own = Identity(b.trust_dir).certificate
            assert own is not None
            tls = first.cluster.identity.client_context()
            assert await shown_by(second.address, tls, "b") == own.serial
    monkeypatch.setenv("SEMPERVIRT_STATE_DIR", str(config_of("c").state_dir))
    with pytest.raises(StateConflict, match="belongs to no cluster"):
        await commands.renew(invitation)


async def test_a_clock_that_is_wrong_is_told_as_that(
    config_of: Config, etcd: Etcd, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind by hours, as seen from here: the other host's certificate is not good yet."""
    a, b = config_of("a"), config_of("b")
    async with host_a(a, etcd) as first:
        await join(first, b)
    for passed in (timedelta(hours=-3), timedelta(hours=3)):
        await give_aged(a, b, valid=HOUR, passed=passed)
        context = Identity(b.trust_dir).server_context()
        listener = await asyncio.start_server(lambda _, __: None, "127.0.0.1", 0, ssl=context)
        async with listener, Cluster.opened(a) as cluster:
            address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
            async with peer.connect(cluster, "b", address) as connection:
                with pytest.raises(NotAllowed, match=r"by the clock of this host.*timedatectl"):
                    await connection.call("GET", "/agent")
    # And a host that does get its certificate compares the clocks.
    for before, there, after, said in (
        (1000.0, 1001.0, 1002.0, ""),
        (1000.0, 1020.0, 1001.0, ""),
        (1000.0, 1000.0 + 7200, 1001.0, "1 h 59 min behind that of a"),
        (1000.0, 1000.0 - 300, 1001.0, "5 min ahead of that of a"),
    ):
        caplog.clear()
        certificate._compare_clocks("a", before, there, after)
        assert (said in caplog.text) if said else not caplog.text


def test_a_third_of_its_life_is_left_for_renewal_and_half_of_that_is_late() -> None:
    ages = [(age(0, 600, now), now) for now in (0, 399, 400, 499, 500, 599, 600, 9999)]
    assert [found for found, _ in ages] == [
        Age.FRESH,
        Age.FRESH,
        Age.DUE,
        Age.DUE,
        Age.LATE,
        Age.LATE,
        Age.ENDED,
        Age.ENDED,
    ]


# The pair on disk

SOURCES = tuple(f"sempervirt/trust/{name}.py" for name in ("identity", "keyfiles"))


def die_at(line: int, work: Callable[[], None]) -> bool:
    """Does `work` in a process that dies before the line of that number that it comes to in our
    code; whether it died.
    """
    pid = os.fork()
    if pid == 0:
        left = line

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal left
            if not frame.f_code.co_filename.endswith(SOURCES):
                return None
            if event == "line":
                left -= 1
                if left < 0:
                    os._exit(7)
            return trace

        sys.settrace(trace)
        try:
            work()
        finally:
            sys.settrace(None)
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def pair_of(directory: Path) -> str:
    """The certificate that is in force, and by the names that etcd knows; all fit to their key."""
    Identity(directory).server_context()
    issued = Identity(directory).certificate
    assert issued is not None
    key, certificate_there = (
        read_private(directory / "host.key"),
        read_certificate(directory / "host.crt"),
    )
    assert key is not None
    assert certificate_there is not None
    assert key.public_key() == certificate_there.public_key()
    return issued.serial


def test_a_death_between_any_two_lines_leaves_one_pair_or_the_other(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path, "lab")
    identity = Identity(tmp_path)

    def make() -> tuple[KeyRequest, Issued]:
        asked = KeyRequest.made("a")
        return asked, authority.issue_host(asked.text, "a", "10.0.0.1:7443")

    asked, issued = make()
    identity.keep(asked, issued.pem, Issued(authority.certificate).pem)
    seen, line, died = {issued.serial: 0}, 0, True
    before = issued.serial
    while died:
        asked, issued = make()
        pem = issued.pem
        died = die_at(line, lambda: identity.renew(asked, pem))  # noqa: B023
        found = pair_of(tmp_path)
        assert found in {before, issued.serial}, line
        seen[found] = line
        before, line = found, line + 1
    assert line > 20
    assert len(seen) > 2
    assert before == issued.serial


def test_two_files_would_be_a_mix_after_some_death(tmp_path: Path) -> None:
    """The control: key and certificate written one after the other, as an earlier release did."""
    authority = Authority.create(tmp_path, "lab")
    broken, line, died = 0, 0, True
    while died:
        asked = KeyRequest.made("a")
        issued = authority.issue_host(asked.text, "a")

        def work() -> None:
            write_private(tmp_path / "host.key", asked.key)  # noqa: B023
            write_public(tmp_path / "host.crt", issued.pem)  # noqa: B023

        died = die_at(line, work)
        try:
            pair_of(tmp_path)
        except (SempervirtError, AssertionError):
            broken += 1
        line += 1
    assert broken > 3


def test_the_files_of_an_earlier_release_serve_and_become_one(tmp_path: Path) -> None:
    authority, identity = Authority.create(tmp_path, "lab"), Identity(tmp_path)
    asked = KeyRequest.made("a")
    issued = authority.issue_host(asked.text, "a", "10.0.0.1:7443")
    write_private(tmp_path / "host.key", asked.key)
    write_public(tmp_path / "host.crt", issued.pem)
    identity.server_context()
    assert identity.certificate == issued
    identity.settle()
    assert (tmp_path / "host.key").is_symlink()
    assert pair_of(tmp_path) == issued.serial
    other = KeyRequest.made("a")
    renewed_one = authority.issue_host(other.text, "a", "10.0.0.1:7443")
    with pytest.raises(InvalidRequest, match="not for the key"):
        identity.renew(asked, renewed_one.pem)
    assert identity.certificate == issued
    identity.renew(other, renewed_one.pem)
    assert identity.certificate == renewed_one
    for name in ("host.key", "host.crt"):
        assert (tmp_path / name).is_symlink()
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert pair_of(tmp_path) == renewed_one.serial
    (tmp_path / "host.pem").write_bytes(
        (tmp_path / "host.pem").read_bytes().replace(renewed_one.pem.encode(), issued.pem.encode())
    )
    with pytest.raises(Unavailable, match="do not fit together"):
        identity.server_context()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a file in another group")
def test_what_etcd_reads_is_its_groups_where_nobody_may_give_files_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in semperd's unit, which keeps no CAP_CHOWN."""
    kept, lent = tmp_path / "host.pem", tmp_path / "etcd"
    kept.write_text("secret")
    lent.mkdir()
    os.chown(lent, 0, 65534)
    lend_file(kept, lent)
    assert stat.S_IMODE((lent / "host.pem").stat().st_mode) == 0o600

    def refused(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refused)
    lent.chmod(0o2750)
    lend_file(kept, lent)
    found = (lent / "host.pem").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o640, 65534)
    os.chown(lent, 65534, 65534)
    lent.chmod(0o700)
    with pytest.raises(Unavailable, match=r"cannot write .*Operation not permitted"):
        lend_file(kept, lent)
    lend_file(tmp_path / "none", lent)


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
