"""The VM of another host: what the store and the storage say of it, and who may take it over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import TypeAdapter

from sempervirt.cluster import cluster as clusters
from sempervirt.cluster import peer
from sempervirt.cluster.cluster import Cluster, Settings
from sempervirt.core.errors import InvalidRequest, NotAllowed, StateConflict, Unavailable
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import End, Runstate
from sempervirt.standby.evidence import Began, Death, Died, Heard, Sign, Silence
from sempervirt.standby.fence_command import FenceCommand
from sempervirt.standby.fence_file import Fences, read_fences
from sempervirt.standby.messages import FirstTold
from sempervirt.standby.rules import Provable
from sempervirt.standby.state import First
from sempervirt.standby.there import FirstThere
from sempervirt.standby.watching import Seen
from sempervirt.store import epoch
from sempervirt.store.port import Delete, Put
from sempervirt.store.records import Custody, Host, Ownership, Presence
from sempervirt.store.registry import Claim, Registry, StaleClaim
from sempervirt.store.sqlite import SqliteStore
from sempervirt.vm import claims
from sempervirt.vm.claims import claim_of
from sempervirt.vm.config import AgentConfig

HOST = Host(name="a", address="127.0.0.1:1", serial="1", not_after=0.0, joined=0.0)
ALIVE = Presence(host="a", boot_id="1", pid=1, since=0.0)
OFF = FenceCommand(("true",), ("echo", "Status: OFF"))
WORD = "I have pulled its plug"


@dataclass
class Lab:
    """Host b, which keeps standbys of web, a VM of host a."""

    store: SqliteStore
    registry: Registry
    first: FirstThere
    fences: list[Fences]
    spec: VmSpec

    async def put(self, key: str, text: str | None) -> None:
        """What another host writes."""
        expect = {key: (await self.store.read(key)).revision_of(key)}
        await self.store.commit([Delete(key) if text is None else Put(key, text)], expect=expect)

    async def ask_store(self) -> None:
        """One look at the store."""
        async with Cluster.opened(self.first._config) as cluster:
            self.first._own = "b"
            await self.first._ask_store(cluster)
        await self.first._look_at_storage("a")


@pytest.fixture
async def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lab]:
    config = AgentConfig(tmp_path / "s", tmp_path / "r")
    config.state_dir.mkdir()
    store = SqliteStore.open(tmp_path / "store.db")
    settings = Settings("lab", "b", "127.0.0.1:2")

    @asynccontextmanager
    async def opened(_config: object) -> AsyncIterator[Cluster]:
        yield Cluster(config, settings, store)

    monkeypatch.setattr(clusters.Cluster, "opened", opened)
    image = tmp_path / "root.raw"
    image.touch()
    spec = VmSpec.model_validate({"name": "web", "disks": [{"name": "root", "image": str(image)}]})
    fences = [Fences()]
    here: Any = SimpleNamespace(vm=None, spec=None, let_go=lambda: None)
    first = FirstThere(
        "web", config, here, spec, lambda: fences[0], lambda _spec: None, lambda: None, lambda: True
    )
    lab = Lab(store, Registry(store), first, fences, spec)
    claim = await lab.registry.claim("web", "a", ["i" * 32])
    await lab.registry.name_standby(claim, "b")
    await lab.put("hosts/a", HOST.text())
    await lab.put("alive/a", ALIVE.text())
    yield lab
    await store.close()


async def owned(lab: Lab) -> Ownership:
    return await lab.registry.find("web")


async def test_a_lease_that_has_ended_is_a_suspicion(lab: Lab) -> None:
    await lab.ask_store()
    assert lab.first._watch.evidence.last_heard(Sign.HOST) is not None
    await lab.put("alive/a", None)
    lab.first._watch.evidence = type(lab.first._watch.evidence)(punctual_since=0.0, looked=0.0)
    await lab.ask_store()
    silences = lab.first._watch.evidence.silences
    assert [(one.sign, one.why) for one in silences] == [
        (Sign.HOST, "the lease of host a has ended")
    ]
    # The storage of these tests belongs to one host, so nothing can be proved by it.
    assert [lab.first._watch.provable] == [Provable.NO]
    assert lab.first.seen()[0] is First.AWAY
    # With a command of the operator it is another matter.
    lab.fences[0] = Fences({"a": OFF})
    lab.first._looked_at = -1e9
    await lab.ask_store()
    assert [lab.first._watch.provable] == [Provable.YES]


@pytest.mark.parametrize(
    ("fences", "word", "means"),
    [
        (Fences(), "", None),
        (Fences(), WORD, WORD),
        (Fences({"a": OFF}), "", "Status: OFF"),
        (Fences({"a": FenceCommand(("true",), ("echo", "Status: ON"))}), WORD, None),
        (Fences({"c": OFF}), "", None),
    ],
)
async def test_without_a_proof_only_an_operator_takes_it_over(
    lab: Lab, fences: Fences, word: str, means: str | None
) -> None:
    lab.fences[0] = fences
    if means is None:
        with pytest.raises(Unavailable, match="may still write"):
            await lab.first.fence(kill=True, word=word)
        return
    await lab.first.fence(kill=True, word=word)
    seen, evidence = lab.first.fenced
    assert means in evidence
    assert seen is not None
    claim = await lab.registry.take_over(seen, "b", ["j" * 32], evidence)
    now = await owned(lab)
    assert (now.owner, now.epoch, now.standby) == ("b", seen.epoch + 1, "b")
    # The answer was lost: the same claim; and the host that comes back is refused.
    assert await lab.registry.take_over(seen, "b", ["j" * 32], evidence) == claim
    with pytest.raises(StateConflict, match="owned by b"):
        await lab.registry.claim("web", "a", ["i" * 32])


async def test_nothing_is_declared_without_a_permission(lab: Lab) -> None:
    # An agent that has just begun knows nothing: what another one has begun is not given up.
    with pytest.raises(Unavailable, match="not known to be dead"):
        await lab.first.fence(kill=False)
    # Its host is heard of, which may have been started anew: that spends no standby.
    lab.first._watch.see(Heard(lab.first._clock(), Sign.HOST))
    with pytest.raises(Unavailable, match="has not said yet what became of it"):
        await lab.first.fence(kill=False)
    # The controls: the VM itself is heard of.
    await tell(lab, Seen(Runstate.RUNNING, ""))
    with pytest.raises(StateConflict, match="not to be taken over"):
        await lab.first.fence(kill=False)
    await tell(lab, Seen(Runstate.UNKNOWN, "adopted, and not asked yet"))
    with pytest.raises(Unavailable, match="not known to be dead"):
        await lab.first.fence(kill=False)
    lab.first._watch.see(Heard(lab.first._clock(), Sign.SERVICE))
    with pytest.raises(StateConflict, match="not to be taken over"):
        await lab.first.fence(kill=False)


WITH_HOST = End("QEMU ended with its host, which was started anew", with_host=True)


async def tell(lab: Lab, seen: Seen) -> None:
    """What host a says when b asks."""

    async def look(*, ready: bool) -> FirstTold:
        assert ready
        return FirstTold("1", seen, lab.spec, "tcg", frozenset({"root"}))

    await lab.first._ask_host(cast(Any, SimpleNamespace(look=look)), "a")
    await lab.first._look_at_storage("a")


async def test_a_host_that_boots_has_time_to_start_its_vm_again_and_then_a_standby_does(
    lab: Lab,
) -> None:
    lab.fences[0] = Fences({"a": OFF})
    now = lab.first._clock()
    first = lab.first
    first._clock = first._watch._clock = lambda: now
    await tell(lab, Seen(Runstate.CRASHED, WITH_HOST.reason, WITH_HOST))
    seen, why = first.seen()
    assert (seen, "its rules wait" in why) == (First.AWAY, True)
    now += 61.0
    seen, why = first.seen()
    assert (seen, "host-booted" in why) == (First.DEAD, True)
    # A take-over that had been declared goes on at once: that the VM ended is its host's word.
    first._watch.see(Began(now))
    await tell(lab, Seen(Runstate.CRASHED, WITH_HOST.reason, WITH_HOST))
    await first.fence(kill=False)
    assert first.fenced[1] != ""
    # The control: the VM was started again.
    await tell(lab, Seen(Runstate.RUNNING, ""))
    first._watch.see(Began(now))
    with pytest.raises(StateConflict):
        await first.fence(kill=False)


async def test_a_host_that_answers_is_not_silent_whatever_the_store_hears_of_it(lab: Lab) -> None:
    await lab.ask_store()
    evidence = type(lab.first._watch.evidence)
    lab.first._watch.evidence = evidence(punctual_since=0.0, looked=0.0)
    await lab.put("alive/a", None)
    await lab.ask_store()
    assert lab.first._watch.evidence.silences != ()
    await tell(lab, Seen(Runstate.RUNNING, ""))
    assert lab.first._watch.evidence.silences == ()


class Answers:
    """A connection to host a, which says so of the VM and of its end."""

    def __init__(self, lab: Lab, seen: Seen, end: Exception | str) -> None:
        self._told = FirstTold("1", seen, lab.spec, "tcg", frozenset({"root"}))
        self._end = end

    async def call(self, method: str, _path: str, **_named: object) -> Any:
        if method == "GET":
            return TypeAdapter(FirstTold).dump_python(self._told, mode="json")
        if isinstance(self._end, Exception):
            raise self._end
        return {"evidence": self._end}


@pytest.mark.parametrize(
    ("seen", "end", "raised", "why"),
    [
        (Seen(Runstate.CRASHED, "?", End("?")), "seen to have ended", None, "host a says"),
        (Seen(Runstate.RUNNING, ""), "", StateConflict, "not to be taken over"),
        # It waits in the kernel: then its host is switched off.
        (Seen(Runstate.CRASHED, "?", End("?")), Unavailable("it waits"), None, "Status: OFF"),
        # Whether it lives its host will know soon: no reason for that.
        (Seen(Runstate.CRASHED, "?", End("?")), NotAllowed("soon"), Unavailable, "says: soon"),
    ],
)
async def test_a_host_that_is_back_is_asked_before_anything_is_ended_there(
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
    seen: Seen,
    end: Exception | str,
    raised: type[Exception] | None,
    why: str,
) -> None:
    """The take-over was declared while its host was silent."""

    @asynccontextmanager
    async def connect(*_: object) -> AsyncIterator[Any]:
        yield Answers(lab, seen, end)

    monkeypatch.setattr(peer, "connect", connect)
    lab.fences[0] = Fences({"a": OFF})
    now = lab.first._clock()
    watch = lab.first._watch
    watch.evidence = type(watch.evidence)(
        looked=now,
        punctual_since=now - 100,
        silences=(Silence(Sign.HOST, now - 90, 90.0, "the lease has ended"),),
    )
    watch.provable = Provable.YES
    lab.first._clock = watch._clock = lambda: now
    if raised is not None:
        with pytest.raises(raised, match=why):
            await lab.first.fence(kill=False)
        return
    await lab.first.fence(kill=False)
    assert why in lab.first.fenced[1]


# What is claimed after a take-over


@pytest.fixture
def as_host(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """From now on whoever asks the store is that host."""
    config = lab.first._config

    def become(name: str) -> None:
        @asynccontextmanager
        async def opened(_config: object) -> AsyncIterator[Cluster]:
            yield Cluster(config, Settings("lab", name, "127.0.0.1:2"), lab.store)

        monkeypatch.setattr(clusters.Cluster, "opened", opened)
        monkeypatch.setattr(claims, "read_settings", lambda _config: object())

    return become


async def test_a_vm_that_was_taken_over_is_not_run_from_its_old_image(
    lab: Lab, tmp_path: Path, as_host: Callable[[str], None]
) -> None:
    """Host b has taken it over and ended it; a would start it from before that, silently."""
    config, image = lab.first._config, lab.spec.disks[0].image
    as_host("a")
    before = await claims.take(config, lab.spec)
    assert before is not None
    copy = tmp_path / "root.raw.standby-1"
    copy.touch()
    own = VmSpec.model_validate({"name": "web", "disks": [{"name": "root", "image": str(copy)}]})
    as_host("b")
    taken = await claims.take_over(config, own, await owned(lab), "a proof", lab.spec)
    assert await claims.release(config, taken)
    for host in ("a", "b", "c"):
        as_host(host)
        with pytest.raises(StateConflict, match=f"{image} lacks what was written"):
            await claims.take(config, lab.spec)
        with pytest.raises(StateConflict, match="left image"):
            await lab.registry.claim("web", host, before.images)
        assert (await owned(lab)).custody is Custody.FREE
    # Its newest images are run anywhere, and those of a second take-over are others again.
    as_host("c")
    again = await claims.take(config, own)
    assert again is not None
    # Nothing is forgotten while a host has it.
    as_host("a")
    with pytest.raises(StateConflict, match="owned by c"):
        await claims.forget_left(config, "web")
    as_host("c")
    assert await claims.release(config, again)
    as_host("a")
    assert await claims.forget_left(config, "web")
    assert not await claims.forget_left(config, "web")
    assert (await owned(lab)).custody is Custody.FREE
    assert await claims.take(config, lab.spec) is not None


async def test_images_are_left_behind_also_on_one_host(
    lab: Lab, tmp_path: Path, as_host: Callable[[str], None]
) -> None:
    """And those that the standby has as well are not."""
    config = lab.first._config
    for name in ("root.raw.standby-1", "data.raw"):
        (tmp_path / name).touch()
    data = {"name": "data", "image": str(tmp_path / "data.raw"), "keep": "latest"}
    disks = [lab.spec.disks[0].model_dump(mode="json"), data]
    before = VmSpec.model_validate({"name": "web", "disks": disks})
    disks = [{"name": "root", "image": str(tmp_path / "root.raw.standby-1")}, data]
    after = VmSpec.model_validate({"name": "web", "disks": disks})
    as_host("a")
    first = await claims.take(config, before)
    second = await claims.take_over(config, after, None, "")
    assert first is not None
    assert (await owned(lab)).left == first.images[:1]
    assert first.images[1] == second.images[1]
    assert await claims.take_over(config, after, None, "") is not None  # its answer was lost
    assert (await owned(lab)).left == first.images[:1]
    with pytest.raises(StateConflict, match="lacks what was written"):
        await claims.take(config, before)


async def test_trying_again_does_not_come_past_a_host_that_has_the_vm_by_its_images(
    lab: Lab, as_host: Callable[[str], None]
) -> None:
    config, image = lab.first._config, lab.spec.disks[0].image
    record = epoch.record_path(image)
    as_host("a")
    first = await claims.take(config, lab.spec)
    assert first is not None
    epoch.advance(record, Claim("web", "c", first.epoch + 1, "d" * 32))
    before = await owned(lab)
    for _ in range(3):
        with pytest.raises(StateConflict, match="may run on host c"):
            await claims.take(config, lab.spec)
    assert await owned(lab) == before
    held = epoch.read_epoch(record)
    assert held is not None
    assert (held.holder, held.epoch) == ("c", first.epoch + 1)
    # It has ended there in order: whoever comes next has it at the first try.
    epoch.release(record, Claim("web", "c", first.epoch + 1, "d" * 32))
    claim = await claims.take(config, lab.spec)
    assert claim is not None
    assert claim.epoch > held.epoch


async def test_a_store_that_was_restored_catches_up_with_what_this_host_had(
    lab: Lab, as_host: Callable[[str], None]
) -> None:
    as_host("a")
    record = epoch.record_path(lab.spec.disks[0].image)
    epoch.identify(record)
    epoch.advance(record, Claim("web", "a", 9, "d" * 32))
    claim = await claims.take(lab.first._config, lab.spec)
    assert claim is not None
    assert claim.epoch == 10


async def test_an_agent_that_has_proved_nothing_claims_nothing(lab: Lab) -> None:
    """Another one has died between the proof and the claim."""
    with pytest.raises(Unavailable, match="not known to be dead"):
        await lab.first.prove_anew(kill=False)
    assert lab.first.fenced[1] == ""
    lab.fences[0] = Fences({"a": OFF})
    await lab.first.prove_anew(kill=True)
    seen, _ = lab.first.fenced
    assert seen == await owned(lab)
    lab.fences[0] = Fences()
    await lab.first.prove_anew(kill=False)  # the control: once is enough


async def test_a_vm_that_is_this_hosts_by_now_is_not_fenced(lab: Lab) -> None:
    await lab.registry.take_over(await owned(lab), "b", ["j" * 32], "a proof")
    await lab.first.prove_anew(kill=False)


@pytest.mark.parametrize("moving", [True, False])
async def test_an_end_at_one_of_two_hosts_proves_nothing(lab: Lab, *, moving: bool) -> None:
    """A standby that would be refused by the store is not spent on that."""
    lab.fences[0] = Fences({"a": OFF})
    claim = claim_of(await owned(lab))
    await lab.registry.begin_move(claim, "c")
    if not moving:
        await lab.registry.mark_unknown(claim, "host a is silent")
    with pytest.raises(Unavailable, match="between a and c"):
        await lab.first.fence(kill=True, word=WORD)
    with pytest.raises(StaleClaim):
        await lab.registry.take_over(await owned(lab), "b", ["j" * 32], "a proof")


async def test_a_vm_that_another_host_has_by_its_images_is_not_taken_over(lab: Lab) -> None:
    """It went there while the store was away: the proof is of the host that the store names."""
    lab.fences[0] = Fences({"a": OFF})
    record = epoch.record_path(lab.spec.disks[0].image)
    epoch.identify(record)
    present = await owned(lab)
    epoch.advance(record, Claim("web", "a", present.epoch, present.claim))
    await lab.first.fence(kill=True)  # the control
    epoch.advance(record, Claim("web", "c", present.epoch + 1, "d" * 32))
    with pytest.raises(Unavailable, match="of host c"):
        await lab.first.fence(kill=True, word=WORD)


@pytest.mark.parametrize("handed_over", [False, True])
async def test_of_a_copied_disk_as_well_only_one_is_given_the_vm(
    lab: Lab, tmp_path: Path, *, handed_over: bool
) -> None:
    """The standby writes copies alone, and the former host may wake, and give the VM away by the
    image that it had.
    """
    copy = tmp_path / "root.raw.standby-1"
    copy.touch()
    own = VmSpec.model_validate({"name": "web", "disks": [{"name": "root", "image": str(copy)}]})
    record = epoch.record_path(lab.spec.disks[0].image)
    seen = await owned(lab)
    before = Claim("web", "a", seen.epoch, seen.claim)
    epoch.advance(record, before)
    if handed_over:
        epoch.advance(record, Claim("web", "c", seen.epoch + 1, "d" * 32))
        with pytest.raises(StaleClaim, match="held by c"):
            await claims.take_over(lab.first._config, own, seen, "a proof", lab.first.left)
        # So c has its claim entered.
        assert (await owned(lab)).custody is Custody.FREE
        return
    claim = await claims.take_over(lab.first._config, own, seen, "a proof", lab.first.left)
    assert (await owned(lab)).owner == "b"
    with pytest.raises(StaleClaim, match="held by b"), epoch.held(record, before):
        pass
    # Once more, after an answer that was lost; and a storage that is gone keeps nothing.
    assert await claims.take_over(lab.first._config, own, seen, "a proof", lab.spec) == claim
    gone = lab.spec.model_copy(
        update={
            "disks": (lab.spec.disks[0].model_copy(update={"image": tmp_path / "no" / "root.raw"}),)
        }
    )
    assert await claims.take_over(lab.first._config, own, seen, "a proof", gone) == claim


async def test_a_release_that_comes_between_costs_no_standby(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host has ended it, said so, and releases it at the same time."""
    seen = await owned(lab)
    commit = lab.store.commit

    async def late(*args: Any, **named: Any) -> int:
        monkeypatch.setattr(lab.store, "commit", commit)
        await lab.registry.release(claim_of(seen))
        return await commit(*args, **named)

    monkeypatch.setattr(lab.store, "commit", late)
    assert (await lab.registry.take_over(seen, "b", ["j" * 32], "a proof")).host == "b"


async def test_a_proof_is_of_the_owner_that_was_seen(lab: Lab) -> None:
    seen = await owned(lab)
    renewed = await lab.registry.claim("web", "a", ["i" * 32])
    with pytest.raises(StaleClaim):
        await lab.registry.take_over(seen, "b", ["j" * 32], "a proof")
    # The control: of the owner of now; but not for a host that keeps no standbys of it.
    seen = await owned(lab)
    with pytest.raises(StateConflict, match="b keeps standbys"):
        await lab.registry.take_over(seen, "c", ["j" * 32], "a proof")
    await lab.registry.begin_move(renewed, "c")
    with pytest.raises(StaleClaim, match="being moved"):
        await lab.registry.take_over(seen, "b", ["j" * 32], "a proof")
    await lab.registry.end_move(renewed)
    assert (await lab.registry.take_over(seen, "b", ["j" * 32], "a proof")).host == "b"


async def test_what_its_own_host_tells_of_its_end_counts(lab: Lab) -> None:
    killed = End("QEMU was killed by signal 9", None, 9)

    async def look(*, ready: bool) -> FirstTold:
        assert ready
        seen = Seen(Runstate.CRASHED, killed.reason, killed)
        return FirstTold("1", seen, lab.spec, "tcg", frozenset({"root"}))

    await lab.first._ask_host(cast(Any, SimpleNamespace(look=look)), "a")
    await lab.first._look_at_storage("a")
    seen, why = lab.first.seen()
    assert (seen, "killed by signal 9" in why) == (First.DEAD, True)


async def test_what_its_own_host_has_stopped_is_left_alone(lab: Lab) -> None:
    async def look(*, ready: bool) -> FirstTold:
        assert ready
        return FirstTold(
            "1", Seen(Runstate.STOPPED, "killed on request"), lab.spec, "tcg", frozenset()
        )

    await lab.first._ask_host(cast(Any, SimpleNamespace(look=look)), "a")
    await lab.first._look_at_storage("a")
    assert lab.first.seen()[0] is First.AWAY
    lab.first._watch.see(Heard(0.0, Sign.HOST))
    with pytest.raises(StateConflict, match="ended on purpose"):
        await lab.first.fence(kill=False)


def dead(lab: Lab) -> bool:
    return lab.first._watch.evidence.death is not None


async def test_what_was_seen_of_one_life_says_nothing_of_another(lab: Lab) -> None:
    """A VM that was dead, and runs on another host by now, is no dead VM."""
    killed = End("QEMU was killed by signal 9", None, 9)
    lab.first._watch.see(Died(1.0, Death.QEMU_ENDED, killed.reason))
    await lab.ask_store()  # of a host that was not known as its owner before
    assert dead(lab) is False
    lab.first._watch.see(Died(1.0, Death.QEMU_ENDED, killed.reason))
    await lab.ask_store()  # of the same one, and of the same life for all that is known
    assert dead(lab) is True
    present = await owned(lab)
    await lab.put("hosts/c", HOST.model_copy(update={"name": "c"}).text())
    await lab.put("vms/web", present.model_copy(update={"owner": "c", "epoch": 2}).text())
    await lab.ask_store()
    assert dead(lab) is False


async def test_another_host_names_no_file_of_this_one(lab: Lab) -> None:
    told = VmSpec.model_validate(
        {"name": "web", "disks": [{"name": "root", "image": "/etc/passwd"}]}
    )

    async def look(*, ready: bool) -> FirstTold:
        assert ready
        return FirstTold("1", Seen(Runstate.RUNNING, ""), told, "tcg", frozenset({"root"}))

    await lab.first._ask_host(cast(Any, SimpleNamespace(look=look)), "a")
    assert lab.first._told is None
    assert lab.first.told_spec == lab.spec
    assert "/etc/passwd" in lab.first._why


async def test_another_keeper_dismisses_this_one(lab: Lab) -> None:
    told = asyncio.Event()
    lab.first._dismissed = told.set
    await lab.ask_store()
    assert not told.is_set()
    present = await owned(lab)
    await lab.put("vms/web", present.model_copy(update={"standby": ""}).text())
    await lab.ask_store()
    assert told.is_set()


# The file of fences


def test_the_commands_are_the_operators(tmp_path: Path) -> None:
    file = tmp_path / "fence.toml"
    assert read_fences(file) == Fences()
    file.write_text('[host.a]\noff = ["true"]\nstatus = ["echo", "Status: OFF"]\n')
    file.chmod(0o600)
    assert read_fences(file).commands == {"a": OFF}
    assert "nfs4" in read_fences(file).revoking
    file.chmod(0o622)
    with pytest.raises(InvalidRequest, match="by others"):
        read_fences(file)


@pytest.mark.parametrize("text", ["[host", "[host.a]\noff = []", "[hots]\n", '[host.a]\noff="rm"'])
def test_a_file_that_is_wrong_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "fence.toml"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(InvalidRequest, match=r"fence\.toml"):
        read_fences(file)
