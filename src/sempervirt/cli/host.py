"""`semper host`: what this host offers to VMs."""

from __future__ import annotations

import asyncio

import typer

from sempervirt.agent.config import AgentConfig
from sempervirt.agent.host import HostProbe
from sempervirt.api.client import Client
from sempervirt.api.schemas import HostView
from sempervirt.api.views import host_view
from sempervirt.cli.output import Output, OutputOption, facts, out, print_json

app = typer.Typer(no_args_is_help=True, help="What this host offers to VMs.")


@app.command("show", epilog="Example: semper host show")
def show(output: OutputOption = Output.TABLE) -> None:
    """Show the accelerator, found by running a tiny guest, and what QEMU can do.

    Works with or without an agent.
    """
    view = asyncio.run(_host())
    if output is Output.JSON:
        print_json(view)
        return
    out.print(
        facts(
            [
                ("accelerator", f"{view.accelerator} ({view.accelerator_reason})"),
                ("qemu", f"{view.qemu_version} ({view.qemu})"),
                ("machines", ", ".join(view.machines)),
                ("networks", ", ".join(view.networks)),
                ("binds queues to threads", ", ".join(view.thread_maps) or "no"),
                ("reconnects disks after", view.reconnect),
                ("sandbox", "yes" if view.sandbox else "no"),
            ]
        )
    )


async def _host() -> HostView:
    config = AgentConfig.default()
    if config.socket.exists():
        async with Client.connect(config.socket) as client:
            return await client.host()
    return host_view(await HostProbe(config.qemu, config.state_dir / "cache").facts())
