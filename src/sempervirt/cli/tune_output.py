"""How a calibration is shown: while it runs, as tables, and as a picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from sempervirt.cli.output import err, facts, listing, out
from sempervirt.core.durations import format_duration
from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.core.queue_map import DeviceType, counted
from sempervirt.core.sizes import format_size
from sempervirt.disk.presets import Preset
from sempervirt.disk.storage import StorageKey
from sempervirt.disk.tuning.report import (
    DeviceView,
    PresetList,
    StorageView,
    TunePlan,
    TuneReport,
)
from sempervirt.disk.tuning.tune import Watch

if TYPE_CHECKING:  # an extra that a host without people to look does not need
    from matplotlib.axes import Axes

__all__ = [
    "Bar",
    "TuneReport",
    "check_plot",
    "draw",
    "print_plan",
    "print_presets",
    "print_report",
]

_BAR_WIDTH = 24
_CHART_WIDTH = 130
_FILE_WIDTH = 160
_STYLES = {"winner": "bold green", "as good": "green", "lost": "", "early": "dim", "failed": "red"}
_COLOURS = {
    "sync": "#4c72b0",
    "nowait": "#55a868",
    "mmap": "#c44e52",
    "uring": "#8172b2",
    "threads": "#4c72b0",
    "native": "#55a868",
    "io_uring": "#8172b2",
}
_FORMATS = (".svg", ".png", ".pdf")


class Bar(Watch):
    """A progress bar on a terminal, a line for each step elsewhere; both on stderr."""

    def __init__(self, plan: TunePlan) -> None:
        self._plan = plan
        self._task: TaskID | None = None
        self._title = ""
        self._progress = Progress(
            BarColumn(bar_width=16),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )

    def __enter__(self) -> Self:
        err.print(f"about {format_duration(self._plan.seconds)}", highlight=False)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def writing(self, where: Path, done_bytes: int, total_bytes: int) -> None:
        self._show(f"writing a scratch image in {where}", done_bytes, total_bytes, "")

    def racing(
        self, device: DeviceType, storage: StorageKey, done: int, total: int, candidate: str
    ) -> None:
        self._show(f"{device} on {storage}", done, total, candidate)

    def finished(self, device: DeviceType, storage: StorageKey, preset: Preset) -> None:
        err.print(f"{device} on {storage}: {describe(preset)}", highlight=False, markup=False)

    def _show(self, title: str, done: int, total: int, detail: str) -> None:
        if title != self._title:
            self._title = title
            if not err.is_terminal:
                err.print(title, highlight=False, markup=False)
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(escape(title))
        assert self._task is not None
        text = escape(f"{title}: {detail}" if detail else title)
        self._progress.update(self._task, completed=done, total=total, description=text)


def describe(preset: Preset) -> str:
    """A preset in a few words."""
    polling = f"polling {preset.poll_us} µs" if preset.poll_us else "no polling"
    how = {"measured": "", "partly": " (partly by rule)", "rule": " (by rule)"}[preset.source]
    words = f"{preset.engine}, {counted(preset.queues_per_thread, 'queue')} a thread, {polling}"
    return words + how


def print_plan(plan: TunePlan) -> None:
    """What would be measured."""
    for site in plan.storages:
        what = "only reads are measured" if site.read_only else ""
        if site.scratch_bytes:
            what = f"a scratch image of {format_size(site.scratch_bytes)} would be written"
        out.print(f"[bold]{escape(str(site.storage))}[/] in {escape(str(site.where))}  {what}")
        for race in site.races:
            if not race.candidates:
                out.print(f"  {race.device}: {race.note}", highlight=False)
                continue
            out.print(
                f"  {race.device}: {len(race.candidates)} candidates, loads "
                f"{', '.join(race.loads)}, at most {format_duration(race.seconds)}",
                highlight=False,
            )
            for candidate in race.candidates:
                out.print(f"    {candidate}", highlight=False)
    out.print(f"at most {format_duration(plan.seconds)}; nothing was written", highlight=False)


def print_presets(presets: PresetList) -> None:
    """The stored presets, and which of them hold."""
    _widen()
    for warning in presets.warnings:
        err.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)
    if not presets.presets:
        out.print("no presets; make some: semper disk tune DIRECTORY", highlight=False)
        return
    table = listing("device", "storage", "engine", "queues/thread", "poll", "from", "when", "state")
    for view in presets.presets:
        preset = view.preset
        table.add_row(
            preset.device,
            escape(str(preset.storage)),
            preset.engine,
            str(preset.queues_per_thread),
            f"{preset.poll_us} µs" if preset.poll_us else "no",
            preset.source,
            f"{preset.measured_at.astimezone():%Y-%m-%d %H:%M}",
            f"[yellow]stale: {escape(view.stale)}[/]" if view.stale else "[green]in use[/]",
        )
    out.print(table)
    if any(view.stale for view in presets.presets):
        out.print("stale presets are not used; measure again: semper disk tune DIRECTORY")


def print_report(report: TuneReport, *, chart: bool) -> None:
    """A table of the candidates for each race, and what was made of it."""
    _widen()
    for site in report.storages:
        for device in site.devices:
            if device.candidates:
                _print_race(site, device, chart=chart)
        _print_rules(site.devices)


def _widen() -> None:
    """A file has no width, and a table cut to 80 columns says little."""
    if not out.is_terminal:
        out.width = max(out.width, _FILE_WIDTH)


def _print_race(site: StorageView, device: DeviceView, *, chart: bool) -> None:
    out.print()
    out.print(
        f"[bold]{device.preset.device}[/] on [bold]{escape(str(site.storage))}[/]: "
        f"{counted(device.queues, 'queue')}, {len(device.candidates)} candidates, "
        f"{format_duration(device.seconds)}",
        highlight=False,
    )
    out.print(_table(device, chart=chart and out.width >= _CHART_WIDTH))
    out.print(f"{describe(device.preset)}: {device.preset.why}", highlight=False, markup=False)


def _table(device: DeviceView, *, chart: bool) -> Table:
    p99s = [f"p99 {load}" for load in device.loads]
    table = listing(
        "engine", "q/thread", "poll", "req/cpu-s", *([""] if chart else []), *p99s, "iops", "why"
    )
    for column in table.columns[:-1]:
        column.no_wrap = True
    top = max((view.per_cpu_second or 0.0 for view in device.candidates), default=0.0)
    for view in device.candidates:
        efficiency = view.per_cpu_second or 0.0
        figures = {entry.load: entry for entry in view.figures}
        table.add_row(
            ("★ " if view.verdict == "winner" else "  ") + view.engine,
            str(view.queues_per_thread),
            str(view.poll_us),
            f"{efficiency / 1000:.0f}k" if efficiency else "-",
            *(["█" * round(efficiency / top * _BAR_WIDTH) if top else ""] if chart else []),
            *(_microseconds(figures[name].p99_us) if name in figures else "-"
              for name in device.loads),
            _thousands(max((f.iops for f in view.figures), default=0.0)),
            "" if view.verdict == "winner" else escape(view.reason),
            style=_STYLES[view.verdict],
        )  # fmt: skip
    return table


def _print_rules(devices: Iterable[DeviceView]) -> None:
    rows = [
        (device.preset.device, f"{describe(device.preset)}: {device.preset.why}")
        for device in devices
        if not device.candidates
    ]
    if rows:
        out.print()
        out.print(facts([(name, escape(text)) for name, text in rows]))


def _microseconds(value: float) -> str:
    return f"{value:.0f} µs" if value < 10_000 else f"{value / 1000:.0f} ms"


def _thousands(value: float) -> str:
    return f"{value / 1000:.0f}k" if value >= 10_000 else f"{value:.0f}"


def check_plot(path: Path) -> None:
    """Raises InvalidRequest or Unavailable when `draw` would fail: better now than at the end."""
    if path.suffix not in _FORMATS:
        raise InvalidRequest(
            f"no picture can be drawn as {path.name}",
            remedy=f"choose a name that ends with {', '.join(_FORMATS)}",
        )
    if not path.absolute().parent.is_dir():
        raise InvalidRequest(f"{path.parent} is not a directory", remedy="make it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise Unavailable(
            "no picture can be drawn: matplotlib is not installed",
            remedy='install it with: pip install "sempervirt[plot]"',
        ) from error


def draw(report: TuneReport, path: Path) -> None:
    """A panel for each race: requests per processor-second over p99, with the bound."""
    from matplotlib.figure import Figure

    races = [
        (site, device) for site in report.storages for device in site.devices if device.candidates
    ]
    columns = min(2, len(races)) or 1
    rows = -(-len(races) // columns) or 1
    figure = Figure(figsize=(7 * columns, 4.2 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[len(races) :]:
        panel.axis("off")
    for panel, (site, device) in zip(panels, races, strict=False):
        _draw_race(panel, site, device)
    figure.savefig(path, dpi=130)


def _draw_race(panel: Axes, site: StorageView, device: DeviceView) -> None:
    shown = [view for view in device.candidates if view.per_cpu_second and view.p99_ratio]
    for engine in dict.fromkeys(view.engine for view in shown):
        views = [view for view in shown if view.engine == engine]
        panel.scatter(
            [view.p99_ratio or 1.0 for view in views],
            [view.per_cpu_second or 0.0 for view in views],
            s=[25 + 2 * view.poll_us for view in views],
            color=[_COLOURS[engine] + ("4d" if v.verdict == "early" else "d9") for v in views],
            label=engine,
        )
    for view in shown[:1]:
        panel.annotate(
            f"★ {view.engine}, {view.queues_per_thread} q/thread, {view.poll_us} µs",
            (view.p99_ratio or 1.0, view.per_cpu_second or 0.0),
            textcoords="offset points",
            xytext=(-4, 8),
        )
    panel.axvline(device.latency_bound, color="grey", linestyle="--", linewidth=1)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
    top = max((view.per_cpu_second or 0.0 for view in shown), default=1.0)
    panel.set_ylim(0, top * 1.15)
    panel.set(
        title=f"{device.preset.device} on {site.storage}",
        xlabel="p99 × the best, at the weakest load (dashed: the bound)",
        ylabel="requests per processor-second",
    )
    panel.legend(title="larger: polls longer\npale: out early", fontsize=8, title_fontsize=8)
