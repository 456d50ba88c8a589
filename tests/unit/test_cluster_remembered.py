"""A host whose disk hangs talks to the others by what it remembers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sempervirt.cluster import cluster as clusters
from sempervirt.cluster.cluster import (
    Cluster,
    begin_cluster,
    forget,
    read_settings,
    remember,
    write_credentials,
    write_settings,
)
from sempervirt.core.errors import SempervirtError, StateConflict
from sempervirt.host.places import Places
from sempervirt.store.etcd import Credentials
from sempervirt.store.guarded import GuardedStore


@pytest.fixture
async def config(tmp_path: Path) -> Places:
    places = Places(tmp_path / "s", tmp_path / "r")
    places.state_dir.mkdir(mode=0o700)
    await begin_cluster(places, "lab", "a", "127.0.0.1:7443", [])
    return places


async def test_what_a_connection_takes_is_in_memory(config: Places) -> None:
    async with Cluster.opened(config) as cluster:
        assert cluster.wire_trust == config.trust_dir
    remember(config)
    shutil.rmtree(config.trust_dir)
    config.cluster_file.unlink()
    async with Cluster.opened(config) as cluster:
        assert cluster.settings.host == "a"
        assert cluster.client_context() is cluster.client_context()
        pair = cluster.wire_trust / "host.pem"
        assert pair.stat().st_mode & 0o777 == 0o600
        assert (cluster.wire_trust / "authority.crt").exists()
    # The control: without the memory nothing is there any more.
    forget(config)
    with pytest.raises(StateConflict, match="belongs to no cluster"):
        async with Cluster.opened(config):
            pass


async def test_files_that_others_change_count_and_wrong_ones_do_not(config: Places) -> None:
    remember(config)
    before = clusters._remembered[config.cluster_file]
    remember(config)
    assert clusters._remembered[config.cluster_file] is before
    settings = read_settings(config)
    assert settings is not None
    write_settings(config, settings)  # by this process: counts at once
    assert config.cluster_file not in clusters._remembered
    remember(config)
    text = config.cluster_file.read_text()
    config.cluster_file.write_text("{")
    with pytest.raises(SempervirtError):
        remember(config)
    assert read_settings(config) == settings
    config.cluster_file.write_text(text.replace("7443", "7444"))
    remember(config)
    found = read_settings(config)
    assert found is not None
    assert found.address == "127.0.0.1:7444"
    forget(config)


async def test_the_store_is_the_same_one_by_memory(config: Places) -> None:
    """Where hosts have users it keeps them apart, whether or not its credentials are remembered."""
    settings = read_settings(config)
    assert settings is not None
    write_settings(config, replace(settings, store=("https://127.0.0.1:1",)))
    write_credentials(config, Credentials("a", "secret"))
    remember(config)
    assert config.cluster_file in clusters._remembered
    for _ in range(2):
        async with Cluster.opened(config) as cluster:
            assert isinstance(cluster.store, GuardedStore)
            assert cluster.store.etcd.credentials == Credentials("a", "secret")
        forget(config)
