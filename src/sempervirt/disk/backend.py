"""How a backend process is started: the command is a strategy, so that tests can serve a
disk by another program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter

from sempervirt.core.queue_map import Engine, ThreadMap, format_map, parse_map
from sempervirt.host.programs import find_program

PROGRAM = "semper-blkd"
_ENGINE: TypeAdapter[Engine] = TypeAdapter(Engine)


@dataclass(frozen=True)
class DiskOptions:
    """What the owner of a disk chose for it; None leaves it to the program."""

    image: Path
    read_only: bool = False
    queues: int = 1
    engine: Engine = "auto"
    direct: bool = False
    block_size: int | None = None
    serial: str = ""
    poll_us: int | None = None


@dataclass(frozen=True)
class ImageTitle:
    """By what right a backend writes its image (docs/design/ownership.md): `holder` is the name
    of this host, `claim` the id of its claim, 32 hexadecimal digits.

    Without an epoch the claim is still to come, by the control command "claim": the process
    prepares and takes front ends, and takes the image only then.
    """

    epoch_file: Path
    holder: str
    epoch: int | None = None
    claim: str | None = None

    def argv(self) -> list[str]:
        """The options of semper-blkd. A process that awaits its claim belongs to a VM that comes
        from another host.
        """
        record = [f"--epoch-file={self.epoch_file}", f"--holder={self.holder}"]
        if self.epoch is None:
            return [*record, "--incoming", "--await-claim"]
        return [*record, f"--epoch={self.epoch}", f"--claim={self.claim}"]


@dataclass(frozen=True)
class Launch:
    """One process to start. `listen_fd` is the inherited listening socket, `thread_map` the
    thread of each queue, if it is not left to the program; `touched` a file in which it notes
    which blocks were used; `session` the socket at which spares learn what QEMU has said. Without a
    `title` it serves what nobody has claimed. `image_fd` is an inherited descriptor of the image,
    which the path may not lead to any more. `peers` is the file (`host.peers`) that says which
    processes it may serve; without one it serves whoever connects.
    """

    binary: str
    options: DiskOptions
    listen_fd: int
    control: Path
    wait_for_lock: bool
    thread_map: ThreadMap | None = None
    touched: Path | None = None
    session: Path | None = None
    title: ImageTitle | None = None
    image_fd: int | None = None
    peers: Path | None = None

    @property
    def image(self) -> str:
        """Where the process opens the image."""
        return (
            f"/proc/self/fd/{self.image_fd}"
            if self.image_fd is not None
            else str(self.options.image)
        )

    @property
    def inherited(self) -> tuple[int, ...]:
        """The descriptors that the process inherits."""
        return (self.listen_fd, *(() if self.image_fd is None else (self.image_fd,)))


class BackendCommand(Protocol):
    """A program that serves a disk over vhost-user."""

    @property
    def has_spare(self) -> bool:
        """Whether a second process can wait for the image's lock."""

    @property
    def has_control(self) -> bool:
        """Whether the program answers on a control socket."""

    @property
    def environment(self) -> Mapping[str, str]:
        """What is added to the environment of the process."""

    def binary(self) -> str:
        """The program; raises Unavailable when it is not installed."""

    def argv(self, launch: Launch) -> list[str]:
        """The command line for one process."""

    def read_argv(self, argv: Sequence[str]) -> Launch:
        """What a command line of `argv` says. Raises ValueError for another program's."""


@dataclass(frozen=True)
class Blkd:
    """semper-blkd. `extra` arguments, environment and `keeps_connection`, without which QEMU has to
    connect to each successor, are for tests.
    """

    path: Path | None = None
    extra: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    has_spare: bool = True
    has_control: bool = True
    keeps_connection: bool = True

    def binary(self) -> str:
        """`path`, or what is found first: $SEMPERVIRT_BLKD, beside the interpreter, on the PATH."""
        if self.path is not None:
            return str(self.path)
        return find_program(PROGRAM)

    def argv(self, launch: Launch) -> list[str]:
        """The command line, in the order of semper-blkd --help."""
        options = launch.options
        argv = [
            launch.binary,
            f"--fd={launch.listen_fd}",
            f"--blk-file={launch.image}",
            f"--num-queues={options.queues}",
            f"--control-socket={launch.control}",
            f"--engine={options.engine}",
        ]
        # All queues on one thread is what every release does by itself.
        if launch.thread_map is not None and any(launch.thread_map):
            argv.append(f"--thread-map={format_map(launch.thread_map)}")
        if launch.touched is not None:
            argv.append(f"--map-file={launch.touched}")
        # A read-only disk has no spare that could follow.
        if launch.session is not None and self.keeps_connection and not options.read_only:
            argv.append(f"--session-socket={launch.session}")
        if options.poll_us is not None:
            argv.append(f"--poll-us={options.poll_us}")
        if options.block_size is not None:
            argv.append(f"--block-size={options.block_size}")
        if options.serial:
            argv.append(f"--serial={options.serial}")
        if options.read_only:
            argv.append("--read-only")
        if options.direct:
            argv.append("--direct")
        # A read-only disk has no holder.
        if launch.title is not None and not options.read_only:
            argv += launch.title.argv()
        if launch.wait_for_lock and not options.read_only:
            argv.append("--spare")
        return [*argv, *self.extra]

    def read_argv(self, argv: Sequence[str]) -> Launch:
        """The inverse of `argv`, for a process that no record tells of."""
        options = dict(option.partition("=")[::2] for option in argv[1:] if option[:2] == "--")
        try:
            thread_map = options.get("--thread-map")
            touched = options.get("--map-file")
            return Launch(
                binary=argv[0],
                options=DiskOptions(
                    image=Path(options["--blk-file"]),
                    read_only="--read-only" in options,
                    queues=int(options["--num-queues"]),
                    engine=_ENGINE.validate_python(options["--engine"]),
                    direct="--direct" in options,
                    block_size=_number(options, "--block-size"),
                    serial=options.get("--serial", ""),
                    poll_us=_number(options, "--poll-us"),
                ),
                listen_fd=int(options["--fd"]),
                control=Path(options["--control-socket"]),
                wait_for_lock="--spare" in options,
                thread_map=parse_map(thread_map) if thread_map else None,
                touched=Path(touched) if touched else None,
                title=_title(options),
            )
        except (IndexError, KeyError) as error:
            raise ValueError(f"these are not the arguments of a backend: {error}") from error


def _number(options: Mapping[str, str], name: str) -> int | None:
    return int(options[name]) if name in options else None


def _title(options: Mapping[str, str]) -> ImageTitle | None:
    if "--epoch-file" not in options:
        return None
    record, holder = Path(options["--epoch-file"]), options["--holder"]
    return ImageTitle(record, holder, _number(options, "--epoch"), options.get("--claim"))
