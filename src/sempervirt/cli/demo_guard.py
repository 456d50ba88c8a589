"""`semper demo guard`: a host's kernel dies, and the virtual machine on that host goes on
elsewhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import sempervirt
from sempervirt.cli.output import Output, OutputOption, progress_console
from sempervirt.core.errors import CommandFailed, NotFound, OutcomeUnknown, Unavailable

if TYPE_CHECKING:
    from sempervirt.demo.guard.trial import Heard, Outcome

# A checkout has the module's source, and the scripts that fetch kernels and build the module.
CHECKOUT = Path(sempervirt.__file__).resolve().parents[2]
SERIES = "6.1"
BOUND_S = 170.0
PREPARE_S = 600.0


def demo_guard(
    picture: Annotated[
        Path, typer.Option("--plot", help="Where the picture of the guest's heartbeat is written.")
    ] = Path("semper-demo-guard.png"),
    output: OutputOption = Output.TABLE,
) -> None:
    """Kill the kernel of a host, and show that the virtual machine on it skips nothing.

    The host is emulated: a stock Debian kernel with the module semper_guard, our agent, and QEMU
    with a guest that counts. Its kernel panics; the module puts that off; the agent moves the guest
    to this machine's agent; then the panic goes ahead. In a network namespace of its own, from a
    checkout.

    The exit status is 0 only if nothing was lost.
    """
    from sempervirt.demo.guard import plot

    console = progress_console(output)
    with console.status("fetching a kernel, building the module (the first time)"):
        tree, module = _prepared()
    with console.status("a host boots, its kernel is killed, its guest is moved …"):
        document = _run(tree, module)
    outcomes = [_outcome(one) for one in document["outcomes"]]
    wrong = [document["failure"]] if document["failure"] else []
    wrong += [one.wrong for one in outcomes if one.wrong] or (
        [] if outcomes else ["nothing was seen"]
    )
    drawn: str | None = str(picture)
    try:
        plot.draw(outcomes, picture)
    except (Unavailable, OSError) as error:
        drawn = None
        console.print(f"[yellow]{error}[/]")
    if output is Output.JSON:
        json.dump({"outcomes": document["outcomes"], "wrong": wrong, "plot": drawn}, sys.stdout)
        print()
    else:
        for one in outcomes:
            _show(console, one)
        console.print(f"picture: {drawn or 'none'}", highlight=False)
    for text in wrong:
        console.print(text, style="red", highlight=False, markup=False)
    if wrong:
        console.print("[red bold]Something was lost.[/]")
        raise typer.Exit(1)
    console.print("[green bold]Nothing was lost.[/]")


def _show(console: Console, outcome: Outcome) -> None:
    from sempervirt.demo.guard import plot

    for line in plot.line_of(outcome):
        console.print(line, highlight=False, markup=False)
    console.print(f"\nthe module said: {outcome.event}", highlight=False, markup=False)
    if not outcome.wrong:
        first, last = outcome.here.counts[0], outcome.there.counts[-1]
        console.print(
            f"from the panic to the guest on host b: {outcome.event_to_running_s:.2f} s, of which "
            f"the guest stood still for {outcome.gap_s:.2f} s\n"
            f"counted {first.number} to {last.number} without a gap, of one boot "
            f"({first.nonce:08X}); then the panic went ahead on host a",
            highlight=False,
        )


def _prepared() -> tuple[Path, Path]:
    """The kernel's tree, and the module for it. Raises NotFound, CommandFailed."""
    script = CHECKOUT / "scripts/kernel-module"
    if not script.exists():
        raise NotFound("this needs a checkout of sempervirt", remedy="see README.md")
    tree = CHECKOUT / ".cache/guard" / SERIES
    if not (tree / "release").exists():
        _script([str(CHECKOUT / "scripts/guard-kernels")])
    built = CHECKOUT / ".cache/guard/modules" / f"semper_guard-{SERIES}"
    _script([str(script), "--build", str(tree / "build"), "--output", str(built)])
    return tree, built / "semper_guard.ko"


def _script(command: list[str]) -> None:
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=CHECKOUT, timeout=PREPARE_S
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()[-10:]
        raise CommandFailed(
            " ".join(command),
            done.returncode,
            lines,
            remedy="see what it says by hand; what it needs: make setup, and apt-get for kernels",
        )


def _run(tree: Path, module: Path) -> dict[str, Any]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="semper-demo-guard-") as logs:
        command = [
            sys.executable, "-m", "sempervirt.demo.guard.run", "--tree", str(tree),
            "--module", str(module), "--disk", str(CHECKOUT / ".cache/guard/host.raw"),
            "--etcd", str(CHECKOUT / ".cache/etcd/etcd"), "--let-go", "--keep", logs,
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=BOUND_S
            )
        except subprocess.TimeoutExpired as error:
            raise OutcomeUnknown(f"not over within {BOUND_S:g} s") from error
        try:
            document = json.loads(done.stdout)
        except ValueError as error:
            lines = done.stderr.splitlines()[-10:]
            raise CommandFailed(" ".join(command), done.returncode, lines) from error
    assert isinstance(document, dict)
    return document


def _outcome(said: dict[str, Any]) -> Outcome:
    from sempervirt.demo.guard.trial import Outcome

    return Outcome(**{**said, "here": _heard(said["here"]), "there": _heard(said["there"])})


def _heard(said: dict[str, Any]) -> Heard:
    from sempervirt.demo.guard.counter import Count
    from sempervirt.demo.guard.trial import Heard

    return Heard(tuple(said["times"]), tuple(Count(**count) for count in said["counts"]))
