"""`semper libvirt`: what a domain needs for a guarded disk, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sempervirt.cli.output import Output, OutputOption, out
from sempervirt.cli.session import ask_agent, require_here
from sempervirt.core.errors import InvalidRequest, NotFound, StateConflict, Unavailable
from sempervirt.core.names import suggest

if TYPE_CHECKING:
    from sempervirt.api.schemas import DiskView
    from sempervirt.vm.libvirt import Node, Served, User

app = typer.Typer(
    no_args_is_help=True,
    help="Disks of libvirt's domains: the lines of XML, and what is wrong with a domain.",
)

QEMU_CONF = Path("/etc/libvirt/qemu.conf")
DEBIAN_USER = "libvirt-qemu"
VIRSH_S = 20


@app.command("xml", epilog="Example: semper libvirt xml web")
def xml(
    vm: Annotated[str, typer.Argument(metavar="VM", help="The first part of the disks' names.")],
) -> None:
    """Print what libvirt's description of a domain needs for the guarded disks of VM.

    First: semper disk guard IMAGE --name VM/vda --group kvm. Then: virsh edit DOMAIN.
    """
    from sempervirt.vm.libvirt import domain_xml

    served = _served(ask_agent(lambda client: client.disks()))
    disks = [disk for disk in served if disk.name.partition("/")[0] == vm]
    if not disks:
        known = {disk.name.partition("/")[0] for disk in served}
        raise NotFound(
            f"no disk of {vm} is guarded",
            remedy=suggest(vm, known) or f"semper disk guard IMAGE --name {vm}/vda --group kvm",
        )
    typer.echo(domain_xml(disks), nl=False)


@app.command("check", epilog="Example: semper libvirt check web")
def check(
    domain: Annotated[str, typer.Argument(metavar="DOMAIN", help="The domain's name in libvirt.")],
    file: Annotated[
        Path | None,
        typer.Option(metavar="XML", help="Look at this description, and do not ask virsh."),
    ] = None,
    connect: Annotated[
        str, typer.Option(metavar="URI", help="Which libvirt is asked.")
    ] = "qemu:///system",
    user: Annotated[
        str | None,
        typer.Option(metavar="USER", help="Whom libvirt runs QEMU as; default: of qemu.conf."),
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Say what is wrong with a domain that uses a guarded disk, each with a remedy.

    libvirt starts a domain whose disk QEMU may not open, and hangs; so look before. Exit codes: 0
    nothing is wrong; 5 something is.
    """
    from sempervirt.vm.libvirt import check as look
    from sempervirt.vm.libvirt import parse, sockets

    require_here()
    described = parse(_read(file) if file is not None else _dumped(connect, domain))
    served = _served(ask_agent(lambda client: client.disks()))
    ways = {path: _way(path) for path in sockets(described)}
    found = look(described, served, _user(user), ways)
    if output is Output.JSON:
        for one in found:
            typer.echo(json.dumps({"what": one.what, "remedy": one.remedy, "hint": one.hint}))
    else:
        for one in found:
            style = "yellow" if one.hint else "red"
            out.print(f"{'hint' if one.hint else 'wrong'}: {one.what}", style=style, soft_wrap=True)
            out.print(f"  {one.remedy}", highlight=False, markup=False, soft_wrap=True)
    wrong = sum(not one.hint for one in found)
    if wrong:
        raise StateConflict(
            f"domain {domain}: {wrong} to put right",
            remedy=f"do what is said of each, then again: semper libvirt check {domain}",
        )
    if output is Output.TABLE:
        out.print(f"domain {domain}: nothing is wrong", highlight=False)


def _served(views: list[DiskView]) -> list[Served]:
    from sempervirt.disk.state import NOT_SERVED
    from sempervirt.vm.libvirt import Served

    served = []
    for view in views:
        if view.socket is None:
            continue
        queues = view.queues.queues if view.queues else 1
        ailing = view.condition in NOT_SERVED
        ailment = f"{view.name} is {view.condition.value}: {view.reason}" if ailing else ""
        served.append(Served(view.name, view.image, view.socket, queues, ailment))
    return served


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"{file} cannot be read: {error}", remedy="write it: virsh dumpxml DOMAIN > FILE"
        ) from error


def _dumped(uri: str, domain: str) -> str:
    import subprocess

    argv = ["virsh", "--connect", uri, "dumpxml", "--inactive", "--", domain]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=VIRSH_S)
    except FileNotFoundError as error:
        raise Unavailable(
            "virsh is not installed",
            remedy="apt install libvirt-clients; or give the description: --file XML",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"libvirt has not answered for {VIRSH_S} s") from error
    if done.returncode != 0:
        raise Unavailable(f"virsh says: {done.stderr.strip()}", remedy="virsh list --all")
    return done.stdout


def _way(path: Path) -> list[Node] | str:
    from sempervirt.vm.libvirt import Node

    try:
        return [Node.of(place) for place in (*reversed(path.parents), path)]
    except OSError as error:
        return f"{error.strerror}: {error.filename}"


def _user(name: str | None) -> User:
    """Whom libvirt runs QEMU as. Raises NotFound."""
    import os
    import pwd
    import re

    from sempervirt.vm.libvirt import User

    if name is None:
        chosen = None
        try:
            lines = QEMU_CONF.read_text(encoding="utf-8", errors="replace")
            chosen = re.search(r'^\s*user\s*=\s*"\+?([^"]+)"', lines, re.MULTILINE)
        except OSError:
            pass  # not for us, or not there: as it is by default
        name = chosen[1] if chosen else DEBIAN_USER
    try:
        entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except KeyError as error:
        raise NotFound(
            f"there is no user {name} on this host", remedy="whom does libvirt run QEMU as? --user"
        ) from error
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return User(entry.pw_name, entry.pw_uid, frozenset(groups))
