"""`semper guard`: what the host's guard sees and decides, and the installation of its module."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from sempervirt.cli.output import (
    Output,
    OutputOption,
    clock,
    err,
    facts,
    listing,
    out,
    print_json,
)
from sempervirt.cli.session import ask_agent, require_here
from sempervirt.core.durations import format_duration
from sempervirt.core.errors import InvalidRequest, StateConflict
from sempervirt.core.names import suggest
from sempervirt.guard.presets import ModulePolicy

if TYPE_CHECKING:
    from sempervirt.api.guard_schemas import DecisionView, GuardView, SourceView
    from sempervirt.cli.installed import InstalledView
    from sempervirt.guard.installation import Facts
    from sempervirt.guard.state import Phase
    from sempervirt.guard.watch import Standing

app = typer.Typer(
    no_args_is_help=True,
    help="What tells that this host may die, what is done about it, and the kernel's module.",
)


@cache
def _phases() -> dict[Phase, tuple[str, str]]:
    """What is said of a phase, and its colour."""
    from sempervirt.guard.state import Phase

    return {
        Phase.WATCHING: ("watching", "green"),
        Phase.EVACUATING: ("virtual machines are being moved away", "bold red"),
        Phase.WAITING: ("virtual machines were left, and are tried again", "bold red"),
        Phase.STAYING: ("virtual machines were left: move them, or end them", "bold red"),
        Phase.EMPTY: ("nothing is left here to be saved", "yellow"),
        Phase.LET_DIE: ("nothing is put off any more", "bold red"),
    }


@cache
def _standings() -> dict[Standing, str]:
    """The colours of how a source stands."""
    from sempervirt.guard.watch import Standing

    return {
        Standing.LOOKING: "green",
        Standing.ABSENT: "dim",
        Standing.FAILING: "yellow",
        Standing.HANGING: "bold red",
    }


@app.command("status", epilog="Example: semper guard status --output json")
def status(
    rules: Annotated[bool, typer.Option("--rules", help="Also show what each sign means.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show how the guard stands: the host, the module, a shutdown that waits, every source."""
    view = ask_agent(lambda client: client.guard())
    if output is Output.JSON:
        print_json(view)
        return
    said, style = _phases()[view.phase]
    out.print(
        facts(
            [
                ("host", Text(said, style=style)),
                ("because of", "; ".join(view.cause)),
                ("module", _module(view)),
                ("a dump", _dump(view)),
                ("a shutdown", _shutdown(view)),
                ("presets", ", ".join(view.presets)),
                ("wrong presets", Text(view.presets_trouble, style="bold red")
                 if view.presets_trouble else None),
            ]
        )
    )  # fmt: skip
    out.print()
    _show_sources(view.sources)
    if rules:
        out.print()
        _show_rules(view)


@app.command("events", epilog="Example: semper guard events")
def events(output: OutputOption = Output.TABLE) -> None:
    """Show what the guard has decided since its agent began, each with its evidence."""
    found = ask_agent(lambda client: client.guard_events())
    if output is Output.JSON:
        print_json(found)
        return
    if not found:
        out.print("nothing was seen")
        return
    _show_decisions(found)


@app.command("simulate", epilog="Example: semper guard simulate module.panic")
def simulate(
    event: Annotated[
        str, typer.Argument(metavar="EVENT", help="A sign; see semper guard status --rules.")
    ],
    act: Annotated[
        bool,
        typer.Option("--act", help="Do it: move the virtual machines. The module is told nothing."),
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what would be decided upon a sign as all stands now. Without --act nothing is done."""
    from sempervirt.guard.signs import SignId

    try:
        sign = SignId(event)
    except ValueError as error:
        hint = suggest(event, (one.value for one in SignId))
        raise InvalidRequest(
            f'there is no sign "{event}"', remedy=hint or "see: semper guard status --rules"
        ) from error
    view = ask_agent(lambda client: client.simulate_sign(sign, act=act))
    if output is Output.JSON:
        print_json(view)
        return
    if not view.decisions:
        out.print(f"{event} is ignored: nothing would be done")
        return
    _show_decisions(view.decisions)
    out.print("it is being done: semper guard status" if act else "nothing was done")


@app.command("install", epilog="Example: semper guard install --policy strict --at-boot")
def install(
    check: Annotated[
        bool, typer.Option("--check", help="Only say what is missing; build and load nothing.")
    ] = False,
    load: Annotated[
        bool, typer.Option("--load/--no-load", help="Load the module when it is built.")
    ] = True,
    policy: Annotated[
        ModulePolicy | None,
        typer.Option(help="What the module survives; see docs/design/guard.md. Default: strict."),
    ] = None,
    at_boot: Annotated[
        bool, typer.Option("--at-boot", help="Have the module loaded at each boot.")
    ] = False,
    dump_first: Annotated[
        bool,
        typer.Option(
            "--dump-first",
            help="With a crash kernel (kdump) loaded: its dump at once, and nothing is rescued.",
        ),
    ] = False,
    key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Sign the module with this private key.", exists=True),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The certificate that belongs to --key (DER).", exists=True
        ),
    ] = None,
    release: Annotated[
        str, typer.Option(help="For another kernel than the one that runs; with --no-load.")
    ] = "",
    headers: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where that kernel's headers are.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the module's source is.")
    ] = None,
    modules: Annotated[
        Path, typer.Option(metavar="DIR", help="Where modules are installed.")
    ] = Path("/lib/modules"),
    output: OutputOption = Output.TABLE,
) -> None:
    """Build the module for this kernel, sign it where asked, install it and load it.

    Everything that is missing is said at once, and nothing is done then. Under Secure Boot the
    kernel takes signed modules only: --key and --certificate. With DKMS see docs/design/guard.md
    instead.
    """
    import asyncio

    from sempervirt.guard import installation
    from sempervirt.guard.installation import Key

    require_here()
    if (key is None) != (certificate is None):
        raise InvalidRequest("a key and its certificate belong together", remedy="name both")
    if release and load:
        raise InvalidRequest("only the kernel that runs can load it", remedy="say --no-load")
    signing = Key(key, certificate) if key is not None and certificate is not None else None
    found = installation.look(
        release=release, headers=headers, source=source, key=signing, loads=load
    )
    view = _missing(found)
    if not check and not view.missing:
        view = asyncio.run(_install(found, modules, policy, at_boot=at_boot, dump_first=dump_first))
    if output is Output.JSON:
        print_json(view)
    elif not view.missing:
        what = "can be built" if check else f"is {'loaded' if view.loaded else 'installed'}"
        out.print(f"the module for {view.release} {what} {view.module}".rstrip(), soft_wrap=True)
        for path in view.written:
            out.print(f"written: {path}", soft_wrap=True)
        if not dump_first and installation.crash_kernel_loaded():
            out.print(
                "a crash kernel is loaded: the virtual machines leave first, then the panic and "
                "its dump follow; for the dump at once: --dump-first",
                soft_wrap=True,
            )
    if view.missing:
        if output is Output.TABLE:
            for what, remedy in zip(view.missing, view.remedies, strict=True):
                err.print(f"missing: {what}\n  {remedy}", highlight=False, soft_wrap=True)
        raise StateConflict(
            f"{len(view.missing)} things are missing for the module", remedy="see above"
        )


def _missing(found: Facts) -> InstalledView:
    from sempervirt.cli.installed import InstalledView
    from sempervirt.guard import installation

    lacking = installation.missing(found)
    return InstalledView(
        release=found.release,
        missing=[one.what for one in lacking],
        remedies=[one.remedy for one in lacking],
        module="",
        loaded=False,
        written=[],
    )


async def _install(
    found: Facts, modules: Path, policy: ModulePolicy | None, *, at_boot: bool, dump_first: bool
) -> InstalledView:
    import tempfile

    from sempervirt.cli.installed import InstalledView
    from sempervirt.guard import installation

    with tempfile.TemporaryDirectory(prefix="semper-guard-") as folder:
        with err.status(f"building the module for {found.release} …"):
            built = await installation.build(found, Path(folder))
        target = await installation.install(built, found.release, modules)
    written = installation.write_options(policy, at_boot=at_boot, dump_first=dump_first)
    if found.loads:
        await installation.load(policy, dump_first=dump_first)
    return InstalledView(
        release=found.release,
        missing=[],
        remedies=[],
        module=str(target),
        loaded=found.loads,
        written=[str(path) for path in written],
    )


def _module(view: GuardView) -> Text:
    if view.module:
        told = ", ".join(f"{name} {value}" for name, value in view.module_parameters.items())
        return Text(f"loaded: {told}" if told else "loaded", style="green")
    why = f"; {view.module_failure}" if view.module_failure else ""
    return Text(f"not loaded: a panic of this kernel is the end of its VMs{why}", style="yellow")


def _dump(view: GuardView) -> Text | None:
    """What becomes of a crash kernel's dump; nothing where none is loaded."""
    if not view.crash_kernel:
        return None
    if not view.module:
        return Text("is taken at once by the crash kernel, and no VM is rescued", style="yellow")
    if view.module_parameters.get("crash_kernel_first") == "Y":
        return Text("comes first (crash_kernel_first), and no VM is rescued", style="yellow")
    return Text("follows when the virtual machines are out", style="green")


def _shutdown(view: GuardView) -> Text:
    if view.shutdown_waits:
        return Text("waits until the virtual machines are out", style="bold red")
    limit_s = view.shutdown_limit_s
    if limit_s is None:
        return Text("is not held: logind does not answer", style="yellow")
    if limit_s < view.shutdown_hold_s:
        wanted = f"InhibitDelayMaxSec={view.shutdown_hold_s:g}"
        return Text(
            f"waits for {limit_s:g} s at most, because of logind; for more: {wanted} in "
            "/etc/systemd/logind.conf.d/sempervirt.conf",
            style="yellow",
        )
    return Text(f"waits for {view.shutdown_hold_s:g} s at most", style="green")


def _show_sources(sources: Sequence[SourceView]) -> None:
    table = listing("source", "is", "signs", "why")
    for one in sources:
        dropped = f" ({one.dropped} dropped)" if one.dropped else ""
        standing = Text(one.standing.value, style=_standings()[one.standing])
        table.add_row(one.name, standing, f"{one.seen}{dropped}", one.why)
    out.print(table)


def _show_rules(view: GuardView) -> None:
    from sempervirt.guard.presets import Meaning

    table = listing("sign", "means", "from", "loads the module", "seen")
    for rule in view.rules:
        often = ""
        if rule.at_least > 1:
            often = f"{rule.at_least} in {format_duration(rule.within_s)}"
        style = "bold" if rule.meaning in (Meaning.EVACUATE, Meaning.LET_DIE) else "dim"
        meaning = Text(rule.meaning.value, style=style)
        loads = "yes" if rule.load_module else ""
        table.add_row(rule.sign.value, meaning, often, loads, str(rule.seen or ""))
    out.print(table)


def _show_decisions(found: Sequence[DecisionView]) -> None:
    table = listing("time", "decided", "sign", "means", "evidence")
    for one in found:
        evidence = "; ".join(one.evidence)
        if one.repeated:
            evidence += f" (and {one.repeated} more like it)"
        if one.simulated:
            evidence += " (simulated)"
        sign = one.sign.value if one.sign else ""
        meaning = one.meaning.value if one.meaning else ""
        table.add_row(clock(one.time), one.action.value, sign, meaning, evidence)
    out.print(table)
