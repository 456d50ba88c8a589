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
from sempervirt.agent import moves
from sempervirt.agent.agent import Agent
from sempervirt.agent.fencing import follow_claims
from sempervirt.api.server import serving, serving_hosts
from sempervirt.cluster.cluster import Cluster, read_settings
from sempervirt.cluster.membership import Membership, persist
from sempervirt.core.errors import SempervirtError, kind_of
from sempervirt.daemon.logs import log_to_stderr
from sempervirt.daemon.notify import notify
from sempervirt.host import background, descriptors, records
from sempervirt.vm.config import AgentConfig

log = logging.getLogger(__name__)


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
    descriptors.raise_limit()
    os.umask(records.PRIVATE)  # logs and sockets of what is started, too
    try:
        asyncio.run(_serve(config))
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
        "--log-level", default="info", choices=["debug", "info", "warning", "error"]
    )
    parser.add_argument("--version", action="version", version=f"semperd {sempervirt.__version__}")
    return parser


async def _serve(config: AgentConfig) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            loop.add_signal_handler(number, _end, number, ended)
    async with Agent.open(config) as agent, AsyncExitStack() as stack:
        await moves.resume_all(agent)
        await stack.enter_async_context(serving(agent, config.socket))
        log.info("serve socket=%s state=%s vms=%d", config.socket, config.state_dir, len(agent.vms))
        notify("READY=1")
        async with _member(config, agent):
            await ended.wait()
        notify("STOPPING=1")


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
                membership = await stack.enter_async_context(Membership.kept(cluster))
                tasks.append(background.start(_serve_hosts(agent, membership), "hosts"))
                tasks.append(background.start(_keep_to_claims(agent, cluster), "claims"))
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
    await persist(lambda worked: follow_claims(store, host, lambda: agent.vms, worked), "claims")


async def _serve_hosts(agent: Agent, membership: Membership) -> None:
    try:
        async with serving_hosts(agent, membership):
            log.info("serve hosts address=%s", membership.cluster.settings.address)
            await asyncio.Event().wait()
    except SempervirtError as error:
        log.error("other hosts are not served: %s", error)  # noqa: TRY400


if __name__ == "__main__":
    sys.exit(main())
