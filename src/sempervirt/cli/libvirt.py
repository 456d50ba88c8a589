"""`semper libvirt`: what a domain needs for a guarded disk, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sempervirt.cli.output import Output, OutputOption, out
from sempervirt.cli.session import ask_agent, here, require_here
from sempervirt.core.errors import (
    InvalidRequest,
    NotFound,
    OutcomeUnknown,
    StateConflict,
    Unavailable,
)
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
# It starts QEMU to look at what that can do.
VIRSH_S = 60


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


@app.command("adopt", epilog="Example: semper libvirt adopt web")
def adopt(
    domain: Annotated[str, typer.Argument(metavar="DOMAIN", help="The domain's name in libvirt.")],
    undo: Annotated[
        bool, typer.Option("--undo", help="Give the domain its former description back.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --undo: also if it was changed since.")
    ] = False,
    connect: Annotated[
        str, typer.Option(metavar="URI", help="Which libvirt is asked.")
    ] = "qemu:///system",
    user: Annotated[
        str | None,
        typer.Option(metavar="USER", help="Whom libvirt runs QEMU as; default: of qemu.conf."),
    ] = None,
) -> None:
    """Have a domain that is off use its guarded disks, by changing its description in libvirt.

    First: semper disk guard IMAGE --name DOMAIN/vda --group kvm. The former description is kept
    until --undo; nothing is changed where semper libvirt check would find something wrong.
    """
    from sempervirt.vm.libvirt import adopted, parse
    from sempervirt.vm.libvirt import check as look
    from sempervirt.vm.libvirt import sockets as sockets_of

    config = here()
    kept = Kept(config.state_dir / "libvirt", domain)
    if undo:
        _undo(kept, connect, force=force)
        return
    kept.require_free()
    before = _dumped(connect, domain, whole=True)
    served = _served(ask_agent(lambda client: client.disks()))
    text, disks = adopted(parse(before), served)
    if not disks:
        raise NotFound(
            f"no disk of domain {domain} is guarded, or all are in use already",
            remedy=f"semper disk guard IMAGE --name {domain}/vda --group kvm; see: semper libvirt "
            f"check {domain}",
        )
    described = parse(text)
    ways = {path: _way(path) for path in sockets_of(described)}
    wrong = [one for one in look(described, served, _user(user), ways) if not one.hint]
    if wrong:
        raise StateConflict(f"nothing is changed: {wrong[0].what}", remedy=wrong[0].remedy)
    _require_off(connect, domain)
    kept.keep(before)
    try:
        _define(connect, text)
    except Unavailable:  # not when nobody knows whether it was done
        kept.drop()
        raise
    kept.note(_dumped(connect, domain))
    names = ", ".join(one.name for one in disks)
    out.print(f"domain {domain} uses {names} from its next start on", highlight=False)
    out.print(
        f"as it was: {kept.former}; back: semper libvirt adopt {domain} --undo", soft_wrap=True
    )


def _undo(kept: Kept, uri: str, *, force: bool) -> None:
    former = kept.read()
    if not force and _dumped(uri, kept.domain) != kept.adopted_text():
        raise StateConflict(
            f"the description of domain {kept.domain} was changed since, or was never on record",
            remedy=f"virsh edit {kept.domain}, after {kept.former}; or lose the changes: --force",
        )
    _require_off(uri, kept.domain)
    _define(uri, former)
    kept.drop()
    out.print(f"domain {kept.domain} is described as before", highlight=False)
    out.print("its disks are served until: semper disk unguard VM/DISK", highlight=False)


class Unanswered(OutcomeUnknown):
    """libvirt is silent."""


class Kept:
    """The former description of a domain that was adopted, and the one that it got."""

    def __init__(self, directory: Path, domain: str) -> None:
        from sempervirt.core.names import check_name

        try:
            check_name(domain)
        except ValueError as error:
            raise InvalidRequest.of(error) from error
        self.domain = domain
        self.former = directory / f"{domain}.xml"
        self._adopted = directory / f"{domain}.adopted.xml"

    def require_free(self) -> None:
        """Raises StateConflict for a domain that was adopted already."""
        if self.former.exists():
            raise StateConflict(
                f"domain {self.domain} was adopted already, and {self.former} is how it was",
                remedy=f"first: semper libvirt adopt {self.domain} --undo",
            )

    def keep(self, text: str) -> None:
        """Writes the former description down. Raises Unavailable."""
        self._write(self.former, text)

    def note(self, text: str) -> None:
        """Writes down what libvirt has made of the new one. Raises Unavailable."""
        self._write(self._adopted, text)

    def read(self) -> str:
        """The former description. Raises NotFound."""
        try:
            return self.former.read_text(encoding="utf-8")
        except OSError as error:
            raise NotFound(
                f"domain {self.domain} was not adopted: {self.former} cannot be read",
                remedy=f"change it by hand: virsh edit {self.domain}",
            ) from error

    def adopted_text(self) -> str:
        """What libvirt had made of the new one; "" where that is not known."""
        try:
            return self._adopted.read_text(encoding="utf-8")
        except OSError:
            return ""

    def drop(self) -> None:
        """Both are needed no more."""
        self._adopted.unlink(missing_ok=True)
        self.former.unlink(missing_ok=True)

    @staticmethod
    def _write(path: Path, text: str) -> None:
        from sempervirt.host.records import make_directory, replace_text

        try:
            make_directory(path.parent, 0o700)
            replace_text(path, text, durable=True)
        except OSError as error:
            raise Unavailable(f"{path} cannot be written: {error.strerror}") from error


def _require_off(uri: str, domain: str) -> None:
    state = _virsh(uri, "domstate", "--", domain).strip()
    if state != "shut off":
        raise StateConflict(
            f"domain {domain} is {state}, and keeps its disks until it is off",
            remedy=f"virsh shutdown {domain}",
        )


def _define(uri: str, text: str) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".xml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        try:
            _virsh(uri, "define", "--validate", "--", file.name)
        except Unanswered as error:
            raise OutcomeUnknown(
                f"{error.message}, and perhaps has changed the domain",
                remedy="see: virsh dumpxml --inactive; back: semper libvirt adopt DOMAIN --undo",
            ) from error


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


def _dumped(uri: str, domain: str, *, whole: bool = False) -> str:
    """A domain as it is at its next start; `whole`: with its passwords."""
    return _virsh(uri, "dumpxml", "--inactive", *["--security-info"] * whole, "--", domain)


def _virsh(uri: str, *words: str) -> str:
    """What virsh says. Raises Unavailable, Unanswered."""
    import os
    import subprocess

    argv = ["virsh", "--connect", uri, *words]
    plain = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, check=False, timeout=VIRSH_S, env=plain
        )
    except FileNotFoundError as error:
        raise Unavailable(
            "virsh is not installed",
            remedy="apt install libvirt-clients; or look at a description: semper libvirt check "
            "--file XML",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise Unanswered(
            f"libvirt has not answered for {VIRSH_S} s", remedy="systemctl status libvirtd"
        ) from error
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
