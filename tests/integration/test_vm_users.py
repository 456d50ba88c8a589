"""A user of its own for each VM: what a program in QEMU's place reaches with it, and what without.

`qemu_tries.py` runs in QEMU's place, with everything that QEMU has but QEMU's own filter of system
calls, and then becomes QEMU. The control is the same without users: there QEMU is root.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from sempervirt.agent import Agent, AgentConfig
from sempervirt.cli.audit import audit
from sempervirt.host.confinement import confinement_of
from sempervirt.host.users import OFF, VARIABLE
from sempervirt.qemu.features import find_qemu
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.vm.user import VmUser
from sempervirt.vm.vm import Vm

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives others a user")
PYTHON = Path("/usr/bin/python3")
TRIES = Path(__file__).with_name("qemu_tries.py")
Spec = Callable[..., VmSpec]


@pytest.fixture
def probing(config: AgentConfig, place: Path) -> AgentConfig:
    """An agent whose QEMU of the VM "web" first does what `PLACE/tries` says."""
    folder = place / "p"
    folder.mkdir(mode=0o755)
    shutil.copy(TRIES, folder / "tries.py")
    program = folder / "qemu"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *guest=web,*) {PYTHON} {folder}/tries.py {folder}/tries;; esac\n'
        f'exec {find_qemu()} "$@"\n'
    )
    for path, mode in ((program, 0o755), (folder / "tries.py", 0o644)):
        path.chmod(mode)
    return replace(config, qemu=str(program))


@contextmanager
def listening() -> Iterator[tuple[int, str]]:
    """A service of the host, by a port and by an abstract name."""
    name = f"sv-service-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"\0{name}")
        unix.listen()
        yield tcp.getsockname()[1], name


def attempts(agent: Agent, own: VmSpec, other: Vm) -> list[tuple[str, str]]:
    """What another VM, the agent and the host have, and what is the VM's and not for QEMU."""
    config = agent.config
    run, others = config.vm_run_dir("web"), config.vm_run_dir(other.name)
    secret = config.trust_dir / "authority.key"
    secret.parent.mkdir(exist_ok=True)
    secret.write_text("secret")
    secret.chmod(0o600)
    images = [own.disks[0].image, other.spec.disks[0].image]
    for image in images:
        image.chmod(0o600)
    record = config.vm_state_dir(other.name) / "vm.json"
    read = ["/etc/shadow", secret, record, others / "console.log", *images]
    sockets = [others / "qmp.sock", others / "disk-root.sock", run / "disk-root-1.ctl"]
    folders = [Path("/etc"), Path("/tmp"), Path("/dev/shm")]
    folders += [config.state_dir, config.run_dir, others, run]
    pids = [str(other.pid), str(os.getpid())]
    return [
        *(("read", str(path)) for path in read),
        *(("write", str(path)) for path in images),
        *(("connect", str(path)) for path in sockets),
        *(("create", str(folder / f"sv-{os.getpid()}")) for folder in folders),
        *(("remove", str(run / name)) for name in ("disk-root.sock", "qemu.peers")),
        *((what, pid) for what in ("memory", "root", "trace", "signal") for pid in pids),
        *(("mount", str(run)), ("device", str(run / "q1/mem"))),
        *((what, "") for what in ("owner", "raw", "namespace", "module", "listen")),
    ]


# As root with two capabilities, of an agent with more, these are refused as well.
ALWAYS_REFUSED = ("device", "memory", "module", "mount", "namespace", "raw", "root", "trace")


async def tried(config: AgentConfig, make: Spec, place: Path) -> tuple[VmUser, dict[str, str]]:
    """The user of the VM "web", and what came of each attempt that was made in its QEMU's place: ""
    when it succeeded.
    """
    second = place / "second.raw"
    second.touch()
    os.truncate(second, 1 << 20)
    own = make()
    async with Agent.open(config) as agent:
        other = await agent.run_vm(
            make(name="other", disks=[{"name": "root", "image": str(second)}])
        )
        with listening() as (port, name):
            listed = attempts(agent, own, other)
            listed += [("tcp", str(port)), ("abstract", name)]
            told = place / "p/tries"
            told.write_text(json.dumps(listed))
            told.chmod(0o644)
            vm = await agent.run_vm(own)
        (line,) = [line for line in vm.log_tail(20) if line.startswith("TRIED ")]
        assert vm.record.user is not None
        return vm.record.user, json.loads(line.removeprefix("TRIED "))


async def test_in_qemus_place_nothing_is_reached(
    probing: AgentConfig, firmware_spec: Spec, place: Path
) -> None:
    user, came = await tried(probing, firmware_spec, place)
    assert user.number is not None
    assert len(came) > 30
    assert [what for what, why in came.items() if not why] == []


async def test_the_control_without_users(
    probing: AgentConfig, firmware_spec: Spec, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, OFF)
    user, came = await tried(probing, firmware_spec, place)
    assert user.number is None
    refused = [what for what, why in came.items() if why]
    assert [what for what in refused if not what.startswith(ALWAYS_REFUSED)] == []


def names(directory: Path) -> list[str]:
    return [entry.name for entry in directory.iterdir()]


async def test_a_user_is_the_vms_as_long_as_the_vm_is_on_the_list(
    config: AgentConfig, firmware_spec: Spec
) -> None:
    registry = config.state_dir / "users"
    async with Agent.open(config) as agent:
        vm = await agent.run_vm(firmware_spec())
        first = vm.record.user
        assert first is not None
        assert vm.pid is not None
        held = confinement_of(vm.pid)
        assert held is not None
        assert (held.user, held.capabilities, held.obtainable) == (str(first.number), (), ())
        await vm.kill()
        assert (await agent.run_vm(firmware_spec())).record.user == first
        await agent.vm("web").kill()
        assert names(registry) == [str(first.number)]
        await agent.remove_vm("web")
        assert names(registry) == []


async def test_what_not_everybody_may_read_is_given_to_qemu(
    config: AgentConfig, guest_spec: Spec, place: Path
) -> None:
    spec = guest_spec()
    assert spec.kernel is not None
    assert spec.initrd is not None
    copies = {}
    for key, path in (("kernel", spec.kernel), ("initrd", spec.initrd)):
        copies[key] = Path(shutil.copy(path, place / key))
        copies[key].chmod(0o600)
    own = [{"name": "root", "image": str(spec.disks[0].image), "backend": "qemu"}]
    spec = VmSpec.model_validate(spec.model_dump() | copies | {"disks": own})
    async with Agent.open(config) as agent:
        vm = await agent.run_vm(spec)
        assert vm.record.user is not None
        assert vm.record.user.number is not None
        assert copies["kernel"].stat().st_uid == 0
        assert vm.run is Runstate.RUNNING  # QEMU has read both by then


@pytest.fixture
def closed(place: Path) -> Path:
    """A place that others do not reach."""
    place.chmod(0o700)
    return place


async def test_a_run_directory_that_nobody_reaches_is_told(
    closed: Path, config: AgentConfig, firmware_spec: Spec
) -> None:
    async with Agent.open(config) as agent:
        vm = await agent.run_vm(firmware_spec())
        assert vm.record.user is not None
        assert vm.record.user.number is None
        remedy = f"chmod o+x {closed}"
        assert remedy in vm.record.user.why
        (qemu,) = [one for one in audit(config).processes if one.role == "QEMU of web"]
        assert remedy in qemu.findings[-1]
