"""`semper host init` that failed leaves this host in no cluster, and the corrected one works."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sempervirt.cluster.cluster import Cluster, begin_cluster, check_endpoint, read_settings
from sempervirt.cluster.leaving import leave_cluster
from sempervirt.core.errors import InvalidRequest, StateConflict, Unavailable
from sempervirt.host.places import Places
from sempervirt.store.port import Put
from sempervirt.store.records import Host, Presence
from sempervirt.trust.authority import Authority

# Nobody listens at the port of "discard".
NOBODY = "http://127.0.0.1:9"
ADDRESS = "127.0.0.1:7443"


@pytest.fixture
def places(tmp_path: Path) -> Places:
    found = Places(tmp_path / "state", tmp_path / "run")
    found.state_dir.mkdir()
    return found


@pytest.mark.parametrize(
    "wrong", ["127.0.0.1:2379", "ftp://127.0.0.1:2379", "http://127.0.0.1", "http://", "etcd", ""]
)
async def test_a_store_that_cannot_be_one_leaves_nothing(places: Places, wrong: str) -> None:
    with pytest.raises(InvalidRequest, match="store"):
        await begin_cluster(places, "lab", "a", ADDRESS, [wrong])
    assert [*places.state_dir.iterdir()] == []
    await begin_cluster(places, "lab", "a", ADDRESS, [])  # the corrected one: SQLite
    settings = read_settings(places)
    assert settings is not None
    assert settings.store == ()


@pytest.mark.parametrize(
    "right", ["http://10.0.0.1:2379", "https://etcd.lab:2379/", "http://[::1]:1"]
)
def test_what_is_an_address_of_a_store_is_taken(right: str) -> None:
    assert check_endpoint(right) == right


async def test_a_store_that_is_not_there_can_be_corrected(places: Places) -> None:
    with pytest.raises(Unavailable):
        await begin_cluster(places, "lab", "a", ADDRESS, [NOBODY])
    assert read_settings(places) is None  # VMs start here as before
    authority = Authority.load(places.trust_dir).certificate
    issued = await begin_cluster(places, "lab", "b", ADDRESS, [])
    assert read_settings(places) is not None
    assert Authority.load(places.trust_dir).certificate == authority  # etcd may have it already
    assert (await begin_cluster(places, "lab", "b", ADDRESS, [])).serial == issued.serial


async def test_a_cluster_that_was_begun_is_not_begun_differently(places: Places) -> None:
    """The control: what was in force stays in force."""
    await begin_cluster(places, "lab", "a", ADDRESS, [])
    with pytest.raises(StateConflict, match="belongs to the cluster lab"):
        await begin_cluster(places, "lab", "b", ADDRESS, [])


async def test_an_authority_serves_no_cluster_of_another_name(places: Places) -> None:
    with pytest.raises(Unavailable):
        await begin_cluster(places, "lab", "a", ADDRESS, [NOBODY])
    with pytest.raises(StateConflict, match="another name"):
        await begin_cluster(places, "other", "a", ADDRESS, [])


async def test_what_one_host_says_of_itself_is_said_of_no_other(places: Places) -> None:
    """A host may write below alive/ what it likes, but under its own name alone."""
    await begin_cluster(places, "lab", "a", ADDRESS, [])
    honest = Presence(host="b", boot_id="1", pid=1, since=1.0)
    async with Cluster.opened(places) as cluster:
        for name in ("b", "c", "d", "dead"):
            host = Host(name=name, address=ADDRESS, serial=name, not_after=1.0, joined=1.0)
            key = f"hosts/{name}"
            await cluster.store.commit([Put(key, host.text())], expect={key: 0})
        forged = Presence(host="dead", boot_id="1", pid=1, since=1.0)
        for name, text in (("b", honest.text()), ("c", forged.text()), ("d", '{"host": 7}')):
            key = f"alive/{name}"
            await cluster.store.commit([Put(key, text)], expect={key: 0})
        members = {member.host.name: member.presence for member in await cluster.members()}
    assert members["b"] == honest
    assert members["dead"] is None
    for name in ("c", "d"):  # alive, so nobody takes their VMs; and they get none
        presence = members[name]
        assert presence is not None
        assert presence.out_of_service


# semper host leave


async def test_a_host_that_has_left_begins_anew(places: Places) -> None:
    await begin_cluster(places, "lab", "a", ADDRESS, [])
    left = await leave_cluster(places, force=False)
    assert (left.cluster, left.host) == ("lab", "a")
    assert read_settings(places) is None
    assert Authority.load(left.aside / "trust").certificate is not None  # put aside, not deleted
    await begin_cluster(places, "other", "b", ADDRESS, [])
    settings = read_settings(places)
    assert settings is not None
    assert (settings.cluster, settings.host) == ("other", "b")


async def test_half_a_cluster_can_be_left(places: Places) -> None:
    with pytest.raises(Unavailable):
        await begin_cluster(places, "lab", "a", ADDRESS, [NOBODY])
    await leave_cluster(places, force=False)
    await begin_cluster(places, "other", "a", ADDRESS, [])


async def test_there_is_nothing_to_leave_twice(places: Places) -> None:
    await begin_cluster(places, "lab", "a", ADDRESS, [])
    await leave_cluster(places, force=False)
    with pytest.raises(StateConflict, match="no cluster"):
        await leave_cluster(places, force=True)


async def test_nobody_leaves_while_vms_are_on_record(places: Places) -> None:
    """Also with --force: the store says whose the VM is."""
    await begin_cluster(places, "lab", "a", ADDRESS, [])
    record = places.vm_state_dir("web") / "vm.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    with pytest.raises(StateConflict, match="web"):
        await leave_cluster(places, force=True)
    assert read_settings(places) is not None
    record.unlink()
    await leave_cluster(places, force=False)


async def test_an_authority_that_others_need_stays(places: Places) -> None:
    await begin_cluster(places, "lab", "a", ADDRESS, [])
    async with Cluster.opened(places) as cluster:
        host = Host(name="b", address=ADDRESS, serial="1", not_after=1e12, joined=1.0)
        await cluster.store.commit([Put("hosts/b", host.text())], expect={"hosts/b": 0})
    with pytest.raises(StateConflict, match="certificates of b"):
        await leave_cluster(places, force=False)
    assert (await leave_cluster(places, force=True)).host == "a"


async def test_a_leaving_that_failed_midway_is_repeated(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    await begin_cluster(places, "lab", "a", ADDRESS, [])
    (places.trust_dir / "authority.key").unlink()  # as on a host that has joined
    (places.trust_dir / "authority.crt").unlink()
    rename, failed = Path.rename, list[Path]()

    def fail_once(self: Path, target: Path) -> Path:
        if self.name == "trust" and not failed:
            failed.append(self)
            raise OSError(5, "an input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(Unavailable, match="repeat"):
        await leave_cluster(places, force=False)
    monkeypatch.setattr(time, "strftime", lambda *_: "later")
    left = await leave_cluster(places, force=False)
    assert (left.aside / "trust").is_dir()
    assert not places.trust_dir.exists()
    with pytest.raises(StateConflict, match="nothing to leave"):
        await leave_cluster(places, force=False)
