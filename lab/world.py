"""Two hosts that share an image directory: agents, etcd, and the way between them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from lab.etcd import Etcd, Relay
from lab.namespaces import inside, within
from lab.network import STORE, Link, Network
from sempervirt.agent import AgentConfig
from sempervirt.api.client import Client
from sempervirt.cluster.cluster import (
    Cluster,
    begin_cluster,
    read_credentials,
    write_credentials,
)
from sempervirt.cluster.joining import join_cluster
from sempervirt.guest import location as guest
from sempervirt.host.procfs import command_name
from sempervirt.store.etcd import EtcdStore
from sempervirt.store.etcd_rights import ROOT_USER, new_credentials
from sempervirt.store.guarded import GuardedStore
from sempervirt.store.records import Ownership
from sempervirt.store.registry import Registry
from sempervirt.trust.invitation import Invitation
from sempervirt.vm.config import IMAGE_ROOTS
from sempervirt.vm.setup import prepare_directories

Result = TypeVar("Result")
DEADLINE_S = 180.0
PORT = 7443
POLL_S = 0.05
SERVES = "serve hosts"
BIND = 'mount --bind "$1" "$2"; shift 2; exec "$@"'
QEMU = "qemu-system-x86"
# Where the kernels and the images of the test guests are.
GUESTS = Path(__file__).parents[1] / ".cache"


class Host:
    """One host: its directories, its namespace, its agent."""

    def __init__(self, network: Network, name: str, place: Path) -> None:
        self.network = network
        self.name = name
        self.place = place
        self.config = AgentConfig(place / name / "s", place / name / "r")
        self.namespace = network.host(name)
        self.address = f"{network.address(name)}:{PORT}"
        self.log = place / name / "semperd.log"
        # Where its programs are looked for before they are on the PATH.
        self.programs: Path | None = None
        # Of the agent that is started next.
        self.options: tuple[str, ...] = ()
        # What it has at a path: its own mount of storage that both hosts see.
        self.view: tuple[Path, Path] | None = None
        self._agent: subprocess.Popen[bytes] | None = None
        self.log.parent.mkdir()

    def __str__(self) -> str:
        return self.name

    @property
    def environment(self) -> dict[str, str]:
        """Of programs on this host."""
        own = {
            "SEMPERVIRT_STATE_DIR": str(self.config.state_dir),
            "SEMPERVIRT_RUN_DIR": str(self.config.run_dir),
            "SEMPERVIRT_IMAGE_ROOTS": ":".join(
                map(str, (self.place, GUESTS, *guest.places(), *IMAGE_ROOTS))
            ),
            "COLUMNS": "160",
        }
        if self.programs is not None:
            own["PATH"] = f"{self.programs}:{os.environ['PATH']}"
        return {**os.environ, **own}

    def command(self, name: str, *arguments: str) -> list[str]:
        """An installed program in this host's namespace; it needs `environment`."""
        argv = [program(name), *arguments]
        if self.view is not None:
            # In the mount namespace that `ip netns exec` makes, and in no other one.
            argv = ["sh", "-ec", BIND, "sh", *map(str, self.view), *argv]
        return within(self.namespace, *argv)

    async def semper(self, *arguments: str, code: int = 0) -> str:
        """What the command line says on this host; its complaint, if `code` is not 0."""
        process = await asyncio.create_subprocess_exec(
            *self.command("semper", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment,
        )
        async with asyncio.timeout(DEADLINE_S):
            out, err = await process.communicate()
        words = " ".join(arguments)
        assert process.returncode == code, f"{self.name}: semper {words}: {err.decode()}"
        return (err if code else out).decode()

    async def inside(self, act: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """What a coroutine gives that runs in this host's namespace, in an event loop there."""
        return await asyncio.to_thread(inside, self.namespace, lambda: asyncio.run(act()))

    def client(self) -> AbstractAsyncContextManager[Client]:
        """For the agent's API."""
        return Client.connect(self.config.socket)

    async def start_agent(self) -> None:
        """Returns when it serves, also the other host."""
        seen = self.log.stat().st_size if self.log.exists() else 0
        self._agent = self._launch()
        async with asyncio.timeout(DEADLINE_S):
            while SERVES not in self.log.read_bytes()[seen:].decode():
                assert self._agent.poll() is None, self.log_tail()
                await asyncio.sleep(POLL_S)  # poll interval

    def _launch(self) -> subprocess.Popen[bytes]:
        argv = self.command("semperd", *self.options)
        with self.log.open("ab") as output:
            return subprocess.Popen(argv, stderr=output, env=self.environment)

    def kill_agent(self) -> None:
        """SIGKILL; the VMs run on."""
        if self._agent is not None:
            self._agent.kill()
            self._agent.wait()

    async def end_agent(self) -> None:
        """SIGTERM; the VMs run on."""
        if self._agent is not None:
            self._agent.terminate()
            await asyncio.to_thread(self._agent.wait, DEADLINE_S)

    @property
    def agent_pid(self) -> int:
        """Of the agent that was started last."""
        assert self._agent is not None
        return self._agent.pid

    @property
    def agent_runs(self) -> bool:
        """Whether it does."""
        return self._agent is not None and self._agent.poll() is None

    def processes(self, program: str) -> list[int]:
        """The pids of one of our programs, or of "qemu-system-x86", on this host."""
        return [pid for pid in self.network.pids(self.name) if command_name(pid) == program[:15]]

    def log_tail(self, lines: int = 20) -> str:
        """The end of what the agent wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class World:
    """Made by `opened`."""

    def __init__(self, network: Network, place: Path, memory: Path) -> None:
        self.network = network
        self.images = place / "images"
        self.images.mkdir()
        self.etcd = Etcd(namespace=network.net, address=STORE, memory=memory)
        self.relay = Relay(self.etcd.port, namespace=network.net, address=STORE)
        self.a, self.b = (Host(network, name, place) for name in "ab")

    @property
    def hosts(self) -> tuple[Host, Host]:
        """Both."""
        return self.a, self.b

    @property
    def namespaces(self) -> dict[str, str]:
        """By host."""
        return {host.name: host.namespace for host in self.hosts}

    async def ownership(self, vm: str) -> Ownership:
        """What the store says of a VM. Raises NotFound, Unavailable."""

        async def find() -> Ownership:
            etcd = EtcdStore([self.etcd.url], credentials=read_credentials(self.a.config))
            store = GuardedStore(etcd)
            try:
                return await Registry(store).find(vm)
            finally:
                await store.close()

        return await asyncio.to_thread(inside, self.network.net, lambda: asyncio.run(find()))

    def other(self, host: Host) -> Host:
        """The one that it is not."""
        return self.b if host is self.a else self.a

    @classmethod
    @asynccontextmanager
    async def opened(
        cls,
        link: Link,
        *,
        relayed: bool = False,
        programs: Path | None = None,
        guarded: bool = False,
        views: Mapping[str, Path] | None = None,
        options: tuple[str, ...] = (),
    ) -> AsyncIterator[World]:
        """Two hosts of one cluster, whose agents see each other.

        If it is `relayed`, they reach etcd through `relay`, which can swallow its answers. Both
        look for QEMU in the directory `programs` first. If it is `guarded`, etcd has users, as
        behind https. `views` are the directories that the hosts have in the place of `images`, by
        host; `options` are those of their agents.
        """
        place = Path(tempfile.mkdtemp(prefix="sv-", dir="/tmp"))
        memory = Path(tempfile.mkdtemp(prefix="sv-", dir="/dev/shm"))
        network = await asyncio.to_thread(Network, link, place, memory)
        try:
            world = cls(network, place, memory)
            for host in world.hosts:
                host.programs, host.options = programs, options
                if views is not None:
                    host.view = (views[host.name], world.images)
            try:
                await world.relay.start()
                store = world.relay.url if relayed else world.etcd.url
                await world._begin(store, guarded=guarded)
                yield world
            finally:
                await world._end()
        finally:
            await asyncio.to_thread(network.close)

    async def _begin(self, store: str, *, guarded: bool) -> None:
        """What `semper host init`, `add` and `join` do, without a program for each."""
        await asyncio.to_thread(self.etcd.start)
        a, b = self.hosts
        for host in self.hosts:
            prepare_directories(host.config)
        if guarded:
            a.config.trust_dir.mkdir(mode=0o700)
            write_credentials(a.config, new_credentials(ROOT_USER))
        await a.inside(lambda: begin_cluster(a.config, "sempervirt", "a", a.address, [store]))
        await a.start_agent()
        invitation = await a.inside(lambda: _invite(a.config, "b"))
        await b.inside(lambda: join_cluster(b.config, invitation, b.address))
        await b.start_agent()
        await self.wait_members()

    async def wait_members(self) -> None:
        """Until the store knows that both agents live."""
        async with asyncio.timeout(DEADLINE_S):
            while not await self.a.inside(lambda: _all_live(self.a.config)):  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)  # poll interval

    async def _end(self) -> None:
        for host in self.hosts:
            host.kill_agent()
        await self.relay.close()
        await asyncio.to_thread(self.etcd.remove)


async def _invite(config: AgentConfig, name: str) -> Invitation:
    async with Cluster.opened(config) as cluster:
        return await cluster.invite(name, timedelta(hours=1))


async def _all_live(config: AgentConfig) -> bool:
    async with Cluster.opened(config) as cluster:
        return all(member.presence for member in await cluster.members())


def program(name: str) -> str:
    """The path of an installed program."""
    return str(Path(sys.executable).with_name(name))
