"""A calibration: for each storage and each type of device, a race or a rule; then a preset.

with alone(state_dir):
    tuning = Tuning(await prepare(request))   # looks at everything, writes nothing
    report = await tuning.run(watch)          # measures; stores the presets of each storage
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from sempervirt.core.errors import StateConflict, Unavailable
from sempervirt.core.queue_map import DeviceType
from sempervirt.disk.presets import Preset, PresetStore
from sempervirt.disk.storage import StorageKey
from sempervirt.disk.tuning import driver, rules
from sempervirt.disk.tuning.preparation import DEVICES, Heat, Prepared, Site
from sempervirt.disk.tuning.report import (
    DeviceView,
    StorageView,
    TuneReport,
    candidate_views,
    load_figures,
)
from sempervirt.disk.tuning.scratch import Ground, block_device, scratch_image
from sempervirt.disk.tuning.served import Target


class Watch:
    """Is told how a calibration goes; does nothing by itself."""

    def writing(self, where: Path, done_bytes: int, total_bytes: int) -> None:
        """The scratch image grows."""

    def racing(
        self, device: DeviceType, storage: StorageKey, done: int, total: int, candidate: str
    ) -> None:
        """A candidate is measured; `done` of about `total` turns are over."""

    def finished(self, device: DeviceType, storage: StorageKey, preset: Preset) -> None:
        """A type of device has its preset."""


@contextlib.contextmanager
def alone(state_dir: Path) -> Iterator[None]:
    """One calibration at a time: two would measure each other. Raises StateConflict."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (state_dir / ".tune.lock").open("a")
    except OSError as error:
        raise Unavailable(
            f"cannot write to {state_dir}: {error.strerror}",
            remedy="choose another place by SEMPERVIRT_STATE_DIR",
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateConflict(
                "another semper disk tune is running, and the two would disturb each other",
                remedy="wait for it, or end it",
            ) from error
        yield


class Tuning:
    """A calibration that is ready to run."""

    def __init__(self, prepared: Prepared) -> None:
        self._request = prepared.request
        self._host = prepared.host
        self._queues = prepared.queues
        self._load_program = prepared.load_program
        self._sites = prepared.sites
        self._store = PresetStore(prepared.request.state_dir)

    async def run(self, watch: Watch) -> TuneReport:
        """Measures, and stores the presets of a storage as soon as that storage is measured.

        Raises Unavailable when a storage cannot be measured at all; what was stored before stays.
        """
        self._store.check()
        started = datetime.now(UTC).replace(microsecond=0)
        views, warnings = [], self._warnings_of_load()
        for site in self._sites:
            view = await self._storage(site, watch)
            views.append(view)
            warnings += self._store.put([device.preset for device in view.devices])
        return TuneReport(
            started=started,
            host=self._host,
            storages=tuple(views),
            stored=self._store.path,
            warnings=tuple(warnings),
        )

    def _warnings_of_load(self) -> list[str]:
        """Others that work on this machine are measured too."""
        load = os.getloadavg()[0]
        if load <= self._host.cpus / 2:
            return []
        warning = (
            f"the machine was busy (load average {load:.1f} on {self._host.cpus} processors) when "
            "this began: small differences are lost in the noise; tune again when it is quiet"
        )
        return [warning]

    async def _storage(self, site: Site, watch: Watch) -> StorageView:
        found: dict[DeviceType, DeviceView] = {}
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="semper-tune-")))
            if site.heats:
                ground = await stack.enter_async_context(self._ground(site, watch))
                for heat in site.heats:
                    found[heat.device] = await self._race(site, heat, ground, folder, watch)
                    if heat.device == "virtio-blk":
                        found[heat.device] = self._complete(site, found)
        self._add_rules(site, found)
        devices = [found[device] for device in DEVICES if device in self._request.devices]
        for device in devices:
            watch.finished(device.preset.device, site.storage, device.preset)
        return StorageView(
            storage=site.storage,
            where=site.where,
            read_only=site.block_device,
            devices=tuple(devices),
        )

    @asynccontextmanager
    async def _ground(self, site: Site, watch: Watch) -> AsyncIterator[Ground]:
        if site.block_device:
            with block_device(site.where) as ground:
                yield ground
            return
        total = self._request.size_bytes
        async with scratch_image(
            site.where, total, lambda done: watch.writing(site.where, done, total)
        ) as ground:
            yield ground

    async def _race(
        self, site: Site, heat: Heat, ground: Ground, folder: Path, watch: Watch
    ) -> DeviceView:
        race = driver.Race(
            candidates=heat.candidates,
            server=heat.server,
            target=Target(ground.path, site.storage, self._queues, read_only=site.block_device),
            ground=ground,
            loads=site.loads,
            load_program=self._load_program,
            load_threads=min(self._queues, self._host.cpus),
            bounds=self._request.bounds,
            budget_s=site.seconds(heat, self._request.seconds),
            folder=folder,
        )
        started = time.monotonic()
        outcome = await driver.run(
            race,
            lambda done, total, candidate: watch.racing(
                heat.device, site.storage, done, total, candidate
            ),
        )
        decision = outcome.decision
        preset = Preset(
            device=heat.device,
            storage=site.storage,
            engine=decision.winner.engine,
            queues_per_thread=decision.winner.queues_per_thread,
            poll_us=decision.winner.poll_us,
            source="measured",
            why=decision.why,
            figures=load_figures(outcome.measured[decision.winner]),
            measured_at=datetime.now(UTC).replace(microsecond=0),
            host=self._host,
        )
        return self._view(
            preset,
            loads=tuple(load.name for load in site.loads),
            holds_bounds=decision.holds,
            seconds=round(time.monotonic() - started, 1),
            candidates=candidate_views(outcome),
        )

    def _view(self, preset: Preset, **more: object) -> DeviceView:
        bounds = self._request.bounds
        return DeviceView.model_validate(
            {
                "preset": preset,
                "queues": self._queues,
                "latency_bound": bounds.latency,
                "throughput_bound": bounds.throughput,
                **more,
            }
        )

    def _complete(self, site: Site, found: dict[DeviceType, DeviceView]) -> DeviceView:
        """Adds to what was measured of QEMU's block layer what could not be."""
        view = found["virtio-blk"]
        spread, why = rules.queues_per_thread(
            self._measured(site, found), self._queues, self._host.cpus
        )
        preset = view.preset.model_copy(
            update={
                "queues_per_thread": spread,
                "source": "partly",
                "why": f"{view.preset.why}; {why}",
            }
        )
        return view.model_copy(update={"preset": preset})

    def _measured(self, site: Site, found: dict[DeviceType, DeviceView]) -> Preset | None:
        """The preset of semper-blkd on this storage: just measured, or stored and not stale."""
        if (view := found.get("vhost-user-blk")) is not None:
            return view.preset
        stored = self._store.find("vhost-user-blk", site.storage, self._host)
        return stored if isinstance(stored, Preset) else None

    def _add_rules(self, site: Site, found: dict[DeviceType, DeviceView]) -> None:
        now = datetime.now(UTC).replace(microsecond=0)
        if "virtio-blk" not in found:
            obstacle = site.obstacle or "not asked for"
            measured = self._measured(site, found)
            preset = rules.virtio_blk(
                site.storage, measured, self._queues, self._host, now, obstacle
            )
            found["virtio-blk"] = self._view(preset)
        found["virtio-scsi"] = self._view(rules.virtio_scsi(found["virtio-blk"].preset))
        found["virtio-net"] = self._view(rules.virtio_net(self._host, now))
