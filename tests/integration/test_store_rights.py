"""What a joined host, one that was revoked, and a token can do to the store, past every agent.

The attacks are as they succeeded once, when etcd trusted every certificate of the one authority.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from lab.etcd import Etcd
from lab.ports import free_address
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
from sempervirt.host.places import Places
from sempervirt.store.etcd import Credentials, EtcdStore
from sempervirt.store.guarded import GuardedStore
from sempervirt.store.port import Delete, Put, Store, Write
from sempervirt.store.proposals import Proposal
from sempervirt.store.records import Custody, ImageClaim, Ownership, parse
from sempervirt.store.registry import Claim, Registry, StaleClaim
from sempervirt.trust.authority import Authority
from sempervirt.trust.identity import Identity
from sempervirt.vm.claims import claim_of
from sempervirt.vm.config import AgentConfig
from tests.integration.test_hosts import in_force, served
from tests.unit.test_fencing import Came, follow

DEADLINE_S = 90.0
HOUR = timedelta(hours=1)


@dataclass
class Lab:
    """Host a, with the authority; host b, which has joined; etcd, which a's certificate serves."""

    a: Cluster
    b: AgentConfig
    etcd: Etcd

    def store_of_b(self) -> GuardedStore:
        """The store, as whoever has all files of b reaches it."""
        return store_of(self.b)


def store_of(config: AgentConfig) -> GuardedStore:
    """The store, as whoever has all files of a host reaches it."""
    settings = read_settings(config)
    assert settings is not None
    store = open_store(config, settings)
    assert isinstance(store, GuardedStore)
    return store


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
    """Past its agent, with all that it has: etcd itself refuses."""
    await operators.add_operator(lab.a, "alice", Role.VIEWER, HOUR)
    await lab.a.invite("c", HOUR)
    await Registry(lab.a.store).claim("web", "a", ["1"])
    await wait_settled(lab)
    guarded = lab.store_of_b()
    store, everything = guarded.etcd, etcd_of(lab.a.store)
    entries = (await store.read()).entries
    assert {"vms/web", "images/1", "alive/a", "hosts/a", "rights/divided"} < entries.keys()
    new = "revoked/1 lists/hosts tokens/d operators/eve hosts/d alive/d other vms/db images/2"
    for key in (
        *entries,
        *new.split(),
        "proposals/a/1",
        "proposals//1",
        "proposals/",
        "proposals/bb/1",
    ):
        if key == "alive/b":
            continue
        with pytest.raises(NotAllowed, match="permission denied"):
            await write(store, Put(key, "{}"))
        with pytest.raises(NotAllowed, match="permission denied"):
            await write(store, Delete(key))
        with pytest.raises(NotAllowed, match="permission denied"):  # hidden beside what it may
            await write(store, Put("proposals/b/1", "{}"), Put(key, "{}"))
    for prefix in ("", "vms/", "images/", "revoked/", "proposals/", "alive/"):
        with pytest.raises(NotAllowed, match="permission denied"):
            await store.administer("kv/deleterange", store.range_of(prefix))
    assert {key: at.value for key, at in (await everything.read()).entries.items()} == {
        key: at.value for key, at in entries.items()
    }
    # Negative control: what a host has to do it can, and root can do all of it.
    await Registry(guarded).claim("db", "b", ["2"])
    await write(everything, Put("revoked/1", "{}"), Delete("tokens/c"), Put("vms/x", "{}"))
    await guarded.close()


async def test_what_a_host_says_of_anothers_vm_counts_for_nothing(lab: Lab) -> None:
    """B takes a's VM, frees it, gives it away, or gives it a later epoch: in keys of its own, where
    etcd lets it write what it likes.
    """
    a, store = Registry(lab.a.store), lab.store_of_b()
    claim = await a.claim("web", "a", ["1"])
    await a.begin_move(claim, "c")
    await wait_settled(lab)
    state = await store.read()
    owned = await a.check(claim)
    image = parse(ImageClaim, "images/1", state.entries["images/1"].value)
    taken = {"custody": Custody.OWNED, "owner": "b", "epoch": 2, "claim": "b" * 32}
    attacks: dict[str, list[Ownership | ImageClaim]] = {
        "takes it": [
            owned.model_copy(update={**taken, "destination": ""}),
            ImageClaim(image="1", epoch=2, claim="b" * 32, vm="web"),
        ],
        "as unknown": [owned.model_copy(update={"custody": Custody.UNKNOWN, "why": "silent"})],
        "frees it": [
            Ownership(vm="web", custody=Custody.FREE, epoch=1, claim=claim.id, images=("1",)),
            image.model_copy(update={"vm": ""}),
        ],
        "where it moves": [owned.model_copy(update={"destination": "b"})],
        "hands it over": [owned.model_copy(update={**taken, "owner": "c", "destination": ""})],
        "takes its image": [
            Ownership(vm="evil", images=("1",), **taken),
            ImageClaim(image="1", epoch=2, claim="b" * 32, vm="evil"),
        ],
        "frees its image": [image.model_copy(update={"vm": ""})],
        "an epoch after which none comes": [
            Ownership(vm="evil", **{**taken, "epoch": 1 << 62}),
        ],
    }
    for what, values in attacks.items():
        writes = {key_of(value): value.text() for value in values}
        expect = {key: state.revision_of(key) for key in writes}
        with pytest.raises(NotAllowed, match="may not change"):
            await store.commit([Put(*item) for item in writes.items()], expect=expect)
        # And past its own agent, so that nobody withdraws it.
        proposal = Proposal(writes=writes, expect=expect).text()
        await store.etcd.commit([Put("proposals/b/1", proposal)], expect={"proposals/b/1": 0})
        for reader in (lab.a.store, store):
            assert (await Registry(reader).check(claim)) == owned, what
        await wait_settled(lab)
        present = (await lab.a.store.read()).entries
        assert present["images/1"] == state.entries["images/1"], what
        assert "vms/evil" not in present
        assert (await Registry(store).check(claim)) == owned, what
    # Bytes that are no text, and an operation too many, end no reader.
    junk = {"key": encoded(store.etcd.root + "alive/b"), "value": "//8="}
    await store.etcd.administer("kv/put", junk)
    assert any(member.host.name == "b" for member in await lab.a.members())
    new = await a.hand_over(claim)
    assert (new.host, new.epoch) == ("c", 2)
    await store.close()


async def test_what_hosts_have_to_do_they_can(lab: Lab) -> None:
    """The control: a VM goes to b by a's word alone, and back; a free one is whose comes first; one
    of a host that is gone goes where the authority says.
    """
    mine = lab.store_of_b()
    a, b = Registry(lab.a.store), Registry(mine)
    claim = await a.claim("web", "a", ["1"])
    async with asyncio.timeout(DEADLINE_S), aclosing(mine.watch("vms/")) as states:
        await anext(states)
        await a.begin_move(claim, "b")
        claim = await a.hand_over(claim)
        async for state in states:  # as an agent hears of it
            owned = parse(Ownership, "vms/web", state.entries["vms/web"].value)
            if owned.owner == "b":
                break
    with pytest.raises(StaleClaim):
        await a.end_move(replace(claim, epoch=1))
    await b.begin_move(claim, "a")
    await b.end_move(claim)
    await b.begin_move(claim, "a")
    claim = await b.hand_over(claim)
    await a.release(claim)
    answers = await asyncio.gather(
        *(one.claim("web", host, ["1"]) for one, host in ((a, "a"), (b, "b")) * 3),
        return_exceptions=True,
    )
    (won,) = {one.host for one in answers if isinstance(one, Claim)}
    assert all(isinstance(one, Claim | StateConflict) for one in answers)
    assert (await a.find("web")).owner == won
    of_b = await b.claim("db", "b")
    with pytest.raises(NotAllowed, match="the one that has the authority"):
        await b.mark_unknown(await a.claim("of-a", "a"), "it is silent")
    await a.mark_unknown(of_b, "host b is silent")
    assert (await a.resolve("db", "a", "its power is off")).host == "a"
    # If the host with the authority is gone, whoever has its password is it, from any host.
    password = (lab.a.identity.directory / "store.json").read_text()
    (lab.b.trust_dir / "store.json").write_text(password)
    instead = lab.store_of_b()
    await Registry(instead).mark_unknown(claim_of(await a.find("of-a")), "host a has burnt down")
    assert (await Registry(instead).resolve("of-a", "b", "seen")).host == "b"
    for store in (mine, instead):
        await store.close()


async def test_a_cluster_of_an_earlier_release_is_divided_by_init(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    """Until then hosts write owners themselves, as they did."""
    root = etcd_of(lab.a.store)
    for shared in ("vms/", "images/"):
        perm = {"permType": "READWRITE", **root.range_of(shared)}
        await root.administer("auth/role/grant", {"name": "host:b", "perm": perm})
    mine = root.range_of("proposals/b/")
    await root.administer("auth/role/revoke", {"role": "host:b", **mine})
    await write(root, Delete("rights/divided"))
    before = lab.store_of_b()
    async with Cluster.opened(lab.a.config) as cluster, Membership.kept(cluster, lease_s=5):
        async with asyncio.timeout(DEADLINE_S):
            while "repeat on this one: semper host init" not in caplog.text:  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # poll interval
    claim = await Registry(before).claim("web", "b", ["1"])
    assert "vms/web" in (await before.etcd.read()).entries
    settings = lab.a.settings
    for _ in range(2):  # it may be repeated
        await begin_cluster(lab.a.config, settings.cluster, "a", settings.address, settings.store)
    with pytest.raises(NotAllowed, match="permission denied"):
        await write(before.etcd, Put("vms/web", "{}"))
    await Registry(before).begin_move(claim, "a")  # the same client goes on
    assert (await Registry(before).hand_over(claim)).epoch == 2
    assert (await Registry(lab.a.store).find("web")).owner == "a"
    await before.close()


async def wait_settled(lab: Lab) -> None:
    """By the agent of a, which runs."""
    root = etcd_of(lab.a.store)
    async with asyncio.timeout(DEADLINE_S), aclosing(root.watch("proposals/")) as states:
        async for state in states:
            if not state.entries:
                return


def key_of(value: Ownership | ImageClaim) -> str:
    return f"vms/{value.vm}" if isinstance(value, Ownership) else f"images/{value.image}"


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def etcd_of(store: Store) -> EtcdStore:
    """Past the proposals."""
    assert isinstance(store, GuardedStore)
    return store.etcd


async def test_no_host_gives_itself_or_others_rights(lab: Lab) -> None:
    store = lab.store_of_b().etcd
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
    claim = await Registry(store).claim("web", "b")
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
    assert (await Registry(back).check(claim)).owner == "b"
    await Registry(back).release(claim)
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
        await in_force(
            lambda: (
                third.membership.is_revoked(issued.serial)
                and is_listed(c, issued.serial)
                and is_listed(lab.a.config, issued.serial)  # which etcd looks at
            )
        )
        assert "user name is empty" not in await refusal()
    own = store_of(c)
    await own.read()  # the others are as they were
    await own.close()


def is_listed(config: Places, serial: str) -> bool:
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


async def test_a_vm_that_came_by_its_images_is_entered_when_its_former_host_lets_go(
    lab: Lab, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While the store was away. Until then the VM runs on: no store ends what the images say."""
    said: list[str] = []
    of_a, store = Registry(lab.a.store), lab.store_of_b()
    before = await of_a.claim("web", "a")
    vm: Any = Came(place, said, before.epoch + 1)
    came = vm.record.claim

    async def refused() -> bool:
        return "runs here by its images" in caplog.text

    await follow(store, vm, refused)
    assert (await of_a.find("web")).owner == "a"
    await of_a.release(before)

    async def entered() -> bool:
        return bool(vm.record.claim != came)

    await follow(store, vm, entered)
    owned = await of_a.find("web")
    assert owned.owner == "b"
    assert (owned.epoch, owned.claim) == (vm.record.claim.epoch, vm.record.claim.id)
    assert said == []
    await store.close()
