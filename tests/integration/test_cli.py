"""The programs as a person uses them: `semper` with an agent, without one, and at a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sempervirt.agent import AgentConfig
from sempervirt.api.client import Client
from sempervirt.core.errors import AgentUnavailable, NotFound
from sempervirt.guest import image as guest_image
from sempervirt.qemu.state import Runstate
from tests.integration.test_agent_adoption import is_guarded, wait_disk

Semperd = Callable[[], AbstractAsyncContextManager["subprocess.Popen[bytes]"]]

DEADLINE_S = 90.0
POLL_S = 0.05
LEAVE = b"\x1d"
# Takes the terminal at stdin as the session's own, as a login shell does, and becomes a program.
AT_ITS_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


@dataclass
class Answer:
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


class Semper:
    """Runs `semper` with the directories of this test."""

    program = str(Path(sys.executable).with_name("semper"))

    def __init__(self, config: AgentConfig) -> None:
        self.environment = {
            **os.environ,
            "SEMPERVIRT_STATE_DIR": str(config.state_dir),
            "SEMPERVIRT_RUN_DIR": str(config.run_dir),
            "COLUMNS": "160",
            "TERM": "dumb",
        }

    async def __call__(self, *arguments: str, **more: str) -> Answer:
        async with self.started(*arguments, **more) as process, asyncio.timeout(DEADLINE_S):
            out, err = await process.communicate()
            assert process.returncode is not None
            return Answer(process.returncode, out.decode(), err.decode())

    @asynccontextmanager
    async def started(
        self, *arguments: str, **more: str
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(
            self.program,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**self.environment, **more},
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


@pytest.fixture
def semper(config: AgentConfig) -> Semper:
    return Semper(config)


@pytest.fixture
def vm_file(place: Path, disk_image: Path) -> Path:
    """A VM that gets no further than its firmware."""
    path = place / "web.toml"
    path.write_text(
        f'name = "web"\nmemory = "64M"\n\n[[disks]]\nname = "root"\nimage = "{disk_image.name}"\n'
    )
    return path


def edit(file: Path, before: str, after: str) -> None:
    file.write_text(file.read_text().replace(before, after))


async def wait_running(client: Client, name: str = "web") -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                if (await client.vm(name)).state is Runstate.RUNNING:
                    return
            except (AgentUnavailable, NotFound):
                pass
            await asyncio.sleep(POLL_S)  # poll interval


def readable_by_others(config: AgentConfig) -> list[Path]:
    """What an agent has made and other users may open, whatever protects the folders above it. A
    folder may be gone through, and a group that is not the agent's is that of a VM.
    """
    made = [path for top in (config.state_dir, config.run_dir) for path in top.rglob("*")]
    return [path for path in made if not path.is_symlink() and _is_open(path)]


def _is_open(path: Path) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:  # a record that was being written
        return False
    others = 0o007 if found.st_gid != os.getegid() else 0o077
    return bool(found.st_mode & others & (0o066 if path.is_dir() else 0o777))


async def test_a_vm_and_its_disk_with_an_agent(
    semper: Semper, semperd: Semperd, config: AgentConfig, vm_file: Path
) -> None:
    async with semperd():
        ran = await semper("vm", "run", str(vm_file), "--detach")
        assert ran.code == 0, ran.err
        assert "web is running" in ran.out

        listed = (await semper("vm", "list", "--output", "json")).document
        assert [(vm["name"], vm["state"]) for vm in listed] == [("web", "running")]
        assert readable_by_others(config) == []
        async with Client.connect(config.socket) as client:  # a spare that begins has no walls yet
            await wait_disk(client, is_guarded)
        audited = (await semper("host", "audit", "-o", "json")).document["processes"]
        assert [one["role"] for one in audited].count("backend of web/root") >= 1
        held = {one["role"]: one for one in audited}
        for role in ("QEMU of web", "backend of web/root"):
            assert held[role]["capabilities"] == []
        assert held["QEMU of web"]["user"] != "root"
        for role in ("QEMU of web", "backend of web/root"):
            assert held[role]["system_calls"] == "filtered"
            assert not held[role]["new_privileges"]
        assert "QEMU of web" in (await semper("host", "audit")).out
        assert "web" in (await semper("vm", "list")).out
        assert "web/root" in (await semper("vm", "show", "web")).out

        disks = (await semper("disk", "list", "-o", "json")).document
        assert disks[0]["active_pid"] is not None
        upgraded = await semper("disk", "upgrade", "web/root")
        assert "is served by" in upgraded.out, upgraded.err
        shown = await semper("disk", "show", "web/root")
        assert "upgrades 1" in shown.out
        assert "installed binary" in (await semper("disk", "upgrade", "--all")).out
        assert (await semper("disk", "upgrade", "web/root", "--all")).code == 2
        assert "first done" in shown.out.lower()

        assert "paused" in (await semper("vm", "pause", "web")).out
        refused = await semper("vm", "stop", "web")
        assert refused.code == 5
        assert "resume it first" in refused.err
        assert "running" in (await semper("vm", "resume", "web")).out
        (disk,) = (await semper("disk", "list", "-o", "json")).document
        for source, pid in (("root", disk["active_pid"]), ("root:spare", disk["spare_pid"])):
            log = await semper("vm", "logs", "web", "--source", source, "-o", "json")
            assert log.document["path"] == os.readlink(f"/proc/{pid}/fd/2"), source  # noqa: PTH115
        ended = await semper("vm", "logs", "web", "--source", "root:previous")
        assert ended.code == 0
        assert ended.out != (await semper("vm", "logs", "web", "--source", "root")).out
        wrong = await semper("vm", "logs", "web", "--source", "rot")
        assert (wrong.code, 'did you mean "root"?' in wrong.err) == (2, True)

        killed = await semper("vm", "kill", "web")
        assert "killed on request" in killed.out
        gone = await semper("disk", "show", "web/root")
        assert (gone.code, "has ended" in gone.err) == (5, True)
        assert (await semper("vm", "remove", "web")).code == 0
        assert (await semper("vm", "list", "-o", "json")).document == []


async def test_queues_and_their_threads(semper: Semper, semperd: Semperd, vm_file: Path) -> None:
    second = vm_file.with_name("own.raw")
    second.write_bytes(bytes(1 << 20))
    edit(
        vm_file,
        "[[disks]]",
        f'[[disks]]\nname = "own"\nimage = "{second.name}"\nbackend = "qemu"\n\n'
        "[[disks]]\nqueues = 4\nqueues_per_thread = 2",
    )
    async with semperd():
        assert (await semper("vm", "run", str(vm_file), "--detach")).code == 0
        shown = " ".join((await semper("vm", "show", "web")).out.split())
        assert "disk-root 4 queues on 2 threads (VM file), engine auto (built-in def" in shown
        assert "disk-own 1 queue on 1 thread, engine threads (built-in default)" in shown
        assert "4 queues on 2 threads (VM file)" in (await semper("disk", "show", "web/root")).out
        listed = (await semper("disk", "list")).out
        assert listed.splitlines()[1].split()[:2] == ["web/own", "qemu"]
        own = await semper("disk", "show", "web/own")
        assert "served by QEMU itself, without a spare" in own.out

        for option in ([], ["--show"]):
            table = await semper("disk", "threads", "web/root", *option)
            assert "4 queues on 2 threads (VM file)" in table.out, table.err
            rows = [line.split()[:2] for line in table.out.splitlines()[-4:]]
            assert rows == [["0", "0"], ["1", "1"], ["2", "0"], ["3", "1"]]
        moved = await semper("disk", "threads", "web/root", "--map", "0,0,1,2")
        assert "4 queues on 3 threads (semper disk threads)" in moved.out, moved.err
        rows = [line.split()[:2] for line in moved.out.splitlines()[-4:]]
        assert rows == [["0", "0"], ["1", "0"], ["2", "1"], ["3", "2"]]
        moved = await semper(
            "disk", "threads", "web/root", "--queues-per-thread", "4", "-o", "json"
        )
        assert moved.document["queues"]["map"] == [0, 0, 0, 0]

        for arguments, code, words in (
            (("web/root", "--map", "0,x,1,1"), 2, "--map: "),
            (("web/root", "--map", "0,2,1,3,"), 2, "is not a map"),
            (("web/root", "--map", "0,1"), 2, "the map is for 2 queues, and the device has 4"),
            (("web/root", "--map", "0", "--show"), 2, "exclude each other"),
            (("web/own", "--map", "0"), 2, "served by QEMU itself"),
            (("web/rot", "--map", "0"), 4, 'did you mean "root"?'),
        ):
            refused = await semper("disk", "threads", *arguments)
            assert (refused.code, words in refused.err) == (code, True), refused
        await semper("vm", "kill", "web")


async def test_the_map_of_a_disk(
    semper: Semper, semperd: Semperd, vm_file: Path, place: Path
) -> None:
    async with semperd():
        assert (await semper("vm", "run", str(vm_file), "--detach")).code == 0
        shown = await semper("disk", "map", "web/root")
        assert "never; see --verify" in shown.out, shown.err
        verified = await semper("disk", "map", "web/root", "--verify", "-o", "json")
        assert verified.document["verification"]["unreadable"] == 0
        assert verified.document["running"] is None
        file = place / "root.map"
        exported = await semper("disk", "map", "web/root", "--export", str(file))
        assert "written" in exported.out, exported.err
        assert file.read_bytes().startswith(b"SEMPRMAP")
        nowhere = await semper("disk", "map", "web/root", "--export", f"{place}/none/root.map")
        assert "cannot write" in nowhere.err
        assert "a file that you may write" in nowhere.err
        assert (await semper("vm", "kill", "web")).code == 0
        gone = await semper("disk", "map", "web/root")
        assert gone.code != 0
        assert not list(place.glob("**/*.touched"))  # noqa: ASYNC240


async def test_without_an_agent_the_remedy_is_named(semper: Semper, vm_file: Path) -> None:
    for arguments in (("vm", "list"), ("disk", "list"), ("vm", "run", str(vm_file), "--detach")):
        answer = await semper(*arguments)
        assert answer.code == 6
        assert "no agent answers" in answer.err
        assert "semperd" in answer.err


async def test_a_wrong_vm_file_names_file_line_and_key(semper: Semper, vm_file: Path) -> None:
    edit(vm_file, "memory", "memroy")
    answer = await semper("vm", "run", str(vm_file))
    assert answer.code == 2
    assert f"{vm_file}:2: memroy: there is no such key" in answer.err
    assert 'did you mean "memory"?' in answer.err


async def test_host_show_needs_no_agent(semper: Semper) -> None:
    shown = await semper("host", "show", "--output", "json")
    assert shown.document["accelerator"] in ("kvm", "tcg")
    assert shown.document["accelerator_reason"]
    assert shown.document["qemu_version"]


async def test_completion_offers_names(semper: Semper, semperd: Semperd, vm_file: Path) -> None:
    async with semperd():
        await semper("vm", "run", str(vm_file), "--detach")
        for line, offered in (("semper vm show ", "web"), ("semper disk show w", "web/root")):
            answer = await semper(
                _SEMPER_COMPLETE="complete_bash",
                COMP_WORDS=line,
                COMP_CWORD=str(len(line.split(" ")) - 1),
            )
            assert answer.out.split() == [offered], answer
        await semper("vm", "kill", "web")


async def test_in_the_foreground_it_is_the_agent_and_ctrl_c_ends_it(
    semper: Semper, config: AgentConfig, vm_file: Path
) -> None:
    async with (
        semper.started("vm", "run", str(vm_file), "--grace", "0.5") as process,
        Client.connect(config.socket) as client,
    ):
        await wait_running(client)
        assert "web/root" in (await semper("disk", "list")).out  # from another terminal
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(DEADLINE_S):
            out, err = await process.communicate()
        assert process.returncode == 0, err
        assert "web is stopped" in out.decode()
        with pytest.raises(AgentUnavailable):
            await client.agent()


async def test_in_the_foreground_a_crash_is_told(
    semper: Semper, config: AgentConfig, vm_file: Path
) -> None:
    async with (
        semper.started("vm", "run", str(vm_file)) as process,
        Client.connect(config.socket) as client,
    ):
        await wait_running(client)
        pid = (await client.vm("web")).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_S):
            out, _ = await process.communicate()
        assert process.returncode == 1
        assert "web is crashed: QEMU was killed by signal 9" in out.decode()


async def test_a_locked_image_is_refused_in_one_line(
    semper: Semper, semperd: Semperd, vm_file: Path
) -> None:
    async with semperd():
        await semper("vm", "run", str(vm_file), "--detach")
        edit(vm_file, '"web"', '"other"')
        answer = await semper("vm", "run", str(vm_file), "--detach")
        assert answer.code == 5
        assert "is in use by semper-blkd (pid " in answer.err
        await semper("vm", "kill", "web")


@pytest.mark.guest
async def test_console_at_a_terminal(
    semper: Semper, semperd: Semperd, place: Path, config: AgentConfig
) -> None:
    guest = guest_image()
    file = place / "shell.toml"
    file.write_text(
        f'name = "web"\nmemory = "256M"\nkernel = "{guest.kernel}"\ninitrd = "{guest.initrd}"\n'
        'cmdline = "console=ttyS0 quiet semper.shell"\n'
    )
    async with semperd():
        ran = await semper("vm", "run", str(file), "--detach")
        assert ran.code == 0, ran.err
        ours, theirs = pty.openpty()
        process = subprocess.Popen(  # noqa: ASYNC220
            [semper.program, "vm", "console", "web"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=semper.environment,
        )
        os.close(theirs)
        os.set_blocking(ours, False)
        try:
            await type_until(ours, b"echo $((6*7))\n", b"42")
            os.write(ours, LEAVE)
            assert await asyncio.to_thread(process.wait, DEADLINE_S) == 0
        finally:
            process.kill()
            process.wait()
            os.close(ours)
        assert "42" in (await semper("vm", "logs", "web")).out
        await semper("vm", "kill", "web")


async def type_until(terminal: int, keys: bytes, wanted: bytes) -> None:
    """Types `keys` twice a second until `wanted` appears: the guest has to boot first."""
    seen = b""
    loop = asyncio.get_running_loop()
    typed = 0.0
    async with asyncio.timeout(DEADLINE_S * 2):
        while wanted not in seen:
            if loop.time() - typed > 0.5:
                os.write(terminal, keys)
                typed = loop.time()
            try:
                seen += os.read(terminal, 4096)
            except BlockingIOError:
                await asyncio.sleep(POLL_S)  # poll interval


@pytest.mark.parametrize("with_semperd", [True, False], ids=["semperd", "embedded"])
async def test_a_terminal_that_hangs_up_takes_no_vm_with_it(
    semper: Semper, semperd: Semperd, config: AgentConfig, vm_file: Path, with_semperd: bool
) -> None:
    """With semperd the command ends; as the agent the command goes on, unseen. Ctrl-C still ends
    the VM, which is the control: the handler of SIGHUP does not catch everything.
    """
    async with AsyncExitStack() as stack:
        if with_semperd:
            await stack.enter_async_context(semperd())
        client = await stack.enter_async_context(Client.connect(config.socket))
        ours, theirs = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", AT_ITS_TERMINAL, semper.program, "vm", "run", str(vm_file)),
            *("--grace", "0.5"),
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            env=semper.environment,
            start_new_session=True,
        )
        os.close(theirs)
        await wait_running(client)
        os.close(ours)  # the kernel sends SIGHUP to the session's leader
        assert process.stderr is not None
        async with asyncio.timeout(DEADLINE_S):
            said = (await process.stderr.readline()).decode()
        if with_semperd:
            assert "web runs on, and semperd looks after it" in said
            async with asyncio.timeout(DEADLINE_S):
                assert await process.wait() == 0
            assert (await client.vm("web")).state is Runstate.RUNNING
            assert (await semper("vm", "kill", "web")).code == 0
            return
        assert f"its agent is still this semper vm run (pid {process.pid})" in said
        shown = await semper("vm", "show", "web")
        assert "the terminal hung up; web runs on" in " ".join(shown.out.split())
        assert process.returncode is None
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            assert await process.wait() == 0
