"""A domain of libvirt's own daemon, with nothing of ours in it but what `semper libvirt adopt`
puts there: kills of its disk's backend under sixteen writers, and what the guest says of them; then
the domain gets its former description back.

    python -m lab.libvirt PLACE [--count N] [--no-guest]   run by scripts/libvirt, with a libvirt

Prints one line for each kill and a summary; exit status 0 only if nothing was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import json
import os
import pwd
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sempervirt.agent import Agent, AgentConfig
from sempervirt.api.server import serving
from sempervirt.disk.driver import Disk
from sempervirt.guest import ProbeClient
from sempervirt.guest import image as guest_image
from sempervirt.qemu.spec import DiskSpec
from sempervirt.vm.guarded import GuardedDisk
from sempervirt.vm.libvirt import Node, Served, User, check, domain_xml, parse, sockets

MIB = 1 << 20
QEMU_USER, QEMU_GROUP = "libvirt-qemu", "kvm"
READY_S = 60.0
# Requests after which the writers are at work again.
SETTLED = 400
QEMU_CONF = f"""
user = "{QEMU_USER}"
group = "{QEMU_GROUP}"
security_driver = "none"
dynamic_ownership = 0
remember_owner = 0
stdio_handler = "file"
cgroup_controllers = []
namespaces = []
"""


def domain(place: Path, lines: str, image: Path) -> str:
    """A small guest with the test guest's kernel."""
    guest = guest_image()
    for file in (guest.kernel, guest.initrd):
        shutil.copy(file, place / file.name)
        (place / file.name).chmod(0o644)
    memory, _, disks = lines.partition("<!-- in <devices> -->")
    return f"""<domain type='qemu'>
  <name>web</name>
  <memory unit='MiB'>256</memory>
  <vcpu>2</vcpu>
  {memory}
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{place / guest.kernel.name}</kernel>
    <initrd>{place / guest.initrd.name}</initrd>
    <cmdline>console=ttyS0 quiet</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <devices>
    <emulator>{shutil.which("qemu-system-x86_64")}</emulator>
    {disks}
    <serial type='file'><source path='{place}/open/console.log'/></serial>
    <channel type='unix'>
      <source mode='bind' path='{place}/open/probe.sock'/>
      <target type='virtio' name='org.sempervirt.probe'/>
    </channel>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""


@contextmanager
def libvirtd(place: Path) -> Iterator[None]:
    """The daemon, until the block is left."""
    Path("/etc/libvirt").mkdir(exist_ok=True)
    Path("/etc/libvirt/qemu.conf").write_text(QEMU_CONF, encoding="utf-8")
    with (place / "libvirtd.log").open("wb") as log:
        daemon = subprocess.Popen(["libvirtd"], stdout=log, stderr=log)
    try:
        end = time.monotonic() + READY_S
        while virsh("version", check=False) is None:
            if time.monotonic() > end or daemon.poll() is not None:
                raise SystemExit(f"libvirtd: {(place / 'libvirtd.log').read_text()[-2000:]}")
            time.sleep(0.1)  # poll interval
        yield
    finally:
        virsh("destroy", "web", check=False)
        daemon.terminate()
        daemon.wait()


def virsh(*words: str, check: bool = True) -> str | None:
    """What virsh says; None if it failed and need not have worked."""
    argv = ["virsh", "--connect", "qemu:///system", *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=READY_S)
    if done.returncode == 0:
        return done.stdout
    if check:
        raise SystemExit(f"virsh {' '.join(words)}: {done.stderr}")
    return None


async def stall_ms(client: ProbeClient, disk: Disk) -> float:
    """Kills the active backend; for how long the guest completed nothing."""
    await disk.wait_spare_ready(READY_S)
    clock = await client.measure_clock()
    killed_ns, pid = time.monotonic_ns(), disk.active_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    before = (await client.stats()).completions
    await client.wait_stats(lambda stats: stats.completions > before + SETTLED)
    gaps = await client.gaps(since_ns=max(0, clock.to_guest(killed_ns) - 50_000_000))
    # The longest silence that begins at the kill, or a moment later: its end counts from the kill.
    seen = [(clock.to_host(begin), clock.to_host(end)) for begin, end in gaps.gaps]
    hit = [
        (end - max(begin, killed_ns), (end - killed_ns) / 1e6)
        for begin, end in seen
        if end > killed_ns and begin < killed_ns + 60_000_000
    ]
    return max(hit, default=(0, 0.0))[1]


def prepared(place: Path) -> Path:
    """The image; and a directory that QEMU's user may write to."""
    place.chmod(0o755)
    (place / "open").mkdir()
    (place / "open").chmod(0o777)
    image = place / "web.raw"
    image.touch()
    os.truncate(image, 64 * MIB)
    return image


def say(text: str) -> None:
    """Prints it at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


PLAIN = """<!-- in <devices> -->
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{image}'/>
      <target dev='vda' bus='virtio'/>
    </disk>"""


async def semper(config: AgentConfig, *words: str) -> None:
    """Runs `semper`, asking the agent of this trial. Raises SystemExit."""
    own = {"SEMPERVIRT_STATE_DIR": config.state_dir, "SEMPERVIRT_RUN_DIR": config.run_dir}
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("semper"),
        *words,
        env={**os.environ, **{name: str(path) for name, path in own.items()}},
    )
    if status := await process.wait():
        raise SystemExit(f"semper {' '.join(words)}: exit code {status}")


async def run(place: Path, count: int, *, guest: bool) -> int:
    """The trial; the exit status."""
    image = prepared(place)
    config = AgentConfig(place / "s", place / "r")
    async with Agent.open(config) as agent:
        spec = DiskSpec(name="vda", image=image, serial="loaded")
        disk = await agent.guard_disk(GuardedDisk(vm="web", disk=spec, group=QEMU_GROUP))
        served = Served(disk.name, image, disk.setup.files.socket, disk.setup.options.queues)
        _require_sound(domain(place, domain_xml([served]), image), served)
        with libvirtd(place):
            say(virsh("version") or "")
            text = domain(place, PLAIN.format(image=image), image)
            (place / "web.xml").write_text(text, encoding="utf-8")
            virsh("define", str(place / "web.xml"))
            before = virsh("dumpxml", "--inactive", "web")
            async with serving(agent, config.socket):
                await semper(config, "libvirt", "adopt", "web")
                _require_sound(virsh("dumpxml", "--inactive", "web") or "", served)
                status = 0
                if guest:
                    virsh("start", "web")
                    status = await _kill(place, disk, count)
                    virsh("destroy", "web")
                await semper(config, "libvirt", "adopt", "web", "--undo")
            after = virsh("dumpxml", "--inactive", "web") or ""
            # In another order: libvirt has added a controller to what was there.
            if sorted(after.splitlines()) != sorted((before or "").splitlines()):
                lines = difflib.unified_diff((before or "").splitlines(), after.splitlines(), n=0)
                raise SystemExit("\n".join(["the domain is not described as before", *lines]))
            return status


def _require_sound(text: str, served: Served) -> None:
    described = parse(text)
    entry = pwd.getpwnam(QEMU_USER)
    user = User(QEMU_USER, entry.pw_uid, frozenset({entry.pw_gid}))
    ways: dict[Path, list[Node] | str] = {
        path: [Node.of(one) for one in (*reversed(path.parents), path)]
        for path in sockets(described)
    }
    if found := check(described, [served], user, ways):
        raise SystemExit(f"semper libvirt check: {found}")


async def _kill(place: Path, disk: Disk, count: int) -> int:
    probe = place / "open" / "probe.sock"
    async with await ProbeClient.connect(probe, deadline_s=READY_S) as client:
        await client.wait_hello(deadline_s=READY_S)
        await client.write_start("serial:loaded", writers=16, span_bytes=16 * MIB)
        await client.wait_stats(lambda stats: stats.completions > 1000)
        stalls = []
        for number in range(count):
            stalls.append(await stall_ms(client, disk))
            kept = disk.restarts[-1].kept_connection
            say(f"kill {number + 1}: {stalls[-1]:.1f} ms, connection kept: {kept}")
        stats = await client.write_stop()
    unharmed = stats.io_error_count == 0 and stats.wrong.total == 0 and stats.hung == 0
    verified = stats.verified_final is not None and stats.verified_final.wrong == 0
    ordered = sorted(stalls)
    summary = {
        "kills": count,
        "p50_ms": round(statistics.median(ordered), 2),
        "p99_ms": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2),
        "max_ms": round(ordered[-1], 2),
        "kept": sum(bool(one.kept_connection) for one in disk.restarts),
        "errors": stats.io_error_count,
        "wrong": stats.wrong.total,
        "hung": stats.hung,
        "load": os.getloadavg()[0],
        "lost": 0 if unharmed and verified else 1,
    }
    say(json.dumps(summary))
    return 0 if unharmed and verified else 1


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="A libvirt domain whose disk's backend dies.")
    parser.add_argument("place", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--no-guest", action="store_true", help="adopt and undo, and start nothing")
    options = parser.parse_args()
    return asyncio.run(run(options.place, options.count, guest=not options.no_guest))


if __name__ == "__main__":
    sys.exit(main())
