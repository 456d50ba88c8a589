"""Who may do what: a joined host, a viewer, an operator, an admin from elsewhere, and root here.

The attacks of a joined host are as they succeeded once: as root, by programs and paths of its own.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from lab.etcd import Etcd
from lab.ports import free_address
from sempervirt.agent.agent import Agent
from sempervirt.api.client import Client
from sempervirt.api.rights import Operation, roles_for
from sempervirt.api.schemas import RestoreRequest
from sempervirt.api.server import serving, serving_hosts
from sempervirt.cluster import operators
from sempervirt.cluster.cluster import Cluster, begin_cluster
from sempervirt.cluster.joining import join_cluster
from sempervirt.cluster.membership import Membership
from sempervirt.core.errors import (
    AgentUnavailable,
    NotAllowed,
    NotFound,
    OutcomeUnknown,
    SempervirtError,
)
from sempervirt.core.roles import OPERATORS, Role
from sempervirt.host.http import Connection
from sempervirt.migration.messages import ArrivalRequest
from sempervirt.qemu.spec import VmSpec
from sempervirt.store import epoch
from sempervirt.store.registry import Registry
from sempervirt.trust.identity import Identity
from sempervirt.trust.operator import operator_context
from sempervirt.vm.config import AgentConfig
from tests.integration.test_hosts import IN_FORCE_S, LOOK_S

DEADLINE_S = 90.0
HOUR = timedelta(hours=1)
Spec = Callable[..., VmSpec]


class Lab:
    """Host a, whose agent serves; host b, which has joined; and operators."""

    def __init__(self, place: Path, cluster: Cluster, agent: Agent) -> None:
        self.place = place
        self.cluster = cluster
        self.agent = agent
        self.b = AgentConfig(place / "b" / "s", place / "b" / "r")

    async def tls(self, role: Role) -> ssl.SSLContext:
        """What one with that role shows."""
        match role:
            case Role.HOST:
                return Identity(self.b.trust_dir).client_context()
            case Role.INVITATION:
                return (await self.cluster.invite("c", HOUR)).client_context()
            case _:
                made = await operators.add_operator(self.cluster, role.value, role, HOUR)
                path = self.place / f"{role.value}.pem"
                path.touch(0o600)
                path.write_text(made.text())
                return operator_context(path)

    @asynccontextmanager
    async def ask(self, role: Role) -> AsyncIterator[Connection]:
        """A connection as one with that role."""
        address, tls = self.cluster.settings.address, await self.tls(role)
        async with Connection.to_host(address, "a", tls) as connection:
            if role in OPERATORS:
                await known(lambda: connection.call("GET", "/agent"))
            yield connection

    @asynccontextmanager
    async def client(self, role: Role) -> AsyncIterator[Client]:
        """The same, with a client's words."""
        address, tls = self.cluster.settings.address, await self.tls(role)
        async with Client.connect_host(address, "a", tls) as client:
            if role in OPERATORS:
                await known(client.agent)
            yield client


async def known(ask: Callable[[], Awaitable[object]]) -> None:
    """An operator is known to the agents once the store has told them."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await ask()
            except SempervirtError:
                await asyncio.sleep(0.02)  # poll interval
            else:
                return


@pytest.fixture(scope="module")
def etcd() -> Iterator[Etcd]:
    with Etcd.running() as server:
        yield server


@pytest.fixture
async def lab(place: Path, etcd: Etcd) -> AsyncIterator[Lab]:
    images, saved = place / "images", place / "saved"
    images.mkdir()
    saved.mkdir()
    a = AgentConfig(place / "a" / "s", place / "a" / "r")
    a = AgentConfig(a.state_dir, a.run_dir, image_roots=(images,), saved_roots=(saved,))
    a.state_dir.mkdir(parents=True)
    etcd_root = await fresh(etcd)
    await begin_cluster(a, "lab", "a", free_address(), [etcd_root])
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(Agent.open(a))
        cluster = await stack.enter_async_context(Cluster.opened(a))
        membership = await stack.enter_async_context(Membership.kept(cluster, lease_s=5))
        await stack.enter_async_context(serving(agent, a.socket))
        await stack.enter_async_context(serving_hosts(agent, membership))
        found = Lab(place, cluster, agent)
        found.b.state_dir.mkdir(parents=True)
        await join_cluster(found.b, await cluster.invite("b", HOUR), free_address())
        yield found


async def fresh(etcd: Etcd) -> str:
    """The store, with nothing in it."""
    await asyncio.to_thread(etcd.kill)
    etcd.forget()
    await asyncio.to_thread(etcd.start)
    return etcd.url


@pytest.fixture
def spec(lab: Lab) -> VmSpec:
    """A VM that gets no further than its firmware, below the roots."""
    image = lab.place / "images" / "disk.raw"
    image.touch()
    os.truncate(image, 32 << 20)
    disk = {"name": "root", "image": str(image)}
    return VmSpec.model_validate({"name": "web", "memory": "64M", "disks": [disk]})


# The table


def answers(address: str) -> dict[Operation, tuple[str, str, Any]]:
    """A request for each operation, of things that are not there; `address` is the host's."""
    vm, disk, arrival = "/vms/none", "/disks/none/root", f"/arrivals/{'0' * 32}"
    described = {"name": "none", "memory": "64M"}
    return {
        Operation.GET_AGENT: ("GET", "/agent", None),
        Operation.GET_METRICS: ("GET", f"https://{address}/metrics", None),
        Operation.GET_HOST: ("GET", "/host", None),
        Operation.JOIN: ("POST", "/join", {"request": "none", "address": "127.0.0.1:1"}),
        Operation.RENEW_CERTIFICATE: ("POST", "/renew", {"request": "none"}),
        Operation.LIST_VMS: ("GET", "/vms", None),
        Operation.RUN_VM: ("POST", "/vms", {**described, "kernel": "/none"}),
        Operation.GET_VM: ("GET", vm, None),
        Operation.FORGET_VM: ("DELETE", vm, None),
        Operation.START_VM: ("POST", f"{vm}/start", None),
        Operation.PAUSE_VM: ("POST", f"{vm}/pause", None),
        Operation.RESUME_VM: ("POST", f"{vm}/resume", None),
        Operation.STOP_VM: ("POST", f"{vm}/stop", {}),
        Operation.KILL_VM: ("POST", f"{vm}/kill", None),
        Operation.RESTART_QEMU: ("POST", f"{vm}/restart-qemu", {}),
        Operation.SAVE_VM: ("POST", f"{vm}/save", {"file": "/none"}),
        Operation.RESTORE_VM: ("POST", "/vms/restore", {"file": "/none"}),
        Operation.GET_VM_LOG: ("GET", f"{vm}/logs", None),
        Operation.LIST_DISKS: ("GET", "/disks", None),
        Operation.GET_DISK: ("GET", disk, None),
        Operation.LIST_DEVICES: ("GET", "/passthrough", None),
        Operation.GET_DEVICE: ("GET", "/passthrough/none/nvme", None),
        Operation.GUARD_DISK: ("PUT", f"{disk}/guard", {"image": "/none"}),
        Operation.UNGUARD_DISK: ("DELETE", f"{disk}/guard", None),
        Operation.UPGRADE_DISK: ("POST", f"{disk}/upgrade", {}),
        Operation.RESIZE_DISK: ("POST", f"{disk}/resize", {"size_bytes": 1}),
        Operation.RESCUE_DISK: ("POST", f"{disk}/rescue", {"to": "/none"}),
        Operation.LIST_STANDBYS: ("GET", "/standbys", None),
        Operation.GET_STANDBY: ("GET", f"{vm}/standby", None),
        Operation.LIST_LOSSES: ("GET", f"{vm}/standby/lost", None),
        Operation.ENABLE_STANDBY: ("PUT", f"{vm}/standby", {}),
        Operation.FAILOVER_STANDBY: ("POST", f"{vm}/standby/failover", {}),
        Operation.TEST_STANDBY: ("POST", f"{vm}/standby/test", None),
        Operation.CANCEL_STANDBY: ("POST", f"{vm}/standby/cancel", None),
        Operation.KEEP_STANDBY: ("PUT", f"{vm}/standby/kept", {"spec": described, "policy": {}}),
        Operation.GET_FIRST: ("GET", f"{vm}/first", None),
        Operation.SNAPSHOT_FIRST: ("POST", f"{vm}/first/snapshot", {"disks": []}),
        Operation.GIVE_UP_FIRST: (
            "POST",
            f"{vm}/first/give-up",
            {"disk": "root", "snapshot": 1, "ours": [], "reader": "none"},
        ),
        Operation.TAKE_OVER_KEPT: ("POST", f"{vm}/standby/kept/take-over", None),
        Operation.END_FIRST: ("POST", f"{vm}/first/end", {"kill": False}),
        Operation.DISABLE_STANDBY: ("DELETE", f"{vm}/standby", None),
        Operation.SNAPSHOT_VM: ("POST", f"{vm}/snapshot", {}),
        Operation.GET_LAYERS: ("GET", f"{disk}/layers", None),
        Operation.MERGE_LAYERS: ("POST", f"{disk}/merge", {}),
        Operation.EXPORT_SNAPSHOT: ("POST", f"{disk}/export", {"snapshot": 1, "to": "/none"}),
        Operation.UNPIN_SNAPSHOT: ("POST", f"{disk}/unpin", {"snapshot": 1, "reader": "none"}),
        Operation.MOVE_QUEUES: ("POST", f"{disk}/threads", {"map": [0]}),
        Operation.GET_MAP: ("GET", f"{disk}/map", None),
        Operation.VERIFY_MAP: ("POST", f"{disk}/map/verify", None),
        Operation.EXPORT_MAP: ("GET", f"{disk}/map/export", None),
        Operation.MIGRATION_SIDE: ("POST", "/migration/side", described),
        Operation.MIGRATION_OBSTACLES: ("GET", f"{vm}/migration/obstacles?host=b", None),
        Operation.MIGRATE_VM: ("POST", f"{vm}/migration", {"to": "b"}),
        Operation.GET_MIGRATION: ("GET", f"{vm}/migration", None),
        Operation.CANCEL_MIGRATION: ("DELETE", f"{vm}/migration", None),
        Operation.RESOLVE_VM: ("POST", f"{vm}/resolve", {"owner": "b", "evidence": "none"}),
        Operation.PREPARE_ARRIVAL: ("POST", "/arrivals", {}),
        Operation.GET_ARRIVAL: ("GET", f"{arrival}?seen=incoming", None),
        Operation.PROMISE_ARRIVAL: ("POST", f"{arrival}/promise", None),
        Operation.REPLAY_DEVICES: ("POST", f"{arrival}/devices/round", {"writes": {}}),
        Operation.RECEIVE_DEVICES: ("POST", f"{arrival}/devices", {"states": {}}),
        Operation.RECOVER_ARRIVAL: ("POST", f"{arrival}/recover", None),
        Operation.RUN_ARRIVAL: ("POST", f"{arrival}/run", {"epoch": 1, "claim": "0" * 32}),
        Operation.ABORT_ARRIVAL: ("POST", f"{arrival}/abort", None),
        Operation.LIST_EVENTS: ("GET", "/events?after=none", None),
        Operation.GET_GUARD: ("GET", "/guard", None),
        Operation.LIST_GUARD_EVENTS: ("GET", "/guard/events", None),
        Operation.SIMULATE_SIGN: ("POST", "/guard/simulate", {"sign": "log.oops"}),
        Operation.SURVEY_HOST: ("GET", "/host/survey", None),
        Operation.GET_CAPACITY: ("GET", "/host/capacity?lost=1", None),
        Operation.LIST_PLACES: ("GET", f"{vm}/places", None),
        Operation.PLAN_EVACUATION: ("POST", "/host/evacuation/plan", {"to": ["a"]}),
        Operation.EVACUATE_HOST: ("POST", "/host/evacuation", {"to": ["a"]}),
        Operation.GET_EVACUATION: ("GET", "/host/evacuation", None),
        Operation.CANCEL_EVACUATION: ("DELETE", "/host/evacuation", None),
        Operation.RETURN_HOST: ("POST", "/host/return", {}),
    }


@pytest.mark.parametrize("role", Role)
async def test_each_role_may_do_what_the_table_says_and_nothing_else(lab: Lab, role: Role) -> None:
    asked = answers(lab.cluster.settings.address)
    assert asked.keys() == {*Operation}
    async with lab.ask(role) as connection:
        for operation, (method, path, body) in asked.items():
            refused = await refusal(connection.call(method, path, body=body))
            by_right = refused is not None and is_for_want_of_a_role(refused)
            assert by_right is (role not in roles_for(operation)), (operation, refused)


async def refusal(asked: Awaitable[object]) -> SempervirtError | None:
    try:
        await asked
    except SempervirtError as error:
        return error
    return None


def is_for_want_of_a_role(error: SempervirtError) -> bool:
    return isinstance(error, NotAllowed) and (
        "has the role" in error.message or "good for joining" in error.message
    )


async def test_what_is_no_operation_is_not_served(lab: Lab) -> None:
    async with lab.ask(Role.ADMIN) as connection:
        for path in ("/../openapi.json", "/../docs", "/nonsense"):
            with pytest.raises(SempervirtError, match="answered 404"):
                await connection.call("GET", path)


# Programs and paths


@pytest.mark.parametrize("role", [Role.HOST, Role.ADMIN])
async def test_nobody_runs_a_program_from_elsewhere(lab: Lab, spec: VmSpec, role: Role) -> None:
    """A joined host ran `upgrade` and `restart-qemu` with programs of its own, as root."""
    done = lab.place / "done"
    program = lab.place / "images" / "program"
    program.write_text(f"#!/bin/sh\ntouch {done}\n")
    program.chmod(0o755)
    await lab.agent.run_vm(spec)
    async with lab.client(role) as client:
        with pytest.raises(NotAllowed):
            await client.upgrade_disk("web/root", program)
        with pytest.raises(NotAllowed):
            await client.restart_qemu("web", program)
    assert not done.exists()
    # Root on the host itself may; such a program does not serve.
    async with Client.connect(lab.agent.config.socket) as here:
        with pytest.raises(SempervirtError) as caught:
            await here.upgrade_disk("web/root", program)
        assert not isinstance(caught.value, NotAllowed)
    assert done.exists()
    await lab.agent.vm("web").kill()


@pytest.mark.parametrize("role", [Role.HOST, Role.ADMIN])
async def test_no_file_is_read_or_written_outside_of_the_roots(
    lab: Lab, spec: VmSpec, role: Role
) -> None:
    """A joined host saved a VM over any file, and booted one with initrd = /etc/shadow."""
    secret = lab.place / "secret"
    secret.write_text("secret")
    link = lab.place / "images" / "link"
    link.symlink_to(secret)
    above = lab.place / "images" / ".." / "secret"
    kernel = lab.place / "images" / "kernel"
    kernel.write_text("none")
    await lab.agent.run_vm(spec)
    async with lab.client(role) as client:
        for path in (secret, link, above, Path("/etc/shadow")):
            for key in ("kernel", "initrd", "firmware"):
                described = {"name": "thief", "kernel": str(kernel), key: str(path)}
                with pytest.raises(NotAllowed):
                    await client.run_vm(VmSpec.model_validate(described))
            disk = {"name": "root", "image": str(path), "read_only": True}
            with pytest.raises(NotAllowed):
                await client.run_vm(VmSpec.model_validate({"name": "thief", "disks": [disk]}))
            with pytest.raises(NotAllowed):
                await client.save_vm("web", path)
            with pytest.raises(NotAllowed):
                await client.rescue_disk("web/root", path)
    assert secret.read_text() == "secret"
    assert lab.agent.vm("web").end is None
    await lab.agent.vm("web").kill()


async def test_an_admin_from_elsewhere_works_below_the_roots(lab: Lab, spec: VmSpec) -> None:
    saved = lab.place / "saved" / "web"
    async with lab.client(Role.ADMIN) as client:
        await client.run_vm(spec)
        await client.save_vm("web", saved)
        kept = saved.read_bytes()
        await client.forget_vm("web")
        restored = await client.restore_vm(RestoreRequest(file=saved))
        assert restored.name == "web"
        with pytest.raises(NotAllowed, match="is not replaced"):
            await client.save_vm("web", saved)
        assert saved.read_bytes() == kept
        await client.kill_vm("web")


async def test_a_saved_state_does_not_name_files_outside_of_the_roots(
    lab: Lab, spec: VmSpec
) -> None:
    """Whoever can put a file below the roots would have had root read the files that it names."""
    elsewhere = lab.place / "elsewhere.raw"
    elsewhere.touch()
    os.truncate(elsewhere, 32 << 20)
    disk = {"name": "root", "image": str(elsewhere)}
    described = VmSpec.model_validate({"name": "web", "memory": "64M", "disks": [disk]})
    saved = lab.place / "saved" / "web"
    await lab.agent.run_vm(described)
    await lab.agent.save_vm("web", saved)
    await lab.agent.forget_vm("web")
    async with lab.client(Role.ADMIN) as client:
        with pytest.raises(NotAllowed, match=r"elsewhere\.raw is not below"):
            await client.restore_vm(RestoreRequest(file=saved))
    async with Client.connect(lab.agent.config.socket) as here:
        await here.restore_vm(RestoreRequest(file=saved))
    await lab.agent.vm("web").kill()


# What hosts may ask of each other


async def test_a_host_sends_only_what_the_store_says(lab: Lab, spec: VmSpec) -> None:
    registry = Registry(lab.cluster.store)
    image = epoch.identify(epoch.record_path(spec.disks[0].image))

    def request(described: VmSpec, at: int, images: dict[str, str]) -> dict[str, Any]:
        asked = ArrivalRequest(
            id="0" * 32,
            source="b",
            epoch=at,
            spec=described,
            machine="pc-q35-9.0",
            accelerator="tcg",
            running=True,
            images=images,
        )
        return asked.model_dump(mode="json")

    async with lab.ask(Role.HOST) as host:

        async def refused(why: str, body: dict[str, Any]) -> None:
            with pytest.raises(NotAllowed, match=why):
                await host.call("POST", "/arrivals", body=body, timeout_s=DEADLINE_S)
            assert not lab.agent.vms

        await refused("does not say that VM web is of b", request(spec, 1, {"root": image}))
        with pytest.raises(NotAllowed, match="does not say that VM web is of b"):
            await host.call("POST", "/migration/side", body=spec.model_dump(mode="json"))
        claim = await registry.claim("web", "b", [image])
        await host.call("POST", "/migration/side", body=spec.model_dump(mode="json"))
        await refused("web moves to a", request(spec, claim.epoch, {"root": image}))
        await registry.begin_move(claim, "c")
        await refused("web moves to a", request(spec, claim.epoch, {"root": image}))
        await registry.end_move(claim)
        await registry.begin_move(claim, "a")
        await refused("another epoch", request(spec, claim.epoch + 1, {"root": image}))
        await refused("other images", request(spec, claim.epoch, {}))
        other = spec.disks[0].image.with_name("other.raw")
        other.touch()
        os.truncate(other, 1 << 20)
        more = [*spec.model_dump(mode="json")["disks"], {"name": "more", "image": str(other)}]
        larger = VmSpec.model_validate({**spec.model_dump(mode="json"), "disks": more})
        await refused("nothing of disk more", request(larger, claim.epoch, {"root": image}))
        shadow = VmSpec.model_validate(
            {**spec.model_dump(mode="json"), "kernel": "/etc/passwd", "initrd": "/etc/shadow"}
        )
        await refused("is not below", request(shadow, claim.epoch, {"root": image}))
        # Nothing of that stood in the way of the right one, which gets as far as QEMU.
        error = await refusal(
            host.call(
                "POST",
                "/arrivals",
                body=request(spec, claim.epoch, {"root": image}),
                timeout_s=DEADLINE_S,
            )
        )
        assert not isinstance(error, NotAllowed), error
    for vm in [*lab.agent.vms.values()]:
        await vm.kill()


# Users of this host

ASK = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
try:
    connection.sendall(b"GET /v1/agent HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n")
    print(connection.recv(100))
except (ConnectionResetError, BrokenPipeError):  # closed after the question, or before it
    print(b"")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
async def test_another_user_gets_nothing_even_from_an_open_socket(lab: Lab) -> None:
    path = lab.agent.config.socket
    for above in (path, *path.parents[: len(path.parents) - 2]):
        above.chmod(0o777)

    async def said(user: int) -> str:
        process = await asyncio.create_subprocess_exec(
            "/usr/bin/python3",
            "-c",
            ASK,
            path,
            user=user,
            group=user,
            stdout=asyncio.subprocess.PIPE,
        )
        return (await process.communicate())[0].decode().strip()

    assert "200 OK" in await said(0)
    assert await said(65534) == "b''"


async def test_a_program_of_a_vm_is_refused_whoever_runs_it(lab: Lab, tmp_path: Path) -> None:
    async def said(program: str) -> str:
        # A process is what it executes.
        executed = tmp_path / program
        shutil.copy("/proc/self/exe", executed)
        process = await asyncio.create_subprocess_exec(
            executed,
            "-c",
            ASK,
            lab.agent.config.socket,
            env={"PYTHONHOME": sys.base_prefix},
            stdout=asyncio.subprocess.PIPE,
        )
        return (await process.communicate())[0].decode().strip()

    assert await said("semper-blkd") == "b''"
    assert await said("qemu-system-x86_64") == "b''"
    assert "200 OK" in await said("semper-shell")


# Operators


async def test_an_operator_is_revoked_at_once_and_a_role_is_taken_away(lab: Lab) -> None:
    async with lab.client(Role.VIEWER) as earlier, lab.client(Role.VIEWER) as client:
        await client.vms()
        # Another certificate was made in the same name. A connection that was not in use for some
        # seconds is closed, and cannot be made again.
        with suppress(AgentUnavailable, OutcomeUnknown):
            await until_refused(earlier)
        await client.vms()
        await operators.revoke_operator(lab.cluster, "viewer", "has left")
        await until_refused(client, within_s=IN_FORCE_S)
    with pytest.raises(NotFound, match="there is no operator viewer"):
        await operators.revoke_operator(lab.cluster, "viewer", "again")


async def until_refused(client: Client, within_s: float = DEADLINE_S) -> None:
    """By a clock that stands still while this process, in which the agent is, gets no processor."""
    for _ in range(round(within_s / LOOK_S)):
        try:
            await client.vms()
        except NotAllowed:
            return
        await asyncio.sleep(LOOK_S)  # poll interval
    raise AssertionError(f"not refused within {within_s:g} s")


async def test_the_files_of_operators_are_their_owners(lab: Lab) -> None:
    await lab.tls(Role.VIEWER)
    key = lab.place / "viewer.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    doors = lab.cluster.identity.directory / "doors.key"
    assert stat.S_IMODE(doors.stat().st_mode) == 0o600
    key.chmod(0o640)
    with pytest.raises(SempervirtError, match="mode 0640"):
        operator_context(key)
