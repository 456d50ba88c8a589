"""`semper disk guard` and `unguard`: disks of VMs that another manager runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sempervirt.cli.arguments import DiskName
from sempervirt.cli.output import Output, OutputOption, err, out, print_json
from sempervirt.cli.session import ask_agent
from sempervirt.core.errors import InvalidRequest


def guard(
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="A raw image file or a block device.")
    ],
    name: Annotated[
        str, typer.Option(metavar="VM/DISK", help="What to call it, for example web/vda.")
    ],
    queues: Annotated[
        int, typer.Option(min=1, max=64, help="The most queues that the VM's QEMU may use.")
    ] = 16,
    owner: Annotated[
        str | None, typer.Option(metavar="USER", help="Whose the socket is; default: the agent's.")
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(metavar="GROUP", help="Which group may connect; libvirt's QEMU: kvm."),
    ] = None,
    mode: Annotated[str, typer.Option(metavar="OCTAL", help="Mode of the socket.")] = "0660",
    socket: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Where QEMU connects; default: printed.")
    ] = None,
    direct: Annotated[
        bool, typer.Option("--direct", help="Go around the host's page cache.")
    ] = False,
    read_only: Annotated[bool, typer.Option("--read-only", help="Never write.")] = False,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="The image is raw although it begins as one of another format."),
    ] = False,
    serial: Annotated[str, typer.Option(help="The serial number that the guest sees.")] = "",
    output: OutputOption = Output.TABLE,
) -> None:
    """Serve a disk to the QEMU of libvirt, Proxmox VE, Incus or a script of your own.

    Two processes serve it, as for our own VMs: when one dies, the other goes on. The image is
    served until semper disk unguard, also after a boot of the host. What QEMU needs: semper
    libvirt xml VM.
    """
    from sempervirt.api.schemas import GuardRequest

    try:
        bits = int(mode, 8)
    except ValueError as error:
        raise InvalidRequest(f'"{mode}" is no mode', remedy="write for example 0660") from error
    if not 0 <= bits <= 0o777:
        raise InvalidRequest(f'"{mode}" is no mode', remedy="write for example 0660")
    request = GuardRequest(
        image=image.absolute(),
        format="raw" if raw else None,
        read_only=read_only,
        queues=queues,
        direct=direct,
        serial=serial,
        socket=socket.absolute() if socket else None,
        owner=owner,
        group=group,
        mode=bits,
    )
    with err.status(f"guarding {name} …"):
        view = ask_agent(lambda client: client.guard_disk(name, request))
    if output is Output.JSON:
        print_json(view)
        return
    out.print(f"{view.name} is {view.condition.value} at {view.socket}", highlight=False)


def unguard(
    name: DiskName,
    force: Annotated[
        bool, typer.Option("--force", help="Also while a QEMU is connected: its guest waits then.")
    ] = False,
) -> None:
    """Serve a disk of another manager's VM no more; the image is free then, and untouched."""
    ask_agent(lambda client: client.unguard_disk(name, force=force))
