"""`semperd`: the agent as a service.

SIGTERM and SIGINT end the agent and leave the VMs running; the next agent adopts them.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import sempervirt
from sempervirt.agent.agent import Agent
from sempervirt.api.server import serving, serving_hosts, serving_metrics
from sempervirt.cluster.cluster import Cluster, read_settings
from sempervirt.cluster.membership import Membership, persist
from sempervirt.core.errors import SempervirtError, kind_of
from sempervirt.core.sizes import parse_size
from sempervirt.daemon.journald import journal_written
from sempervirt.daemon.logs import log_to_stderr
from sempervirt.daemon.notify import keep_watchdog, notify
from sempervirt.evacuation import orders
from sempervirt.evacuation.guarding import guarded
from sempervirt.guard.presets import OPERATORS_FILE
from sempervirt.host import background, descriptors, readiness, records
from sempervirt.host.late_records import LateRecords
from sempervirt.migration import moves
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.autostart import Settled, has_run_since_boot, is_idle, start_all
from sempervirt.vm.config import FENCES, AgentConfig
from sempervirt.vm.fencing import follow_claims
from sempervirt.vm.groups import keep_groups, why_no_groups, with_groups

log = logging.getLogger(__name__)

READY_MOVES_MAX = 256
METRICS_AGAIN_S = 10.0
PORT_MAX = 65535


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    options = _parser().parse_args(arguments)
    log_to_stderr(options.log_level)
    config = AgentConfig.default(keep_vms=True)
    if options.state_dir:
        config = replace(config, state_dir=options.state_dir.absolute())
    if options.run_dir:
        config = replace(config, run_dir=options.run_dir.absolute())
    if options.image_root:
        config = replace(config, image_roots=tuple(root.absolute() for root in options.image_root))
    if options.saved_root:
        config = replace(config, saved_roots=tuple(root.absolute() for root in options.saved_root))
    config = replace(config, fences=options.fences)
    if options.guest_memory is not None:
        config = replace(config, guest_memory=options.guest_memory)
    descriptors.raise_limit()
    os.umask(records.PRIVATE)  # logs and sockets of what is started, too
    try:
        with journal_written():
            asyncio.run(_serve(config, options))
    except SempervirtError as error:
        sys.stderr.write(f"semperd: error: {error}\n")
        return kind_of(error).exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="semperd",
        description="The sempervirt agent: runs virtual machines, keeps their disks served.",
        epilog="It ends on SIGTERM and leaves the VMs running; the next agent adopts them.",
    )
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="what outlives a boot")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="sockets and logs")
    for option, what in (("--image-root", "images and kernels"), ("--saved-root", "saved states")):
        parser.add_argument(
            option,
            type=Path,
            action="append",
            metavar="DIR",
            help=f"where {what} are that other hosts and operators may name; may be repeated",
        )
    parser.add_argument(
        "--guard-presets",
        type=Path,
        metavar="FILE",
        default=OPERATORS_FILE,
        help="what the signs of a dying host mean, above what is shipped (default: %(default)s)",
    )
    parser.add_argument(
        "--fences",
        type=Path,
        metavar="FILE",
        default=FENCES,
        help="how other hosts are switched off before a standby takes over (default: %(default)s)",
    )
    parser.add_argument(
        "--guest-memory",
        type=_size,
        metavar="SIZE",
        help="what the guests of this host may have of its memory altogether, for example 56G",
    )
    parser.add_argument(
        "--metrics",
        type=_address,
        metavar="ADDRESS:PORT",
        help="serve GET /metrics there, without TLS, to whoever can connect; for example "
        "127.0.0.1:9737 (over TLS an operator with the role viewer may always read them)",
    )
    parser.add_argument(
        "--ready-moves",
        type=int,
        default=0,
        choices=range(READY_MOVES_MAX + 1),
        metavar="N",
        help="keep what N moves need ready in memory, for a host that dies (3 MB each; default 0)",
    )
    parser.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"]
    )
    parser.add_argument("--version", action="version", version=f"semperd {sempervirt.__version__}")
    return parser


def _address(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) <= PORT_MAX):
        raise argparse.ArgumentTypeError(
            f'"{text}" is no address; write for example 127.0.0.1:9737'
        )
    return text


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


async def _serve(config: AgentConfig, options: argparse.Namespace) -> None:
    presets: Path = options.guard_presets
    ready_moves: int = options.ready_moves
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            loop.add_signal_handler(number, _end, number, ended)
    records.write_late(LateRecords(config.state_dir))
    config = with_groups(config)
    async with Agent.open(config) as agent, AsyncExitStack() as stack:
        await readiness.begin()
        if not isinstance(config.groups, str):
            held = background.start(
                keep_groups(agent.vms.values, agent.standbys.beside, config.groups), "groups"
            )
            stack.push_async_callback(_ended, held)
        if why := why_no_groups(config):
            log.warning("groups: VMs are not limited in all: %s", why)
        await moves.resume_all(agent)
        orders.resume(agent)
        await stack.enter_async_context(serving(agent, config.socket))
        if options.metrics is not None:
            measured = background.start(_serve_metrics(agent, options.metrics), "metrics")
            stack.push_async_callback(_ended, measured)
        log.info("serve socket=%s state=%s vms=%d", config.socket, config.state_dir, len(agent.vms))
        notify("READY=1")
        if ready_moves:
            ready = background.start(orders.keep_ready(agent, ready_moves), "ready")
            stack.callback(ready.cancel)
        starting = background.start(_autostart(agent), "autostart")
        stack.callback(starting.cancel)
        watched = background.start(keep_watchdog(), "watchdog")
        stack.callback(watched.cancel)
        async with _member(config, agent), guarded(agent, presets):
            await ended.wait()
        notify("STOPPING=1")


async def _serve_metrics(agent: Agent, address: str) -> None:
    """Serves the metrics as soon as their address can be had: no VM waits for that."""
    told = ""
    while True:
        try:
            async with serving_metrics(agent, address):
                log.info("serve metrics address=%s", address)
                await asyncio.Event().wait()
        except SempervirtError as error:
            if str(error) != told:
                log.error("metrics are not served: %s", error)  # noqa: TRY400
            told = str(error)
        await asyncio.sleep(METRICS_AGAIN_S)


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def _autostart(agent: Agent) -> None:
    """Starts the VMs that are to run when this host is up (`vm.autostart`)."""

    def known() -> list[tuple[VmSpec, bool]]:
        return [(vm.spec, is_idle(vm.record, freed=vm.freed)) for vm in agent.vms.values()]

    settled = await asyncio.to_thread(Settled, agent.config.state_dir)
    for vm in agent.vms.values():
        if vm.spec.autostart and has_run_since_boot(vm.record):  # whoever has ended it wanted that
            settled.add(vm.name)
    await start_all(known, agent.start_vm, settled)


def _end(number: signal.Signals, ended: asyncio.Event) -> None:
    log.info("end signal=%s; the VMs run on, and the next agent adopts them", number.name)
    ended.set()


@asynccontextmanager
async def _member(config: AgentConfig, agent: Agent) -> AsyncIterator[None]:
    """Takes part in the cluster, if this host belongs to one.

    Whatever is wrong with that is an error in the log: the VMs of this host need none of it.
    """
    async with AsyncExitStack() as stack:
        tasks: list[asyncio.Task[None]] = []
        try:
            if read_settings(config) is not None:
                cluster = await stack.enter_async_context(Cluster.opened(config))
                membership = await stack.enter_async_context(
                    Membership.kept(cluster, service=agent.service)
                )
                tasks.append(background.start(_serve_hosts(agent, membership), "hosts"))
                tasks.append(background.start(_keep_to_claims(agent, cluster), "claims"))
                known = agent.peacetime.keep(agent, cluster)
                tasks.append(background.start(known, "peacetime"))
        except SempervirtError as error:
            log.error("the cluster is not taken part in: %s", error)  # noqa: TRY400
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _keep_to_claims(agent: Agent, cluster: Cluster) -> None:
    store, host = cluster.store, cluster.settings.host
    run_dir = agent.config.run_dir
    await persist(
        lambda worked: follow_claims(store, host, run_dir, lambda: agent.vms, worked), "claims"
    )


async def _serve_hosts(agent: Agent, membership: Membership) -> None:
    try:
        async with serving_hosts(agent, membership):
            log.info("serve hosts address=%s", membership.cluster.settings.address)
            await asyncio.Event().wait()
    except SempervirtError as error:
        log.error("other hosts are not served: %s", error)  # noqa: TRY400


if __name__ == "__main__":
    sys.exit(main())
