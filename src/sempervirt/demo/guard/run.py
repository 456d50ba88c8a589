"""Runs trials in a namespace of their own, as a program: `python -m sempervirt.demo.guard.run`.

    run.py ──unshare──► run.py (alone): Stage ─► one trial after the other ─► one JSON document on
    stdout

Whatever ends the first process ends the second one and all that the second has started.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from sempervirt.core.errors import NotFound, SempervirtError
from sempervirt.demo.guard import image
from sempervirt.demo.guard.emulated import NoAnswerError
from sempervirt.demo.guard.host_a import HostA
from sempervirt.demo.guard.stage import HERE, Parts, Stage, find_etcd, is_alone
from sempervirt.demo.guard.trial import Death, Outcome, begin, die, die_unguarded
from sempervirt.guard.signs import SignId
from sempervirt.guest.initramfs import BUSYBOX
from sempervirt.qemu import features

_PR_SET_PDEATHSIG = 1
CONTROL_S = 60.0
# Deaths that need nothing but the kernel itself.
PANIC = Death("panic", "echo c >/proc/sysrq-trigger")
CRASH = "echo {} >/proc/semper_crash"
SYSCTL = "/proc/sys/kernel"
_QUICK = f"echo 3 >{SYSCTL}/watchdog_thresh; echo 1 >{SYSCTL}/softlockup_panic"
_SLOW = f"echo 0 >{SYSCTL}/softlockup_panic; echo 10 >{SYSCTL}/watchdog_thresh"
# The others need the tests' crasher in host a.
DEATHS = {
    death.name: death
    for death in (
        PANIC,
        Death("direct-panic", CRASH.format("panic")),
        Death("null", CRASH.format("null")),
        # The kernel itself survives this one: nothing is put off, and the module is not needed.
        Death("oops", CRASH.format("null"), f"echo 0 >{SYSCTL}/panic_on_oops",
              f"echo 1 >{SYSCTL}/panic_on_oops", word="BUG: "),
        Death("hard-irq", CRASH.format("hrtimer")),
        Death("soft-lockup", CRASH.format("loop"), _QUICK, _SLOW),
        Death("hard-lockup", CRASH.format("loop-irqs-off"), _QUICK, _SLOW),
    )
}  # fmt: skip
# Only the module's word moves VMs: what else is seen of one death must not move the VM that is to
# see the next one.
ONE_BY_ONE = 'version = 1\n[signs]\n{signs}\n[module]\nafterwards = "stay"\n'


def main() -> int:
    """The program."""
    options = _parser().parse_args()
    if not is_alone():
        return _alone(sys.argv[1:])
    _end_with_parent()
    outcomes: list[Outcome] = []
    failure = ""
    try:
        outcomes, failure = asyncio.run(_run(options))
    except (NoAnswerError, SempervirtError, OSError) as error:
        failure = str(error)
    json.dump({"outcomes": [asdict(one) for one in outcomes], "failure": failure}, sys.stdout)
    return 1 if failure or any(one.wrong for one in outcomes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sempervirt.demo.guard.run", description=__doc__
    )
    parser.add_argument("--tree", type=Path, required=True, help="the kernel of host a")
    parser.add_argument("--module", type=Path, required=True, help="semper_guard.ko for it")
    parser.add_argument("--disk", type=Path, required=True, help="of host a; made if need be")
    parser.add_argument("--etcd", type=Path, help="where it is, if not on PATH")
    parser.add_argument("--crasher", type=Path, help="semper_crash.ko for it")
    parser.add_argument("--death", action="append", choices=DEATHS, default=[])
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--policy", default="irq-restart")
    parser.add_argument("--let-go", action="store_true", help="the last panic goes ahead")
    parser.add_argument(
        "--in-response", action="store_true", help="the agent loads the module, upon a sign"
    )
    parser.add_argument("--unguarded", action="store_true", help="the control: without the module")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the logs there")
    return parser


def _alone(arguments: list[str]) -> int:
    """This program once more, in a network namespace with one address."""
    unshare = shutil.which("unshare")
    busybox = shutil.which("ip") or str(BUSYBOX)
    if unshare is None:
        raise NotFound("unshare is not installed", remedy="apt-get install util-linux")
    own = ["--net"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--net"]
    ip = f"{busybox} ip" if busybox == str(BUSYBOX) else busybox
    begin_there = f'{ip} link set lo up && {ip} addr add {HERE}/32 dev lo && exec "$@"'
    command = [unshare, *own, "--kill-child=KILL", "--fork", "--pid", "--mount-proc"]
    command += ["/bin/sh", "-c", begin_there, "sh", sys.executable, "-m"]
    command += ["sempervirt.demo.guard.run", *arguments]
    return subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


async def _run(options: argparse.Namespace) -> tuple[list[Outcome], str]:
    qemu = features.find_qemu()
    disk = await asyncio.to_thread(image.disk, options.disk, qemu)
    further = {}
    if options.crasher:
        further["semper_crash.ko"] = options.crasher.read_bytes()
    etcd = find_etcd(*([options.etcd] if options.etcd else []))
    parts = Parts(options.tree, options.module, disk, etcd, further, _presets(options))
    with tempfile.TemporaryDirectory(prefix="semper-guard-", dir="/tmp") as name:
        place = Path(name)
        try:
            async with Stage.opened(parts, place) as stage:
                return await _trials(stage, options)
        finally:
            if options.keep:
                await asyncio.to_thread(_keep_logs, place, options.keep)


def _keep_logs(place: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for log in place.glob("*.log"):
        shutil.copy(log, to)


def _presets(options: argparse.Namespace) -> str:
    if options.let_go or options.in_response:
        return "version = 1\n"
    signs = "\n".join(f'"{sign.value}" = "watch"' for sign in SignId if not sign.of_module)
    return ONE_BY_ONE.format(signs=signs)


async def _trials(stage: Stage, options: argparse.Namespace) -> tuple[list[Outcome], str]:
    host = stage.host_a
    if options.crasher:
        await asyncio.to_thread(host.do, "insmod /opt/semper/semper_crash.ko")
    deaths = [DEATHS[name] for name in options.death or [PANIC.name]]
    if options.unguarded:
        await begin(stage, "web")
        return [], await die_unguarded(stage, deaths[0], CONTROL_S)
    if not options.in_response:
        await _load(host, options)
    outcomes: list[Outcome] = []
    turns = [death for _ in range(options.times) for death in deaths]
    for number, death in enumerate(turns):
        vm = f"web{number}"
        ears = await begin(stage, vm)
        lets_go = options.let_go and number == len(turns) - 1
        outcome = await die(stage, vm, ears, death, takes_back=not lets_go)
        if options.in_response and number == 0 and not outcome.wrong:
            outcome.wrong = await _was_loaded(stage)
        if lets_go and not outcome.wrong:
            outcome.wrong = await _went_ahead(stage)
        outcomes.append(outcome)
        if outcome.wrong:
            break
        async with stage.client_b() as client:
            await client.kill_vm(vm)
    return outcomes, ""


async def _load(host: HostA, options: argparse.Namespace) -> None:
    limits = "max_events=1000 deadline_s=0" if not options.let_go else ""
    load = f"insmod /opt/semper/semper_guard.ko policy={options.policy} {limits}"
    await asyncio.to_thread(host.do, load)


async def _was_loaded(stage: Stage) -> str:
    """What is wrong with the module that the agent was to load upon a sign; "" if it is there."""
    async with stage.client_a() as client:
        view = await client.guard()
    if view.module and view.module_parameters.get("policy") == view.module_policy.value:
        return ""
    return f"the module was not loaded: {view.module_failure}; {stage.host_a.tail()}"


async def _went_ahead(stage: Stage) -> str:
    """What is wrong with the panic that comes after the evacuation; "" if it came."""
    if not await asyncio.to_thread(stage.host_a.dies, CONTROL_S):
        return f"the panic did not go ahead after the evacuation; {stage.host_a.tail()}"
    if "evacuated; put off was" not in stage.host_a.log.read_text(errors="replace"):
        return f"the kernel died of something else; {stage.host_a.tail()}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
