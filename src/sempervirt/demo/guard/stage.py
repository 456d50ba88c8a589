"""All that a trial needs, together: etcd, host b here, host a in its machine, one cluster.

This runs in a network namespace of its own (`cli`), where this machine has the address `HERE`. Host
a reaches it through QEMU's user-mode network, and is reached at `DOOR`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sempervirt.api.client import Client
from sempervirt.cluster.cluster import Cluster, begin_cluster
from sempervirt.cluster.joining import join_cluster
from sempervirt.cluster.operators import add_operator
from sempervirt.core.errors import NotFound, SempervirtError
from sempervirt.core.roles import Role
from sempervirt.demo.guard import counter, image
from sempervirt.demo.guard.emulated import NoAnswerError
from sempervirt.demo.guard.host_a import BOOT_S, HostA
from sempervirt.qemu import features
from sempervirt.qemu.facts import HostProbe
from sempervirt.qemu.spec import VmSpec
from sempervirt.trust.operator import operator_context
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.setup import prepare_directories

HERE = "192.0.2.1"
DOOR = f"{HERE}:7444"
PORT = 7443
HOUR = timedelta(hours=1)
READY_S = 150.0
POLL_S = 0.02
STATE_A, RUN_A = "/var/lib/sempervirt/trial", "/run/sempervirt"
# The agents log this once they serve other hosts.
SERVES = "serve hosts"
SCRIPTS = Path(__file__).parent
# As its script has it: `-m` would give its log another name.
SEMPERD = "from sempervirt.daemon.main import main; main()"


@dataclass(frozen=True)
class Parts:
    """What a trial is made of: `tree` holds vmlinuz, release and modules/; `guard` is the built
    module, `further` are other files for host a by name, `presets` the operator's presets there.
    """

    tree: Path
    guard: Path
    disk: Path
    etcd: str
    further: Mapping[str, bytes]
    presets: str


class Stage:
    """Made by `opened`."""

    def __init__(self, place: Path, b: AgentConfig, a: HostA, key: Path) -> None:
        self.place = place
        self.images = place / "images"
        self.b = b
        self.host_a = a
        self._key = key

    @classmethod
    @asynccontextmanager
    async def opened(cls, parts: Parts, place: Path) -> AsyncIterator[Stage]:
        """Both hosts serve, and see each other. Raises NoAnswerError, SempervirtError."""
        images = place / "images"
        images.mkdir()
        (images / "counter.raw").write_bytes(counter.disk())
        async with AsyncExitStack() as stack:
            store = stack.enter_context(_etcd(parts.etcd, place))
            b = AgentConfig(place / "b" / "s", place / "b" / "r")
            prepare_directories(b)
            await begin_cluster(b, "trial", "b", f"{HERE}:{PORT}", [store])
            stack.enter_context(_agent(b, images, place / "semperd-b.log"))
            await _until(lambda: SERVES in _text(place / "semperd-b.log"), "host b serves")
            async with Client.connect(b.socket) as client:
                await client.host()  # asked at once here; a host that has VMs knows its QEMU
            key = place / "operator.pem"
            state = await _joined(b, place, key)
            initrd = place / "initrd.img"
            payload = _payload(parts, state, images)
            initrd.write_bytes(
                await asyncio.to_thread(image.initramfs, parts.tree, SCRIPTS / "init.sh", payload)
            )
            qemu = features.find_qemu()
            host_a = stack.enter_context(
                HostA(qemu, parts.tree / "vmlinuz", initrd, parts.disk, place, DOOR)
            )
            await asyncio.to_thread(host_a.wait_up, BOOT_S)
            found = cls(place, b, host_a, key)
            await _until(lambda: SERVES in _text(host_a.agent_log), "host a serves", host_a)
            await found._wait_known()
            yield found

    @asynccontextmanager
    async def client_a(self) -> AsyncIterator[Client]:
        """For host a's agent, as an operator from elsewhere."""
        async with Client.connect_host(DOOR, "a", operator_context(self._key)) as client:
            yield client

    @asynccontextmanager
    async def client_b(self) -> AsyncIterator[Client]:
        """For host b's agent."""
        async with Client.connect(self.b.socket) as client:
            yield client

    def spec(self, name: str) -> VmSpec:
        """A VM that counts. Its disk is read-only, because the hosts share no storage."""
        disk = {"name": "root", "image": str(self.images / "counter.raw"), "read_only": True}
        return VmSpec.model_validate(
            {"name": name, "memory": "64M", "machine": "pc", "accel": "tcg", "disks": [disk]}
        )

    def said_on_b(self, vm: str) -> str:
        """What the guest has said to its console on host b."""
        for folder in (self.b.vm_run_dir(vm), self.b.vm_state_dir(vm)):
            with suppress(OSError):
                return (folder / "console.log").read_text(errors="replace")
        return ""

    async def _wait_known(self) -> None:
        """Until host a knows the operator, and each agent knows that the other lives."""
        give_up = time.monotonic() + READY_S
        while True:
            try:
                async with self.client_a() as client:
                    await client.agent()
                async with Cluster.opened(self.b) as cluster:
                    if all(member.presence for member in await cluster.members()):
                        return
            except SempervirtError as error:
                if time.monotonic() > give_up:
                    raise NoAnswerError(f"{error}; {self.host_a.tail()}") from error
            await asyncio.sleep(POLL_S * 10)


async def _joined(b: AgentConfig, place: Path, key: Path) -> Path:
    """Has host a join, from here: the directory of its state; and the key of an operator."""
    state = place / "state-a"
    a = AgentConfig(state, place / "run-a")
    prepare_directories(a)
    async with Cluster.opened(b) as cluster:
        invitation = await cluster.invite("a", HOUR)
        await join_cluster(a, invitation, f"10.0.2.15:{PORT}")
        made = await add_operator(cluster, "trial", Role.ADMIN, HOUR)
    await asyncio.to_thread(_keep_secret, key, made.text())
    # What QEMU can do was asked here: host a has the same file, and would take half a minute.
    await HostProbe(None, state / "cache").facts()
    return state


def _keep_secret(path: Path, text: str) -> None:
    path.touch(0o600)
    path.write_text(text)


def _payload(parts: Parts, state: Path, images: Path) -> dict[str, bytes]:
    environment = {
        "SEMPERVIRT_STATE_DIR": STATE_A,
        "SEMPERVIRT_RUN_DIR": RUN_A,
        "SEMPERVIRT_IMAGE_ROOTS": str(images),
        "TRIAL_IMAGES": str(images),
        "TRIAL_PYTHON": str(Path(sys.executable).resolve()),
        "PYTHONPATH": f"{image.HERE}/src:{image.SITE}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    lines = [f"export {name}='{value}'\n" for name, value in environment.items()]
    files = {
        "environment": "".join(lines).encode() + f"mkdir -p {STATE_A} {RUN_A}\n".encode(),
        "serve.sh": (SCRIPTS / "serve.sh").read_bytes(),
        "beats.py": (SCRIPTS / "beats.py").read_bytes(),
        "counter.raw": counter.disk(),
        "guard.toml": parts.presets.encode(),
        "semper_guard.ko": parts.guard.read_bytes(),
        **parts.further,
    }
    for path in state.rglob("*"):
        if path.is_file():
            files[f"state/{path.relative_to(state)}"] = path.read_bytes()
    return files


@contextmanager
def _etcd(program: str, place: Path) -> Iterator[str]:
    """An etcd of one member; its address."""
    url, peer = f"http://{HERE}:2379", f"http://{HERE}:2380"
    log = place / "etcd.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                program, f"--data-dir={place / 'etcd'}", f"--listen-client-urls={url}",
                f"--advertise-client-urls={url}", f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}",
                "--heartbeat-interval=50", "--election-timeout=500", "--log-level=warn",
                "--unsafe-no-fsync",
            ],
            stdout=output, stderr=output, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        give_up = time.monotonic() + READY_S
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > give_up:
                raise NoAnswerError(f"etcd does not answer: {_text(log)[-1000:]}")
            time.sleep(POLL_S)
        yield url
    finally:
        process.kill()
        process.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return b'"true"' in answer.read()
    except OSError:
        return False


@contextmanager
def _agent(config: AgentConfig, images: Path, log: Path) -> Iterator[None]:
    environment = {
        **os.environ,
        "SEMPERVIRT_STATE_DIR": str(config.state_dir),
        "SEMPERVIRT_RUN_DIR": str(config.run_dir),
        "SEMPERVIRT_IMAGE_ROOTS": str(images),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", SEMPERD], env=environment,
            stdout=output, stderr=output, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def _until(condition: object, what: str, host: HostA | None = None) -> None:
    """Waits for a condition. Raises NoAnswerError."""
    assert callable(condition)
    give_up = time.monotonic() + READY_S
    while not condition():
        if time.monotonic() > give_up or (host is not None and host.process.poll() is not None):
            raise NoAnswerError(f"not by the deadline: {what}; {host.tail() if host else ''}")
        await asyncio.sleep(POLL_S)


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(errors="replace")
    return ""


def find_etcd(*places: Path) -> str:
    """The program. Raises NotFound."""
    found = shutil.which("etcd") or next((str(one) for one in places if one.exists()), None)
    if found is None:
        raise NotFound("there is no etcd", remedy="fetch it: scripts/etcd")
    return found


def is_alone() -> bool:
    """Whether this process has the address that a trial needs, in a namespace of its own."""
    with socket.socket() as probe:
        try:
            probe.bind((HERE, 0))
        except OSError:
            return False
    return True
