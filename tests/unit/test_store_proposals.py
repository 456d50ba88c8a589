"""What of the hosts' proposals counts: an enemy among them changes nothing that is another's, and
settling changes nothing that anybody sees.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, cast

import pytest

from sempervirt.core.errors import NotAllowed, NotFound, OutcomeUnknown, StateConflict, Unavailable
from sempervirt.store import proposals
from sempervirt.store.etcd import Credentials, EtcdStore
from sempervirt.store.etcd_rights import DIVIDED, ROOT_USER, host_user
from sempervirt.store.guarded import GuardedStore
from sempervirt.store.port import Delete, Entry, Outdated, Put, Snapshot, Write, is_within
from sempervirt.store.proposals import (
    IMAGES,
    LENGTH_MAX,
    PROPOSALS,
    VMS,
    Proposal,
    Refusal,
    count,
    proposer_prefix,
    settlement,
)
from sempervirt.store.records import Custody, ImageClaim, Ownership
from sempervirt.store.registry import Claim, Registry

VM_NAMES, IMAGE_IDS, HOSTS = ("web", "db", "evil"), ("i1", "i2"), ("a", "c")


class Etcd:
    """Its keys in memory, one for all hosts, each of which sees them by a `GuardedStore`."""

    def __init__(self) -> None:
        self.revision = 1
        self.entries: dict[str, Entry] = {DIVIDED: Entry("{}", 1)}
        self.lose_answers = False
        self.history: dict[int, Snapshot] = {}
        self.settles_at_once = False

    def settle_soon(self) -> None:
        """As the host with the authority may, before the answer is looked at."""
        if self.settles_at_once and (writes := settlement(self.entries)):
            self.put(writes, {})

    def of(self, user: str) -> GuardedStore:
        """The store as that user of etcd has it."""
        return GuardedStore(cast(EtcdStore, _Client(self, user)))

    def put(self, writes: Sequence[Write], expect: Mapping[str, int]) -> None:
        """One commit."""
        now = Snapshot(self.revision, self.entries)
        if any(now.revision_of(key) != revision for key, revision in expect.items()):
            raise Outdated("another was faster")
        self.revision += 1
        for write in writes:
            if isinstance(write, Put):
                self.entries[write.key] = Entry(write.value, self.revision)
            else:
                self.entries.pop(write.key, None)
        self.history[self.revision] = Snapshot(self.revision, dict(self.entries))


class _Client:
    def __init__(self, etcd: Etcd, user: str) -> None:
        self.credentials = Credentials(user, "")
        self._etcd = etcd

    async def read(self, *parts: str) -> Snapshot:
        found = {key: at for key, at in self._etcd.entries.items() if is_within(key, parts)}
        return Snapshot(self._etcd.revision, found, parts)

    async def commit(self, writes: Sequence[Write], *, expect: Mapping[str, int]) -> int:
        self._etcd.put(writes, expect)
        return self._etcd.revision

    async def also_read(self, state: Snapshot, parts: Sequence[str]) -> Snapshot:
        then = self._etcd.history[state.revision].entries
        also = {key: at for key, at in then.items() if is_within(key, parts)}
        known = (*state.parts, *parts) if state.parts and parts else ()
        return Snapshot(state.revision, {**state.entries, **also}, known)

    async def commit_and_read(
        self, writes: Sequence[Write], parts: Sequence[str], *, expect: Mapping[str, int]
    ) -> Snapshot:
        self._etcd.put(writes, expect)
        if self._etcd.lose_answers:
            raise OutcomeUnknown("its answer was lost")
        found = await self.read(*parts)
        self._etcd.settle_soon()
        return found

    async def watch(self, *parts: str, also: Sequence[str] = ()) -> AsyncGenerator[Snapshot]:
        del also
        yield await self.read(*parts)


@pytest.fixture
def etcd() -> Etcd:
    return Etcd()


def registry(etcd: Etcd, host: str) -> Registry:
    return Registry(etcd.of(host_user(host)))


def propose(etcd: Etcd, host: str, writes: Mapping[str, str], expect: Mapping[str, int]) -> str:
    """As a host that turned enemy does, past its agent. Gives the key."""
    key = f"{proposer_prefix(host)}{etcd.revision}"
    etcd.put([Put(key, Proposal(writes=dict(writes), expect=dict(expect)).text())], {key: 0})
    return key


def seen(etcd: Etcd) -> Mapping[str, Entry]:
    """What every reader finds."""
    return count(etcd.entries).entries


def others(entries: Mapping[str, Entry], enemy: str) -> dict[str, Entry]:
    """VMs that are in the hands of others, and their images."""
    vms = {
        key: Ownership.model_validate_json(entry.value)
        for key, entry in entries.items()
        if key.startswith(VMS)
    }
    held = {
        vm.vm
        for vm in vms.values()
        if vm.custody is not Custody.FREE and vm.owner not in (enemy, "")
    }
    images = {
        key
        for key, entry in entries.items()
        if key.startswith(IMAGES) and ImageClaim.model_validate_json(entry.value).vm in held
    }
    return {key: entries[key] for key in {f"{VMS}{vm}" for vm in held} | images}


def attack(draw: random.Random, entries: Mapping[str, Entry]) -> dict[str, str]:
    """What an owner would write, of anybody's VM, and mostly with something wrong."""
    name = draw.choice(VM_NAMES)
    at = entries.get(VMS + name)
    now = Ownership.model_validate_json(at.value) if at else None
    images = tuple(one for one in IMAGE_IDS if draw.random() < 0.4)
    held = [
        ImageClaim.model_validate_json(entries[IMAGES + one].value).epoch
        for one in images
        if IMAGES + one in entries
    ]
    after = Ownership(
        vm=name,
        custody=Custody.OWNED,
        owner="e",
        epoch=max([now.epoch if now else 0, *held]) + 1,
        claim=f"{draw.getrandbits(64):x}",
        images=images,
    )
    if now is not None and draw.random() < 0.3:  # the same claim, as its owner
        after = now.model_copy(update={"custody": draw.choice(list(Custody))})
        images = after.images if draw.random() < 0.5 else ()
    wrong: list[dict[str, object]] = [
        {"custody": draw.choice(list(Custody))},
        {"owner": draw.choice(("a", "c", ""))},
        {"epoch": max(0, after.epoch + draw.choice((-1, 1, 1 << 62)))},
        {"claim": now.claim if now else ""},
        {"images": IMAGE_IDS},
        {"destination": draw.choice(("e", "a"))},
    ]
    if draw.random() < 0.6:
        after = after.model_copy(update=draw.choice(wrong))
    writes = {VMS + name: after.text()}
    for image in images:
        vm = draw.choice((name, name, name, "", "evil"))
        value = ImageClaim(image=image, epoch=max(1, after.epoch), claim=after.claim, vm=vm)
        writes[IMAGES + image] = value.text()
    return writes


async def honest(draw: random.Random, etcd: Etcd, claims: list[Claim]) -> None:
    """One act of a host that keeps to the rule, which may be refused."""
    host = draw.choice(HOSTS)
    own = registry(etcd, host)
    mine = [claim for claim in claims if claim.host == host]
    claim = draw.choice(mine) if mine else None
    try:
        match draw.randrange(5):
            case 0:
                images = [one for one in IMAGE_IDS if draw.random() < 0.5]
                claims.append(await own.claim(draw.choice(VM_NAMES[:2]), host, images))
            case 1 if claim is not None:
                await own.begin_move(claim, draw.choice((*HOSTS, "e")))
            case 2 if claim is not None:
                claims.append(await own.hand_over(claim))
            case 3 if claim is not None:
                await own.end_move(claim)
            case _ if claim is not None and draw.random() < 0.3:
                await own.release(claim)
            case _:
                return
    except (StateConflict, NotFound):
        return


async def play(seed: int, turns: int) -> tuple[int, int]:
    """A history of honest hosts a and c and the enemy e; how many attacks counted, of how many."""
    draw, etcd, claims = random.Random(seed), Etcd(), list[Claim]()
    etcd.settles_at_once = seed % 2 == 0
    root = etcd.of(ROOT_USER)
    counted = tried = 0
    for _ in range(turns):
        await honest(draw, etcd, claims)
        before = seen(etcd)
        if draw.random() < 0.6:
            writes = attack(draw, before)
            known = Snapshot(0, before)
            key = propose(etcd, "e", writes, {one: known.revision_of(one) for one in writes})
            tried += 1
            counted += key not in count(etcd.entries).refused
            kept = others(before, "e")
            after = seen(etcd)
            assert {key: after[key] for key in kept} == kept
        before = seen(etcd)
        if draw.random() < 0.3:
            await root.settle()
            assert not any(key.startswith(PROPOSALS) for key in etcd.entries)
        elif draw.random() < 0.3:
            etcd.put(settlement(etcd.entries), {})
        assert seen(etcd) == before
    return counted, tried


async def play_all(histories: int) -> tuple[int, int]:
    """Of that many histories."""
    totals = [await play(seed, 40) for seed in range(histories)]
    counted, tried = (sum(one) for one in zip(*totals, strict=True))
    return counted, tried


async def test_an_enemy_changes_nothing_that_is_anothers() -> None:
    counted, tried = await play_all(60)
    assert counted > 50, "it may do what every host may, so the attacks are not just nonsense"
    assert tried > 500


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("_may", lambda *_: True),
        ("_is_claim", lambda *_: True),
        ("_settled", lambda entry: entry.value),  # the revision of the settling commit
    ],
)
async def test_mistakes_in_the_rule_are_found(
    monkeypatch: pytest.MonkeyPatch, name: str, mistake: Callable[..., Any]
) -> None:
    monkeypatch.setattr(proposals, name, mistake)
    with pytest.raises(AssertionError):
        await play_all(40)


async def test_a_move_between_two_hosts_that_settle_nothing(etcd: Etcd) -> None:
    """Nothing waits for the host with the authority."""
    a, b = registry(etcd, "a"), registry(etcd, "b")
    claim = await a.claim("web", "a", ["i1"])
    for source, destination, there in ((a, b, "b"), (b, a, "a")) * 3:
        with pytest.raises(StateConflict, match="owned by"):
            await destination.claim("web", there, ["i1"])
        await source.begin_move(claim, there)
        claim = await source.hand_over(claim)
        assert (await destination.check(claim)).owner == there
    await a.release(await a.claim("web", "a", ["i1"]))
    assert (await b.claim("web", "b", ["i1"])).epoch == 9
    assert len([key for key in etcd.entries if key.startswith(PROPOSALS)]) == 16
    before = seen(etcd)
    await etcd.of(ROOT_USER).settle()
    assert seen(etcd) == before
    assert (await a.find("web")).owner == "b"


async def test_what_settles_may_be_in_force_between_a_look_and_a_commit(etcd: Etcd) -> None:
    """The same compare-and-set, whoever has settled meanwhile."""
    store = etcd.of(host_user("a"))
    claim = await Registry(store).claim("web", "a", ["i1"])
    state = await store.read()
    await etcd.of(ROOT_USER).settle()
    assert await store.read("vms/") == Snapshot(
        etcd.revision, {"vms/web": state.entries["vms/web"]}, ("vms/",)
    )
    owned = Ownership.model_validate_json(state.entries["vms/web"].value)
    moving = owned.model_copy(update={"custody": Custody.MOVING, "destination": "b"})
    expect = {"vms/web": state.revision_of("vms/web")}
    await store.commit([Put("vms/web", moving.text())], expect=expect)
    with pytest.raises(Outdated):
        await store.commit([Put("vms/web", moving.text())], expect=expect)
    assert len([key for key in etcd.entries if key.startswith(PROPOSALS)]) == 1  # withdrawn
    assert (await Registry(store).hand_over(claim)).host == "b"


async def test_only_the_authority_settles_the_unknown(etcd: Etcd) -> None:
    a, b, root = registry(etcd, "a"), registry(etcd, "b"), Registry(etcd.of(ROOT_USER))
    claim = await a.claim("web", "a", ["i1"])
    with pytest.raises(NotAllowed, match="semper host init"):
        await b.mark_unknown(claim, "a is silent")
    await root.mark_unknown(claim, "a is silent")
    with pytest.raises(NotAllowed):
        await b.resolve("web", "b", "it seems dead")
    new = await root.resolve("web", "b", "it is switched off")
    assert (await b.check(new)).owner == "b"
    await b.begin_move(new, "a")


async def test_a_lost_answer_is_looked_for(etcd: Etcd) -> None:
    etcd.lose_answers = True
    claim = await registry(etcd, "a").claim("web", "a", ["i1"])
    assert (await registry(etcd, "a").check(claim)).owner == "a"


async def test_what_cannot_be_withdrawn_is_of_unknown_outcome(
    etcd: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = etcd.of(host_user("b"))
    await registry(etcd, "a").claim("web", "a")

    async def commit(self: object, writes: Sequence[Write], *, expect: Mapping[str, int]) -> int:
        raise Unavailable("cut off")

    monkeypatch.setattr(_Client, "commit", commit)
    free = Ownership(vm="web", custody=Custody.FREE, epoch=1, claim="x").text()
    with pytest.raises(OutcomeUnknown, match="cannot be removed"):
        await store.commit([Put("vms/web", free)], expect={"vms/web": 0})


def test_what_cannot_be_read_counts_for_nothing_and_is_removed(etcd: Etcd) -> None:
    good = Ownership(
        vm="web", custody=Custody.OWNED, owner="e", epoch=1, claim="c", images=()
    ).text()
    texts = (
        "",
        "{}",
        "\\xff",
        "[" * 100_000,
        '{"version":2,"writes":{},"expect":{}}',
        json.dumps({"writes": {}, "expect": {}}),
        json.dumps({"writes": {"vms/web": good}, "expect": {}}),
        json.dumps({"writes": {"vms/db": good}, "expect": {"vms/db": 0}}),
        json.dumps({"writes": {"hosts/e": "{}"}, "expect": {"hosts/e": 0}}),
        json.dumps({"writes": {"vms/web": good}, "expect": {"vms/web": 0, "hosts/a": 0}}),
        json.dumps({"writes": {"vms/web": good + " " * LENGTH_MAX}, "expect": {"vms/web": 0}}),
    )
    for text in texts:
        key = f"{proposer_prefix('e')}{etcd.revision}"
        etcd.put([Put(key, text)], {})
        assert count(etcd.entries).refused[key] is Refusal.UNREADABLE, text[:80]
    etcd.put([Put(f"{PROPOSALS}e", "no host")], {})
    assert not any(key.startswith((VMS, "hosts/")) for key in seen(etcd))
    etcd.put(settlement(etcd.entries), {})
    assert list(etcd.entries) == [DIVIDED]
    # Negative control.
    key = propose(etcd, "e", {"vms/web": good}, {"vms/web": 0})
    assert key not in count(etcd.entries).refused


def test_one_commit_settles_as_much_as_etcd_takes(etcd: Etcd) -> None:
    for n in range(300):
        good = Ownership(
            vm=f"v{n}", custody=Custody.OWNED, owner="e", epoch=1, claim="c", why="x" * 10_000
        )
        propose(etcd, "e", {f"vms/v{n}": good.text()}, {f"vms/v{n}": 0})
    before, commits = seen(etcd), 0
    while writes := settlement(etcd.entries):
        assert len(writes) <= 128
        assert sum(len(write.value) for write in writes if isinstance(write, Put)) < 1 << 20
        assert all(isinstance(write, Put | Delete) for write in writes)
        etcd.put(writes, {})
        assert seen(etcd) == before
        commits += 1
    assert commits > 4


@pytest.mark.parametrize(
    ("images", "why"), [(200, ""), (0, "\N{MATHEMATICAL DOUBLE-STRUCK CAPITAL A}" * 60_000)]
)
def test_nothing_that_a_host_proposes_is_too_much_for_the_commit_that_settles(
    etcd: Etcd, images: int, why: str
) -> None:
    """Else nothing of anybody would ever be settled after it."""
    for name in map("v{}".format, range(8)):
        ids = tuple(f"{name}-{n}" for n in range(images))
        vm = Ownership(
            vm=name, custody=Custody.OWNED, owner="e", epoch=1, claim="c", images=ids, why=why
        )
        writes = {VMS + name: vm.text()}
        for one in ids:
            writes[IMAGES + one] = ImageClaim(image=one, epoch=1, claim="c", vm=name).text()
        propose(etcd, "e", writes, dict.fromkeys(writes, 0))
    honest = Ownership(vm="web", custody=Custody.OWNED, owner="a", epoch=1, claim="c")
    propose(etcd, "a", {"vms/web": honest.text()}, {"vms/web": 0})
    while settling := settlement(etcd.entries):
        assert len(settling) <= 128
        values = (write.value.encode() for write in settling if isinstance(write, Put))
        assert sum(map(len, values)) < 1 << 20
        etcd.put(settling, {})
    assert "vms/web" in etcd.entries
    assert not any(key.startswith(PROPOSALS) for key in etcd.entries)


async def stalled(etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on an enemy overwrites the oldest of its proposals before each commit that settles,
    and has more of them than one commit takes, older than that of the honest host a.
    """
    keys = [f"{proposer_prefix('e')}{n}" for n in range(150)]
    for key in keys:
        etcd.put([Put(key, "nothing")], {})
    await registry(etcd, "a").claim("web", "a", ["i1"])
    put = etcd.put

    def overtaken(writes: Sequence[Write], expect: Mapping[str, int]) -> None:
        there = [key for key in keys if key in etcd.entries]
        if any(isinstance(write, Delete) for write in writes) and there:
            oldest = min(there, key=lambda key: etcd.entries[key].revision)
            put([Put(oldest, "nothing again")], {})
        put(writes, expect)

    monkeypatch.setattr(etcd, "put", overtaken)


async def test_an_enemy_that_overwrites_what_it_proposes_keeps_nobody_from_being_settled(
    etcd: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stalled(etcd, monkeypatch)
    for _ in range(4):  # as each change begins one
        with contextlib.suppress(Outdated):
            await etcd.of(ROOT_USER).settle()
    assert "vms/web" in etcd.entries
    # The control: one commit after the other, each as large as can be, settles nothing.
    fresh = Etcd()
    await stalled(fresh, monkeypatch)
    for _ in range(300):
        writes, now = settlement(fresh.entries), Snapshot(fresh.revision, fresh.entries)
        expect = {write.key: now.revision_of(write.key) for write in writes}
        with pytest.raises(Outdated):
            fresh.put(writes, expect)
    assert "vms/web" not in fresh.entries


async def test_a_cluster_of_an_earlier_release_goes_on_until_it_is_divided(etcd: Etcd) -> None:
    del etcd.entries[DIVIDED]
    a, b = registry(etcd, "a"), registry(etcd, "b")
    claim = await a.claim("web", "a", ["i1"])
    assert "vms/web" in etcd.entries
    await a.begin_move(claim, "b")
    etcd.put([Put(DIVIDED, "{}")], {})
    moved = await a.hand_over(claim)
    assert (await b.check(moved)).owner == "b"
    assert any(key.startswith(PROPOSALS) for key in etcd.entries)


async def test_who_has_not_seen_that_it_was_divided_writes_nothing(
    etcd: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = etcd.of(host_user("b"))

    async def not_yet() -> bool:
        return False

    monkeypatch.setattr(late, "is_divided", not_yet)
    with pytest.raises(Outdated):
        await Registry(late).claim("web", "b")
    assert list(etcd.entries) == [DIVIDED]


async def test_who_keeps_standbys_of_a_vm_may_take_it_over_and_nobody_else(etcd: Etcd) -> None:
    owner, keeper = registry(etcd, "a"), registry(etcd, "c")
    claim = await owner.claim("web", "a", ["i1"])
    present = await owner.find("web")
    taken = present.model_copy(
        update={"owner": "c", "epoch": 2, "claim": "d" * 32, "standby": "c", "images": ()}
    )
    revision = seen(etcd)["vms/web"].revision
    key = propose(etcd, "c", {"vms/web": taken.text()}, {"vms/web": revision})
    assert count(etcd.entries).refused[key] is Refusal.NOT_ALLOWED
    await owner.name_standby(claim, "c")
    with pytest.raises(StateConflict):
        await registry(etcd, "b").take_over(present, "b", ["i2"], "a proof")
    new = await keeper.take_over(present, "c", ["i2"], "a proof")
    now = await owner.find("web")
    assert (now.owner, now.epoch, now.claim, now.standby) == ("c", 2, new.id, "c")
    with pytest.raises(StateConflict, match="owned by c"):
        await owner.claim("web", "a", ["i1"])
