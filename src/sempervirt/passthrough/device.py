"""One passed-through device of a VM, and the mediator that serves it.

    start ──► waits for QEMU ──► serves ──► QEMU has ended: the mediator ends by itself
                                  ▲  │
            its spare serves, and │  ├──► the mediator dies, and its spare goes on in its place
            has a new spare ──────┴──┤
                                     └──► it dies without a spare: the device is gone, as QEMU
                                          connects once; the guest goes on without it

A spare takes over by itself, on the connections of the one that died; what is left to do here is to
see that there is a spare, and to kill a mediator that hangs (`watching`). There is nothing on
record: mediators are found by their arguments, and tell the rest themselves.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from sempervirt.core.errors import OutcomeUnknown, SempervirtError, Unavailable
from sempervirt.host import background, process
from sempervirt.host.lending import group_of
from sempervirt.host.process import Exit, Process
from sempervirt.host.procfs import arguments_of
from sempervirt.host.refusals import describe_end, refusal
from sempervirt.host.sockets import discard, listen_unix
from sempervirt.host.thread_states import threads_of
from sempervirt.passthrough import watching
from sempervirt.passthrough.answers import MediatorState, MediatorStatus, SpareState
from sempervirt.passthrough.client import MediatorClient
from sempervirt.passthrough.mediator import DeviceSetup, PciOptions, spare_argv
from sempervirt.passthrough.pci import open_device
from sempervirt.passthrough.watching import Verdict

log = logging.getLogger(__name__)

START_DEADLINE_S = 30.0
START_POLL_S = 0.02
# A mediator whose QEMU has gone ends what is under way, and then itself.
END_GRACE_S = 5.0
# Between two questions: when all is well, and while there is no spare that is ready.
STEADY_S, SOON_S, SOON_MAX_S = 2.0, 0.02, 1.0
# A mediator answers at once, whatever its requests wait for.
SILENCE_S = 2.0
# From a spare that has failed, or a mediator that died before it was of use, to the next spare:
# first, and at most.
AGAIN_S, AGAIN_MAX_S = 0.5, 60.0


def _handles(setup: DeviceSetup) -> AbstractContextManager[Sequence[int]]:
    """What a mediator is handed of a PCI device. Raises as `open_device`."""
    options = setup.options
    return open_device(options.pci) if isinstance(options, PciOptions) else nullcontext(())


class Device:
    """Made by `start` or `adopt`; ends with `stop`, or stays behind with `detach`."""

    def __init__(self, setup: DeviceSetup) -> None:
        self.setup = setup
        self.why_ended = ""
        self.takeovers = 0
        self.status: MediatorStatus | None = None
        self._process: Process | None = None
        self._spare: Process | None = None
        self._stopping = False
        self._woken = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        self._spare_after = 0.0
        self._again_s = AGAIN_S

    @classmethod
    async def start(cls, setup: DeviceSetup) -> Device:
        """Starts the mediator and returns when it answers.

        Raises ImageLocked, InvalidRequest or Unavailable as the mediator gives its reason, and as
        `open_device` for a PCI device; nothing is left running then.
        """
        files = setup.files
        files.check()
        device = cls(setup)
        discard(files.control)
        group = group_of(files.directory)
        with (
            listen_unix(files.socket, group) as listener,
            listen_unix(files.shim, group) as shim,
            _handles(setup) as handles,
        ):
            argv = setup.argv(listener.fileno(), shim.fileno(), handles)
            inherited = (listener.fileno(), shim.fileno(), *handles)
            device._process = process.spawn(
                argv, log=files.log, on_exit=device._ended, pass_fds=inherited
            )
        try:
            await device._wait_up()
        except BaseException:
            await device.stop()
            raise
        device._begin_watch()
        return device

    @classmethod
    async def adopt(cls, setup: DeviceSetup) -> Device:
        """Takes over the mediator that an earlier agent started. One that is gone is told by
        `why_ended`.
        """
        device = cls(setup)
        found = await asyncio.to_thread(setup.files.find_processes)
        adopted = [one for it in found if (one := process.adopt(it, device._ended)) is not None]
        if adopted:
            device._process, device._spare = adopted[0], next(iter(adopted[1:]), None)
            device._begin_watch()
        else:
            device.why_ended = "its mediator was gone when the agent here began"
        log.info("adopt device=%s pid=%s spare=%s", setup.name, device.pid, device.spare_pid)
        return device

    @property
    def name(self) -> str:
        """VM/DEVICE."""
        return self.setup.name

    @property
    def short_name(self) -> str:
        """The name within the VM."""
        return self.setup.short_name

    @property
    def pid(self) -> int | None:
        """The mediator's process id, while it lives."""
        alive = self._process is not None and self._process.exit is None
        return self._process.pid if alive and self._process else None

    @property
    def spare_pid(self) -> int | None:
        """The process id of its spare, while that lives."""
        alive = self._spare is not None and self._spare.exit is None
        return self._spare.pid if alive and self._spare else None

    @property
    def failing(self) -> str:
        """What is wrong with the data of the device, "" while nothing is."""
        if self.status is None or not self.status.flush_failed or self._stopping:
            return ""
        return (
            f"device {self.name}: a flush of its image has failed, and every further one fails; "
            "check the storage, stop the VM, and check its file systems"
        )

    @property
    def ailment(self) -> str:
        """What is wrong with the device, "" while nothing is."""
        if not self.why_ended or self._stopping:
            return ""
        return f"device {self.name} is gone: {self.why_ended}"

    @property
    def client(self) -> MediatorClient:
        """What can be asked of the mediator. Raises Unavailable when the mediator has ended."""
        if self.pid is None:
            raise Unavailable(
                f"device {self.name} is gone: {self.why_ended or 'its mediator has ended'}",
                remedy="stop the VM and run it again: QEMU connects to a mediator only once",
            )
        return MediatorClient(self.setup.files.control, self.pid)

    async def stop(self) -> None:
        """Has the mediator end, whose QEMU has ended. Raises OutcomeUnknown when it does not."""
        self._stopping = True
        self._end_watch()
        # First, for it would go on in the place of the other.
        if self._spare is not None:
            await self._spare.end(END_GRACE_S)
        if self._process is not None and await self._process.end(END_GRACE_S) is None:
            raise OutcomeUnknown(
                f"device {self.name}: the mediator (pid {self._process.pid}) does not end",
                remedy=f"its image may be written still; look at /proc/{self._process.pid}/stack",
            )
        files = self.setup.files
        for path in (files.socket, files.shim, files.control, files.session, *files.waiting):
            discard(path)

    def detach(self) -> None:
        """Leaves the mediator running, for another agent to adopt."""
        self._end_watch()
        for one in (self._process, self._spare):
            if one is not None:
                one.forget()

    def _begin_watch(self) -> None:
        if self._watch is None:
            work = self._keep_served()
            self._watch = background.start(work, f"device {self.name}")

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()

    async def _keep_served(self) -> None:
        """Until no mediator is left."""
        silent_s, pause_s = 0.0, SOON_S
        while self.pid is not None:
            try:
                async with asyncio.timeout(pause_s):
                    await self._woken.wait()
                pause_s = SOON_S
            except TimeoutError:
                pause_s = min(pause_s * 1.5, SOON_MAX_S)
            self._woken.clear()
            begun = time.monotonic()
            try:
                self.status = await self.client.status(SILENCE_S)
            except SempervirtError:
                passed_s = time.monotonic() - begun + pause_s
                silent_s += min(passed_s, watching.INTERVAL_S)
                await self._judge(silent_s)
                continue
            silent_s = 0.0
            if self._needs_spare(self.status):
                self._start_spare()
            elif self.status.spare in (SpareState.READY, SpareState.OFF):
                pause_s = STEADY_S
                if self._was_useful(self.status.pid):
                    self._again_s = AGAIN_S

    def _needs_spare(self, status: MediatorStatus) -> bool:
        """A device on its way here has none: its move is given up when its mediator dies."""
        works = status.state in (MediatorState.RUNNING, MediatorState.CAPTURED)
        due = time.monotonic() >= self._spare_after
        return works and status.spare is SpareState.ALONE and self.spare_pid is None and due

    def _start_spare(self) -> None:
        pid = self.pid
        if pid is None or self._stopping:
            return
        try:
            argv = spare_argv(arguments_of(pid))
            if argv is None:
                return
            self._spare = process.spawn(argv, log=self.setup.files.log, on_exit=self._ended)
        except SempervirtError as error:
            log.warning("device name=%s has no spare: %s", self.name, error.message)
            self._delay_spare()
        else:
            log.info("device name=%s spare=%s", self.name, self._spare.pid)

    def _was_useful(self, pid: int) -> bool:
        """Whether that mediator has answered a request of the guest, as far as was seen."""
        status = self.status
        return status is not None and status.pid == pid and status.counters.requests_done > 0

    def _delay_spare(self) -> None:
        self._spare_after = time.monotonic() + self._again_s
        self._again_s = min(self._again_s * 2, AGAIN_MAX_S)

    async def _judge(self, silent_s: float) -> None:
        served, spare = self._process, self.spare_pid
        if served is None or served.exit is not None or self._stopping:
            return
        threads = await asyncio.to_thread(threads_of, served.pid)
        verdict = watching.judge(silent_s, threads)
        if verdict is Verdict.WORKS:
            return
        seen = "; ".join(str(thread) for thread in threads[:3])
        log.error(
            "device name=%s its mediator does not answer silent_s=%.1f %s spare=%s threads=%s",
            self.name,
            silent_s,
            verdict.value,
            spare,
            seen,
        )
        if verdict is Verdict.HANGS and spare is not None:
            served.send_signal(signal.SIGKILL)

    async def _wait_up(self) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        watched = self._process
        assert watched is not None
        while True:
            if watched.exit is not None:
                raise refusal(
                    f"device {self.name}", "the mediator", watched.exit, self._last_words()
                )
            try:
                await self.client.status()
            except SempervirtError:
                if time.monotonic() > deadline:
                    raise
            else:
                return
            await asyncio.sleep(START_POLL_S)

    def _ended(self, end: Exit) -> None:
        """One of the two processes has ended."""
        why = describe_end(end, self._last_words())
        level = logging.INFO if self._stopping or end.code == 0 else logging.ERROR
        if self._spare is not None and self._spare.exit is not None:
            self._spare = None
            log.log(level, "device name=%s its spare has ended: %s", self.name, why)
            self._delay_spare()
        if self._process is None or self._process.exit is None or self.why_ended:
            return
        if self._spare is not None and not self._stopping and end.code != 0:
            if not self._was_useful(self._process.pid):
                # Perhaps whatever it died of waits for the next one as well.
                self._delay_spare()
            self._process, self._spare = self._spare, None
            self.takeovers += 1
            log.error(
                "device name=%s its mediator has ended: %s; its spare goes on", self.name, why
            )
            self._woken.set()
            return
        self.why_ended = why
        log.log(level, "device name=%s its mediator has ended: %s", self.name, why)

    def _last_words(self) -> str:
        said = process.said(self.setup.files.log)
        return next((line for line in reversed(said) if line.strip()), "")
