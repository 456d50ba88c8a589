"""`semper passthrough`: devices that are handed to a guest, and their mediators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sempervirt.cli.completion import device_names
from sempervirt.cli.output import Output, OutputOption, facts, listing, out, print_json
from sempervirt.cli.session import ask_agent
from sempervirt.core.sizes import format_size

if TYPE_CHECKING:
    from sempervirt.api.schemas import DeviceView

app = typer.Typer(
    no_args_is_help=True,
    help="Look at devices that are handed to a guest, and at whether they can be moved.",
)
DeviceName = Annotated[
    str,
    typer.Argument(metavar="VM/DEVICE", help="For example web/nvme.", autocompletion=device_names),
]


@app.command("list", epilog="Example: semper passthrough list")
def list_devices(output: OutputOption = Output.TABLE) -> None:
    """List the passed-through devices of all running VMs.

    A device of ours has an image, one of the host an address. It is running while the guest's
    doorbells go straight to it, and captured while its VM moves. When the mediator of one of ours
    dies, a spare that is ready goes on in its place. One without a mediator is gone until the VM is
    run again.
    """
    views = ask_agent(lambda client: client.devices())
    if output is Output.JSON:
        print_json(views)
        return
    table = listing(
        "device", "kind", "state", "mediator", "spare", "can be moved", "image or address"
    )
    for view in views:
        table.add_row(
            view.name,
            view.kind,
            _state(view),
            str(view.pid or "-"),
            view.spare.value if view.spare else "-",
            "no" if view.obstacles else "yes",
            view.pci or str(view.image),
        )
    out.print(table)


@app.command("show", epilog="Example: semper passthrough show web/nvme")
def show(name: DeviceName, output: OutputOption = Output.TABLE) -> None:
    """Show one passed-through device, what its mediator has done, and what keeps it from being
    moved.

    What another host has against it is told by: semper vm migrate VM --to HOST --dry-run.
    """
    view = ask_agent(lambda client: client.device(name))
    if output is Output.JSON:
        print_json(view)
        return
    counters = (view.mediator or {}).get("counters", {})
    size = (view.mediator or {}).get("size_bytes")
    requests = sum(counters.get(kind, 0) for kind in ("reads", "writes", "flushes", "others"))
    doorbells = ", ".join(
        f"{counters.get(f'doorbells_{how}', 0):,} {how}"
        for how in ("direct", "captured", "trapped")
    )
    out.print(
        facts(
            [
                ("device", view.name),
                ("kind", view.kind),
                ("state", _state(view)),
                ("gone because", view.ailment),
                ("does not answer", view.silence),
                ("data", view.failing or None),
                ("mediator", f"pid {view.pid}" if view.pid else None),
                ("spare", view.spare.value if view.spare else None),
                ("take-overs", str(view.takeovers) if view.takeovers else None),
                ("PCI address", f"00:{view.slot:02x}.0, in the guest"),
                ("PCI device", f"{view.pci}, of this host" if view.pci else None),
                (
                    "image",
                    f"{view.image}{', read-only' if view.read_only else ''}"
                    if view.image
                    else None,
                ),
                ("size", format_size(size) if size else None),
                # Nobody counts what goes straight to the device.
                ("requests", f"{requests:,}" if counters and view.image else None),
                ("doorbells", doorbells if counters else None),
                ("can be moved", "; ".join(view.obstacles) or "yes, as far as this host knows"),
            ]
        )
    )


def _state(view: DeviceView) -> str:
    if view.ailment:
        return "gone"
    return view.state.value if view.state else "silent"
