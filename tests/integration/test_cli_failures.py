"""Every command of `semper`, with every way in which it can fail without a guest.

Each failure says what is wrong and what to do, as a line for people and as JSON for programs, with
an exit code of its own and no traceback; and it leaves nothing: at the end of each walk the files
are what they were, and the right command works.

Who adds a command adds a line to `RIGHT`; the walk goes over what `semper` has, not over that.
"""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest

from sempervirt.core.errors import KINDS
from tests.integration.semper_tries import Said, Tries, tries
from tests.unit.test_manual import ALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
Semperd = Callable[[], AbstractAsyncContextManager["subprocess.Popen[bytes]"]]
MIB = 1 << 20
JSON = ("--output", "json")
USAGE, NO_AGENT, CONFLICT, NOT_FOUND, REFUSED = 2, 6, 5, 4, 9
ERRORS = {kind.exit_code for kind in KINDS}
NOBODY = 65534
WITHOUT_PROGRAMS = {"PATH": "/nowhere"}


class Asks(Enum):
    """Whom a command needs."""

    AGENT = auto()
    STORE = auto()
    NOBODY = auto()


@dataclass(frozen=True)
class Right:
    """A command line that is right, after `semper`. `unknown`: it names what an agent without a VM
    does not have. `here`: another host cannot be asked for it.
    """

    words: str
    asks: Asks = Asks.AGENT
    unknown: bool = False
    here: bool = False


def _vm(words: str, *, here: bool = False) -> Right:
    return Right(words, unknown=True, here=here)


def _store(words: str) -> Right:
    return Right(words, Asks.STORE, here=True)


def _alone(words: str, *, here: bool = True) -> Right:
    return Right(words, Asks.NOBODY, here=here)


RIGHT: dict[str, Right] = {
    "semper version": _alone("version", here=False),
    "semper events": Right("events"),
    "semper vm run": Right("vm run web.toml --detach", here=True),
    "semper vm list": Right("vm list"),
    "semper vm show": _vm("vm show web"),
    "semper vm start": _vm("vm start web"),
    "semper vm stop": _vm("vm stop web"),
    "semper vm kill": _vm("vm kill web"),
    "semper vm pause": _vm("vm pause web"),
    "semper vm resume": _vm("vm resume web"),
    "semper vm restart-qemu": _vm("vm restart-qemu web"),
    "semper vm save": _vm("vm save web web.saved"),
    "semper vm restore": Right("vm restore web.saved"),
    "semper vm clone": Right("vm clone web.saved web2"),
    "semper vm forget": _vm("vm forget web"),
    "semper vm remove": _vm("vm remove web"),
    "semper vm migrate": _vm("vm migrate web --to b"),
    "semper vm place": Right("vm place web"),
    "semper vm resolve": Right("vm resolve web --owner b --evidence seen"),
    "semper vm console": _vm("vm console web", here=True),
    "semper vm logs": _vm("vm logs web"),
    "semper disk list": Right("disk list"),
    "semper disk show": _vm("disk show web/root"),
    "semper disk threads": _vm("disk threads web/root --map 0"),
    "semper disk map": _vm("disk map web/root"),
    "semper disk snapshot": _vm("disk snapshot web"),
    "semper disk snapshots": _vm("disk snapshots web/root"),
    "semper disk merge": _vm("disk merge web/root"),
    "semper disk export": _vm("disk export web/root 1 --to copy.raw"),
    "semper disk unpin": _vm("disk unpin web/root 1 --reader bonn"),
    "semper disk upgrade": _vm("disk upgrade web/root"),
    "semper disk resize": _vm("disk resize web/root 64G"),
    "semper disk rescue": _vm("disk rescue web/root --to copy.raw"),
    "semper disk guard": Right("disk guard web.raw --name x/vda"),
    "semper disk unguard": _vm("disk unguard web/vda"),
    "semper disk tune": _alone("disk tune . --dry-run"),
    "semper passthrough list": Right("passthrough list"),
    "semper passthrough show": _vm("passthrough show web/nvme"),
    "semper standby enable": _vm("standby enable web"),
    "semper standby list": Right("standby list"),
    "semper standby show": _vm("standby show web"),
    "semper standby lost": _vm("standby lost web"),
    "semper standby failover": _vm("standby failover web"),
    "semper standby switchover": _vm("standby switchover web"),
    "semper standby cancel": _vm("standby cancel web"),
    "semper standby test": _vm("standby test web"),
    "semper standby disable": _vm("standby disable web"),
    "semper libvirt xml": _vm("libvirt xml web"),
    "semper libvirt check": Right("libvirt check web --file web.xml --user root", here=True),
    "semper libvirt adopt": Right("libvirt adopt web --user root", Asks.NOBODY, here=True),
    "semper host show": _alone("host show", here=False),
    "semper host metrics": Right("host metrics"),
    "semper host audit": _alone("host audit"),
    "semper host init": _alone("host init a --listen 127.0.0.1:7443"),
    "semper host add": _store("host add b"),
    "semper host join": _alone("host join b.token --listen 127.0.0.1:7443"),
    "semper host leave": _store("host leave"),
    "semper host renew": _store("host renew b.token"),
    "semper host list": _store("host list"),
    "semper host level": _store("host level"),
    "semper host evacuate": Right("host evacuate --dry-run"),
    "semper host return": Right("host return"),
    "semper host down": Right("host down --dry-run", here=True),
    "semper host revoke": _store("host revoke b"),
    "semper cluster capacity": Right("cluster capacity"),
    "semper operator add": _store("operator add alice --role viewer --to alice.pem"),
    "semper operator list": _store("operator list"),
    "semper operator revoke": _store("operator revoke alice"),
    "semper guard status": Right("guard status"),
    "semper guard events": Right("guard events"),
    "semper guard simulate": Right("guard simulate module.panic"),
    "semper guard install": _alone("guard install --check"),
    "semper demo": _alone("demo --kills 1"),
    "semper demo guard": _alone("demo guard"),
    "semper demo passthrough": _alone("demo passthrough"),
    "semper demo standby": _alone("demo standby"),
}
# Whatever else their words may be wrong in, beside what every parameter can be.
WRONG: tuple[tuple[str, int], ...] = (
    ("vm run none.toml", USAGE),
    ("vm run .", USAGE),
    ("vm run web.raw", USAGE),
    ("vm run unknown.toml", USAGE),
    ("vm migrate web", USAGE),
    ("vm restore web.saved --image root", USAGE),
    ("vm restore web.saved --tap tap0", USAGE),
    ("vm clone web.saved web2 --tap =x", USAGE),
    ("disk threads web/root --map 0,x", USAGE),
    ("disk threads web/root --map 0 --show", USAGE),
    ("disk threads web", USAGE),
    ("disk map web/root --export .", USAGE),
    ("disk merge web/root --rate fast", USAGE),
    ("disk upgrade", USAGE),
    ("disk upgrade web/root --all", USAGE),
    ("disk resize web/root large", USAGE),
    ("disk guard web.raw --name x/vda --mode 9", USAGE),
    ("disk guard web.raw --name x/vda --mode 7777", USAGE),
    ("disk guard web.raw --name x", USAGE),
    ("disk tune none --dry-run", USAGE),
    ("disk tune . --dry-run --size large", USAGE),
    ("disk tune . --dry-run --size 1", USAGE),
    ("disk tune --dry-run", USAGE),
    ("standby enable web --every soon", USAGE),
    ("standby enable web --test-every soon", USAGE),
    ("libvirt check web --file none.xml", USAGE),
    ("libvirt adopt ../web", USAGE),
    ("libvirt adopt web --undo", NOT_FOUND),
    ("libvirt adopt web", NO_AGENT),
    ("libvirt check web --file .", USAGE),
    ("libvirt check web --file web.raw", USAGE),
    ("host init a --listen nonsense", USAGE),
    ("host init a --listen 127.0.0.1:99999", USAGE),
    ("host init a/b --listen 127.0.0.1:7443", USAGE),
    ("host init a --listen 127.0.0.1:7443 --store 127.0.0.1:2379", USAGE),
    ("host init a --listen 127.0.0.1:7443 --etcd-files none", USAGE),
    ("host join none.token --listen 127.0.0.1:7443", USAGE),
    ("host join web.toml --listen 127.0.0.1:7443", USAGE),
    ("host join web.raw --listen 127.0.0.1:7443", USAGE),
    ("host renew none.token", USAGE),
    ("host renew web.toml", USAGE),
    ("host evacuate --deadline soon", USAGE),
    ("host down --deadline soon", USAGE),
    ("host down --grace soon", USAGE),
    ("guard simulate module.panik", USAGE),
    ("guard install --check --key web.toml", USAGE),
    ("guard install --check --release 6.1", USAGE),
    ("demo --image web.toml", CONFLICT),
)


@pytest.fixture
def folder(place: Path) -> Path:
    """What the command lines above name."""
    (place / "web.toml").write_text(
        'name = "web"\nmemory = "64M"\n[[disks]]\nname = "root"\nimage = "none.raw"\n'
    )
    (place / "unknown.toml").write_text('name = "web"\nmemroy = "64M"\n')
    (place / "web.xml").write_text("<domain><name>web</name></domain>")
    (place / "web.raw").write_bytes(b"\xff\xfe" * 2048)
    (place / "b.token").write_text("no token\n")
    return place


@pytest.fixture
def semper(folder: Path) -> Iterator[Tries]:
    with tries(folder) as found:
        yield found


def problem(said: Said, words: tuple[str, ...], code: int | None = None) -> str:
    """What is wrong with how a failure was told; "" when nothing is."""
    wrong = [
        f"exit code {said.code}" * (said.code not in ERRORS or code not in (None, said.code)),
        "a traceback" * ("Traceback" in said.err + said.out),
        untold(said) if "json" in words else unsaid(said),
    ]
    found = ", ".join(one for one in wrong if one)
    return f"semper {' '.join(words)}: {found}: {said}" if found else ""


def unsaid(said: Said) -> str:
    """What a line for people lacks."""
    first, _, rest = said.err.partition("semper: error: ")[2].partition("\n")
    return "" if first and rest.strip() else "no error with a remedy"


def untold(said: Said) -> str:
    """What the document for programs lacks."""
    try:
        error = said.error
    except (ValueError, KeyError, TypeError):
        return "not one document"
    if said.out and '"hint":' not in said.out:  # what semper libvirt check has found
        return "a result"
    return "no remedy" * (not (error["message"] and error["remedy"]))


def tree(top: Path) -> dict[str, str]:
    """Every file below, with what is in it."""
    files = [one for one in top.rglob("*") if one.is_file() and not one.is_symlink()]
    return {str(one): hashlib.sha256(one.read_bytes()).hexdigest() for one in files}


def _takes_json(command: str) -> bool:
    return any("--output" in one.opts for one in ALL[command].params)


def line(command: str, words: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a command line, for JSON where there can be any."""
    own = len(command.split()) - 1
    return (*words[:own], *JSON, *words[own:]) if _takes_json(command) else words


def command_of(words: str) -> str:
    """The command that a line begins with."""
    found = [one for one in RIGHT if f"semper {words} ".startswith(f"{one} ")]
    return max(found, key=len)


def test_the_walk_goes_over_every_command() -> None:
    assert set(RIGHT) == set(ALL)
    for words, right in RIGHT.items():
        assert command_of(right.words) == words


def _kinds(annotation: object) -> set[object]:
    """The types of one word that a parameter takes."""
    if get_origin(annotation) in (Union, UnionType, list):
        return {kind for part in get_args(annotation) for kind in _kinds(part)}
    return {annotation}


def _has_value(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "option" and not parameter.is_flag)


def wrong_values(parameter: Any) -> Iterator[tuple[str, ...]]:
    """Words that an option cannot take, whatever the command is."""
    if not _has_value(parameter):
        return
    name = parameter.opts[0]
    descriptor = getattr(parameter, "type_descriptor", None)
    for kind in _kinds(descriptor.annotation) if descriptor else ():
        if kind in (int, float) or (isinstance(kind, type) and issubclass(kind, Enum)):
            yield name, "nonsense"
        if kind in (int, float) and parameter.min is not None:
            yield name, str(parameter.min - 1)


def ways_with_words() -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Every command line that is wrong in itself, with its exit code."""
    for command, right in RIGHT.items():
        words, own = tuple(right.words.split()), tuple(command.split()[1:])
        yield command, (*words, "--no-such-option"), USAGE
        if not any(one.nargs == -1 for one in ALL[command].params) and command != "semper demo":
            yield command, (*words, "one", "too-many"), USAGE
        if any(one.required for one in ALL[command].params):
            yield command, own, USAGE
        if takes := [one.opts[0] for one in ALL[command].params if _has_value(one)]:
            yield command, (*words, takes[-1]), USAGE  # nothing follows
        for parameter in ALL[command].params:
            for wrong in wrong_values(parameter):
                yield command, (*words, *wrong), USAGE
    for words_, code in WRONG:
        yield command_of(words_), tuple(words_.split()), code


def require_sound(problems: list[str]) -> None:
    """Fails with every problem that was found."""
    wrong = [one for one in problems if one]
    assert not wrong, "\n".join(wrong)


def test_words_that_are_wrong(semper: Tries) -> None:
    """Of every command, and every value of its options; without an agent and without QEMU."""
    before = tree(semper.place)
    problems = []
    for command, words, code in ways_with_words():
        asked = line(command, words)
        problems.append(problem(semper(*asked, variables=WITHOUT_PROGRAMS), asked, code))
    require_sound(problems)
    assert len(problems) > 300
    assert tree(semper.place) == before


def asking(*kinds: Asks) -> Iterator[tuple[str, ...]]:
    """The right words of all commands that need one of those."""
    for command, right in RIGHT.items():
        if right.asks in kinds:
            yield line(command, tuple(right.words.split()))


def test_without_an_agent_and_with_one_that_may_not_be_asked(semper: Tries) -> None:
    asked = [*asking(Asks.AGENT)]
    problems = [problem(semper(*words), words, NO_AGENT) for words in asked]
    run = semper.place / "run"
    run.mkdir(mode=0o711)
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(run / "agent.sock"))
        agent.listen()
        (run / "agent.sock").chmod(0)
        problems += [problem(semper(*words, powerless=True), words, REFUSED) for words in asked]
    (run / "agent.sock").unlink()
    require_sound(problems)
    assert not (semper.place / "state").exists()


@pytest.mark.parametrize("words", ["host show", "demo", "demo guard", "demo standby"])
def test_a_machine_without_programs(semper: Tries, words: str) -> None:
    """QEMU, and whatever else is called."""
    asked = line(command_of(words), tuple(words.split()))
    said = semper(*asked, variables=WITHOUT_PROGRAMS)
    require_sound([problem(said, asked)])


def test_another_host_that_cannot_be_asked(semper: Tries) -> None:
    """By a wrong address, without a key, with none that is there, with one that is none; and what
    is done on the host itself, which would otherwise be done on this one.
    """
    dead, key, asked = ("--host", "a@127.0.0.1:9"), ("--key", "web.toml"), ("vm", "list", *JSON)
    (semper.place / "web.toml").chmod(0o600)
    problems = []
    for wrong, code in (
        (("--host", "nonsense"), USAGE),
        (("--host", "a@nowhere"), USAGE),
        (dead, USAGE),
        ((*dead, "--key", "none.pem"), NO_AGENT),
        ((*dead, "--key", "."), NO_AGENT),
    ):
        problems.append(problem(semper(*wrong, *asked), (*wrong, *asked), code))
    for command, right in RIGHT.items():
        if command != "semper version":
            words = (*dead, *key, *line(command, tuple(right.words.split())))
            problems.append(problem(semper(*words, variables=WITHOUT_PROGRAMS), words, USAGE))
    require_sound(problems)


@contextmanager
def no_room(directory: Path) -> Iterator[Path]:
    """A file system without a free block, and what takes the room."""
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M,mode=0700", "no", directory], check=True)
    filler = directory / "filler"
    try:
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(bytes(8 * MIB))
        yield filler
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def test_a_cluster_is_begun_after_each_way_in_which_that_fails(semper: Tries) -> None:
    """In one directory: nothing that a failure leaves stops the right command."""
    state = semper.place / "state"
    words = ("host", "init", "a", "--listen", "127.0.0.1:7443")
    problems = []
    for asked in asking(Asks.STORE):
        said = semper(*asked)
        problems.append(problem(said, asked, USAGE if "b.token" in asked else CONFLICT))
    wrong = (*words, "--store", "http://127.0.0.1:9")
    problems.append(problem(semper(*wrong), wrong, NO_AGENT))
    for name, command in (("init", words), ("leave", ("host", "leave"))):
        state.chmod(0o500)
        problems.append(problem(semper(*command, powerless=True), (*command, name)))
        state.chmod(0o700)
        os.chown(state, NOBODY, NOBODY)
        problems.append(problem(semper(*command), command, NO_AGENT))
        os.chown(state, 0, 0)
        file = f"{semper.place}/web.toml"
        said = semper(*command, variables={"SEMPERVIRT_STATE_DIR": file})
        problems.append(problem(said, command, NO_AGENT))
    require_sound(problems)
    assert semper(*words).code == 0
    assert semper("host", "list").code == 0


@pytest.mark.root
def test_a_full_file_system_stops_nothing_once_there_is_room(semper: Tries) -> None:
    """What has to be written is told as such, and is written when there is room."""
    words = ("host", "init", "a", "--listen", "127.0.0.1:7443")
    key = ("operator", "add", "alice", "--role", "viewer", "--to", "state/alice.pem")
    with no_room(semper.place / "state") as filler:
        problems = [problem(semper(*asked), asked) for asked in (words, words)]
        filler.write_bytes(b"")
        assert semper(*words).code == 0
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(bytes(8 * MIB))
        asked_ = (key, ("operator", "revoke", "bob"), ("host", "level", "--raise", *JSON))
        problems += [problem(semper(*asked), asked) for asked in (*asked_, ("host", "leave"))]
        filler.write_bytes(b"")
        assert not (semper.place / "state/alice.pem").exists()
        assert semper(*key).code == 0
        assert semper("host", "leave", "--force").code == 0
        assert semper(*words).code == 0
    require_sound(problems)


# What an agent refuses of a disk that it serves, each with the exit code; and what is right.
OF_A_DISK: tuple[tuple[str, int], ...] = (
    ("disk guard none.raw --name x/vda", USAGE),
    ("disk guard . --name x/vda", USAGE),
    ("disk guard web.raw --name x/vda --group nobody-has-it", USAGE),
    ("disk guard web.raw --name x/vda --owner nobody-is-it", USAGE),
    ("disk guard web.raw --name x/vda --socket web.toml", CONFLICT),
    ("disk guard web.raw --name x.y.z~/vda", USAGE),
    ("disk guard web.raw --name x/vda --queues 1", 0),
    ("disk guard web.raw --name x/vda", CONFLICT),
    ("disk guard web.raw --name x/vdb", CONFLICT),
    ("disk show x/vdc", NOT_FOUND),
    ("disk show x/vda", 0),
    ("disk threads x/vda --map 0,2", USAGE),
    ("disk threads x/vda --map 0,1", USAGE),
    ("disk threads x/vda --map 0", 0),
    ("disk upgrade x/vda --binary none", NO_AGENT),
    ("disk upgrade x/vda --binary web.toml", NO_AGENT),
    ("disk upgrade x/vda", 0),
    ("disk resize x/vda 1", USAGE),
    ("disk resize x/vda 1K", USAGE),
    ("disk resize x/vda 64M", 0),
    ("disk export x/vda 9 --to copy.raw", USAGE),
    ("disk export x/vda 9 --to none/copy.raw", USAGE),
    ("disk unpin x/vda 9 --reader bonn", NOT_FOUND),
    ("disk snapshot x --disk vdc", USAGE),
    ("disk snapshot x --freeze", CONFLICT),
    ("disk rescue x/vda --to copy.raw", USAGE),
    ("disk snapshots x/vda", 0),
    ("disk map x/vda --export none/x.map", USAGE),
    ("vm run web.toml --detach", USAGE),
    ("vm restore web.toml", USAGE),
    ("vm restore .", NO_AGENT),
    ("vm clone web.toml web2 --into none", USAGE),
    ("libvirt xml y", NOT_FOUND),
    ("libvirt xml x", 0),
    ("disk unguard x/vdc", NOT_FOUND),
    ("disk unguard x/vda", 0),
    ("disk unguard x/vda", NOT_FOUND),
    ("disk guard web.raw --name x/vda", 0),
    ("disk unguard x/vda", 0),
)


async def test_with_an_agent(semper: Tries, semperd: Semperd) -> None:
    """Who names what an agent does not have is told so; and a disk's whole life, with what can go
    wrong before each step of it.
    """
    state, run = semper.place / "s", semper.place / "r"
    own = {"SEMPERVIRT_STATE_DIR": str(state), "SEMPERVIRT_RUN_DIR": str(run)}
    problems = []
    async with semperd():
        for command, right in RIGHT.items():
            if right.asks is not Asks.AGENT or command == "semper disk guard":
                continue
            asked = line(command, tuple(right.words.split()))
            said = semper(*asked, variables=own)
            if right.unknown or said.code:
                problems.append(problem(said, asked, NOT_FOUND if right.unknown else None))
            elif said.out:
                problems.append(problem(semper(*asked, variables=own, full=True), asked, NO_AGENT))
        assert not list(state.glob("guarded/*"))
        for words, code in OF_A_DISK:
            command = command_of(words)
            asked = line(command, tuple(words.split()))
            said = semper(*asked, variables=own)
            found = problem(said, asked, code) if code else f"{asked}: {said}" * bool(said.code)
            problems.append(found)
        assert not list(state.glob("guarded/*/*"))
    assert not (semper.place / "copy.raw").exists()
    require_sound(problems)
