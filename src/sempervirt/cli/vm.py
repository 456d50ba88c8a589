"""`semper vm`: virtual machines."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sempervirt.cli import console as terminal
from sempervirt.cli import migrate, saved, tail
from sempervirt.cli.arguments import VmName
from sempervirt.cli.output import (
    Output,
    OutputOption,
    ago,
    clock,
    err,
    facts,
    listing,
    out,
    print_json,
    styled,
)
from sempervirt.cli.session import ask_agent, require_here
from sempervirt.cli.whereabouts import sentence, why
from sempervirt.core.errors import StateConflict
from sempervirt.core.sizes import format_size

if TYPE_CHECKING:
    from sempervirt.api.client import Client
    from sempervirt.api.schemas import VmView

app = typer.Typer(no_args_is_help=True, help="Run virtual machines, look at them, move them.")

EVENTS_SHOWN = 10


@app.command("run", epilog="Example: semper vm run web.toml")
def run(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A VM file (TOML).", show_default=False)
    ],
    detach: Annotated[
        bool,
        typer.Option("--detach", "-d", help="Return once the VM runs. Needs an agent (semperd)."),
    ] = False,
    grace: Annotated[
        float, typer.Option(help="Seconds that the guest may take to power off at Ctrl-C.", min=0)
    ] = 60.0,
    output: OutputOption = Output.TABLE,
) -> None:
    """Start the VM that FILE describes.

    If an agent (semperd) runs on this host, the agent takes the VM over. If none runs, this command
    is the agent until the VM ends: other terminals can look at the VM, and Ctrl-C powers the VM
    off. With --output json one line is printed when the VM runs, and one when it has ended.
    """
    import asyncio

    # The HTTP server takes longer to import than most commands take to run.
    from sempervirt.cli import foreground
    from sempervirt.qemu.spec_file import load_spec

    spec = load_spec(file)
    raise typer.Exit(
        asyncio.run(foreground.run(spec, detach=detach, grace_s=grace, json=output is Output.JSON))
    )


@app.command("list", epilog="Example: semper vm list --output json")
def list_vms(output: OutputOption = Output.TABLE) -> None:
    """List all VMs of this host, also those that have ended."""
    views = ask_agent(lambda client: client.vms())
    if output is Output.JSON:
        print_json(views)
        return
    table = listing("vm", "state", "pid", "accel", "vcpus", "memory", "up", "why")
    for view in views:
        table.add_row(
            view.name,
            styled(view.state),
            str(view.pid or "-"),
            view.accelerator or "?",
            str(view.vcpus or "?"),
            "?" if view.memory is None else format_size(view.memory),
            "-" if view.end or view.started is None else ago(view.started),
            why(view),
        )
    out.print(table)


@app.command("show", epilog="Example: semper vm show web")
def show(name: VmName, output: OutputOption = Output.TABLE) -> None:
    """Show one VM: state and reason, migration, disks, channels, events, and how the VM ended."""
    view = ask_agent(lambda client: client.vm(name))
    _print(view, output)


@app.command("start", epilog="Example: semper vm start web")
def start(name: VmName, output: OutputOption = Output.TABLE) -> None:
    """Start a VM that has ended, as it was started the last time.

    A VM that was saved without a file, or when its host went down, goes on where it was. For a
    changed VM file: semper vm run FILE.
    """
    _change(name, "starting", lambda client: client.start_vm(name), output)


@app.command("stop", epilog="Example: semper vm stop web --grace 30")
def stop(
    name: VmName,
    grace: Annotated[
        float, typer.Option(help="Seconds that the guest may take to power off.", min=0)
    ] = 60.0,
    output: OutputOption = Output.TABLE,
) -> None:
    """Ask the guest to power off, and end the VM if the guest has not done so in time."""
    _change(name, "stopping", lambda client: client.stop_vm(name, grace), output)


@app.command("kill", epilog="Example: semper vm kill web")
def kill(name: VmName, output: OutputOption = Output.TABLE) -> None:
    """End a VM at once, whatever its state; return when nothing uses its disks any more.

    Killing also settles a VM whose state is unknown.
    """
    _change(name, "killing", lambda client: client.kill_vm(name), output)


@app.command("pause", epilog="Example: semper vm pause web")
def pause(name: VmName, output: OutputOption = Output.TABLE) -> None:
    """Stop a VM's processors; memory and disks stay as they are."""
    _change(name, "pausing", lambda client: client.pause_vm(name), output)


@app.command("resume", epilog="Example: semper vm resume web")
def resume(name: VmName, output: OutputOption = Output.TABLE) -> None:
    """Let a paused VM run again."""
    _change(name, "resuming", lambda client: client.resume_vm(name), output)


@app.command("restart-qemu", epilog="Example: semper vm restart-qemu web --qemu /opt/qemu/bin/…")
def restart_qemu(
    name: VmName,
    qemu: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Move to this QEMU; by default to the installed one."),
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Move a running VM to a new QEMU process, for example after an upgrade of QEMU.

    The guest stands still for a moment. Its memory stays in place, and its disks stay served. If
    the new QEMU cannot take over, the old QEMU goes on. Programs that were connected to the console
    or to a channel have to connect again.
    """
    program = qemu.absolute() if qemu else None
    with err.status(f"moving {name} to a new QEMU …"):
        view = ask_agent(lambda client: client.restart_qemu(name, program))
    if output is Output.JSON:
        print_json(view)
        return
    text = f"{name} runs in QEMU {view.version}, pid {view.pid}; "
    still = f"the guest stood still for {view.blackout_ms:.0f} ms"
    out.print(text + (still if view.blackout_ms else "it is paused, as before"), highlight=False)


app.command("save", epilog="Example: semper vm save web web.saved")(saved.save)
app.command("restore", epilog="Example: semper vm restore web.saved")(saved.restore)
app.command("clone", epilog="Example: semper vm clone web.saved web-2 --into /images")(saved.clone)


@app.command("remove", epilog="Example: semper vm remove web")
@app.command("forget", hidden=True, epilog="Example: semper vm forget web")
def remove(name: VmName) -> None:
    """Take a VM that has ended off the list, and delete its logs, its firmware's variables and a
    state that the agent has kept of it.

    Images are not touched.
    """
    ask_agent(lambda client: client.forget_vm(name))


app.command("migrate", epilog="Example: semper vm migrate web --to b")(migrate.migrate)
app.command("place", epilog="Example: semper vm place web")(migrate.place)
app.command(
    "resolve",
    epilog='Example: semper vm resolve web --owner b --evidence "a is switched off, I stand there"',
)(migrate.resolve)


@app.command("console", epilog="Example: semper vm console web")
def console(name: VmName) -> None:
    """Attach this terminal to a VM's serial console. Ctrl-] leaves.

    Only one terminal at a time: a second terminal waits until the first has left.
    """
    require_here()
    view = ask_agent(lambda client: client.vm(name))
    if view.end is not None:
        raise StateConflict(
            f"VM {name} has ended: {view.end.reason}",
            remedy=f"see what it wrote: semper vm logs {name}",
        )
    terminal.attach(view.console, name)


@app.command("logs", epilog="Example: semper vm logs web --source qemu --lines 20")
def logs(
    name: VmName,
    source: Annotated[
        str,
        typer.Option(
            "--source",
            "-s",
            help="console, qemu, or a disk: who serves it, or DISK:spare, DISK:previous.",
        ),
    ] = "console",
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=1, max=10000, help="How many lines.")
    ] = 100,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Then print what is added, until Ctrl-C.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Print the last lines of a log: the serial console, QEMU, or the backend of a disk."""
    if follow:
        require_here()  # the file is followed
    view = ask_agent(lambda client: client.vm_log(name, source, lines))
    if output is Output.JSON:
        print_json(view)
        return
    for line in view.lines:
        typer.echo(line)
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            tail.follow(view.path, typer.echo)


def _change(
    name: str,
    doing: str,
    request: Callable[[Client], Awaitable[VmView]],
    output: Output,
) -> None:
    with err.status(f"{doing} {name} …"):
        view = ask_agent(request)
    if output is Output.JSON:
        print_json(view)
    else:
        why = f" ({view.why})" if view.why else ""
        out.print(f"{view.name} is {view.state.value}{why}", highlight=False)


def _migration(view: VmView) -> str | None:
    moved = view.migration
    if moved is None:
        return None
    return sentence(moved) if moved.over else f"{sentence(moved)} ({migrate.about(moved)})"


def _recorded(view: VmView) -> list[tuple[str, str]]:
    """What only the record of a VM can tell."""
    if view.spec is None or view.started is None:
        return []
    boot = view.spec.kernel or view.spec.firmware or "default firmware"
    return [
        ("size", f"{view.spec.vcpus} vcpus, {format_size(view.spec.memory)}"),
        ("boots", str(boot)),
        ("started", f"{clock(view.started)} ({ago(view.started)} ago), {view.resets} resets"),
    ]


def _print(view: VmView, output: Output) -> None:
    from sempervirt.qemu.state import Runstate

    if output is Output.JSON:
        print_json(view)
        return
    rows = [
        ("vm", view.name),
        ("state", view.state.value + (f" ({view.why})" if view.why else "")),
        ("migration", _migration(view)),
        ("remedy", view.remedy or None),
        ("pid", str(view.pid) if view.pid else None),
        ("accelerator", view.accelerator),
        *_recorded(view),
        ("disks", ", ".join(view.disks)),
        *((device, queues.summary) for device, queues in view.queues.items()),
        ("console", str(view.console) if view.end is None else None),
        *((f"channel {name}", str(path)) for name, path in view.channels.items()),
    ]
    if view.end is not None:
        how = f"exit code {view.end.exit_code}" if view.end.exit_code is not None else ""
        how = f"signal {view.end.signal}" if view.end.signal is not None else how
        rows.append(("ended", f"{view.end.reason}{f' ({how})' if how else ''}"))
    out.print(facts(rows))
    for event in view.events[-EVENTS_SHOWN:]:
        out.print(f"  {clock(event.time)}  {event.message}", highlight=False)
    if view.end is not None and view.state is Runstate.CRASHED:
        out.print("the last lines of QEMU:")
        for line in view.end.log:
            out.print(f"  {line}", highlight=False, markup=False)
