"""Building, signing, installing and loading the module; what is missing for that, all at once.

Facts ──missing()──► nothing ──build──► sign ──► /lib/modules/RELEASE/updates ──► load
(read from the host)   │
                       └─ else: what is missing, each with its remedy; nothing is done
"""

from __future__ import annotations

import asyncio
import os
import platform
import re
import shutil
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import sempervirt
from sempervirt.core.errors import CommandFailed, InvalidRequest, StateConflict, Unavailable
from sempervirt.guard.presets import ModulePolicy
from sempervirt.guard.sources.kernel_log import said_by
from sempervirt.guard.sources.module import DEVICE, PARAMETERS, TRIED, unsupported
from sempervirt.host import process
from sempervirt.host.confinement import confinement_of

MODULE = "semper_guard"
BUILD_S = 600.0
STEP_S = 120.0
MODULES = Path("/lib/modules")
OPTIONS = Path("/etc/modprobe.d/semper-guard.conf")
AT_BOOT = Path("/etc/modules-load.d/semper-guard.conf")
LOCKDOWN = Path("/sys/kernel/security/lockdown")
ENFORCED = Path("/sys/module/module/parameters/sig_enforce")
CRASH_KERNEL = Path("/sys/kernel/kexec_crash_loaded")
_PLACES = "/usr/sbin:/sbin:/usr/bin:/bin"


@dataclass(frozen=True)
class Missing:
    """Something that the installation cannot do without, and how to get it, as an imperative."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Key:
    """What a module is signed with: the private key, and the certificate that the kernel trusts."""

    private: Path
    certificate: Path


@dataclass(frozen=True)
class Facts:
    """What a host has for building the module. `compiler` is the one that the kernel was built by,
    for instance "gcc-12"; `compiler_path` is where it is.
    """

    release: str
    headers: Path
    has_headers: bool
    preempt_rt: bool
    compiler: str
    compiler_path: str | None
    make_path: str | None
    source: Path | None
    signed_only: bool
    key: Key | None
    may_load: bool
    loads: bool
    """Whether the module is to be loaded, for which the kernel has to be the one that runs."""


def missing(facts: Facts) -> list[Missing]:
    """All that is missing; nothing: the module can be built, and loaded if it is to be. Pure."""
    if why := unsupported(facts.release):
        # All else would be got for nothing.
        remedy = (
            f"boot one of the series {' or '.join(TRIED)}; until then the agent still acts upon "
            "what it sees without the module, but a panic is the end: semper guard status"
        )
        return [Missing(why, remedy)]
    found = []
    if facts.preempt_rt:
        found.append(Missing("this kernel has PREEMPT_RT", "boot one without"))
    if facts.source is None:
        found.append(Missing("the module's source is not there", "name it: --source DIR"))
    if not facts.has_headers:
        found.append(
            Missing(
                f"there are no kernel headers in {facts.headers}",
                f"apt-get install linux-headers-{facts.release}",
            )
        )
    elif facts.compiler_path is None:
        found.append(
            Missing(
                f"the kernel was built by {facts.compiler}, which is not there",
                f"apt-get install {facts.compiler}",
            )
        )
    if facts.make_path is None:
        found.append(Missing("there is no make", "apt-get install make"))
    if facts.signed_only and facts.key is None and facts.loads:
        found.append(
            Missing(
                "this kernel takes signed modules only (Secure Boot, or module.sig_enforce)",
                "make a key, have the firmware enroll it (mokutil --import), and name it: "
                "--key FILE --certificate FILE",
            )
        )
    if facts.loads and not facts.may_load:
        found.append(Missing("loading a module needs CAP_SYS_MODULE", "run this as root"))
    return found


def look(
    *, release: str = "", headers: Path | None = None, source: Path | None = None,
    key: Key | None = None, loads: bool = True,
) -> Facts:  # fmt: skip
    """What this host has. Blocks. Raises OSError."""
    release = release or platform.release()
    headers = headers or MODULES / release / "build"
    config = _config(headers / ".config")
    compiler = _compiler(config)
    return Facts(
        release=release,
        headers=headers,
        has_headers=config is not None,
        preempt_rt="\nCONFIG_PREEMPT_RT=y\n" in (config or ""),
        compiler=compiler,
        compiler_path=shutil.which(compiler) if compiler else None,
        make_path=shutil.which("make"),
        source=source or find_source(),
        signed_only=_signed_only(),
        key=key,
        may_load=may_load(),
        loads=loads,
    )


def find_source() -> Path | None:
    """The module's source: in a checkout, as the wheel installs it, or where DKMS has it."""
    here = Path(sempervirt.__file__).resolve()
    for folder in (
        here.parents[2] / "kernel" / MODULE,
        Path(sys.prefix) / "share/sempervirt" / MODULE,
        Path("/usr/src") / f"{MODULE}-{sempervirt.__version__}",
    ):
        if (folder / "Kbuild").is_file():
            return folder
    return None


def may_load() -> bool:
    """Whether this process may load modules."""
    own = confinement_of(os.getpid())
    return own is not None and "sys_module" in own.capabilities


async def build(facts: Facts, folder: Path) -> Path:
    """Builds the module in a new folder below `folder`, signs it if there is a key, and gives its
    file. Raises StateConflict with all that is missing, CommandFailed, OSError.
    """
    require(facts)
    assert facts.source is not None
    place = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="guard-", dir=folder))
    for path in sorted(facts.source.iterdir()):
        if path.is_file() and (path.suffix in (".c", ".h", ".S") or path.name == "Kbuild"):
            await asyncio.to_thread(shutil.copy, path, place)
    # BTF needs pahole and the kernel's own image, and is for debuggers.
    arguments = [f"M={place}", f"CC={facts.compiler_path}", "CONFIG_DEBUG_INFO_BTF_MODULES="]
    jobs = f"-j{os.cpu_count() or 1}"
    await process.run(
        [facts.make_path or "make", jobs, "-C", str(facts.headers), *arguments, "modules"],
        timeout_s=BUILD_S,
    )
    built = place / f"{MODULE}.ko"
    if facts.key is not None:
        program = facts.headers / "scripts/sign-file"
        key = [str(facts.key.private), str(facts.key.certificate)]
        await process.run([str(program), "sha256", *key, str(built)], timeout_s=STEP_S)
    return built


def require(facts: Facts) -> None:
    """Raises StateConflict with all that is missing."""
    found = missing(facts)
    if found:
        raise StateConflict(
            "; ".join(one.what for one in found), remedy="; ".join(one.remedy for one in found)
        )


async def install(built: Path, release: str, modules: Path = MODULES) -> Path:
    """Puts a built module where modprobe finds it, below `modules`, which ends in lib/modules.

    Gives the file. Raises InvalidRequest, OSError, CommandFailed.
    """
    if modules.parts[-2:] != ("lib", "modules"):
        # depmod is told the directory above both, and looks for lib/modules itself.
        raise InvalidRequest(
            f"{modules} is no place of modules",
            remedy="name a directory that ends in lib/modules: --modules /lib/modules",
        )
    target = modules / release / "updates" / f"{MODULE}.ko"
    await asyncio.to_thread(_replace, built, target)
    depmod = shutil.which("depmod", path=_PLACES)
    if depmod is None:
        raise Unavailable("depmod is not installed", remedy="apt-get install kmod")
    root = modules.parents[1]
    base = [] if root == Path("/") else ["--basedir", str(root)]
    await process.run([depmod, *base, release], timeout_s=STEP_S)
    return target


def _replace(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, scratch)
    scratch.chmod(0o644)
    scratch.replace(target)


async def load(
    policy: ModulePolicy | None,
    module: Path | None = None,
    device: Path = DEVICE,
    *,
    dump_first: bool = False,
) -> None:
    """Loads the module: the file `module`, or the installed one. Raises StateConflict when it is
    loaded already, Unavailable with the module's own reason.
    """
    if await asyncio.to_thread(device.exists):
        raise StateConflict(
            "the module is loaded already, and goes on as it is",
            remedy=f"for what was built now: rmmod {MODULE} && modprobe {MODULE}; for another "
            f"policy alone: echo POLICY > {PARAMETERS}/policy",
        )
    name = "modprobe" if module is None else "insmod"
    program = shutil.which(name, path=_PLACES)
    if program is None:
        raise Unavailable(f"{name} is not installed", remedy="apt-get install kmod")
    words = _words(policy, dump_first=dump_first)
    try:
        await process.run([program, str(module or MODULE), *words], timeout_s=STEP_S)
    except CommandFailed as error:
        said = await asyncio.to_thread(said_by, f"{MODULE}: ")
        if not said:
            raise
        raise Unavailable(
            f"the kernel refused the module: {'; '.join(said[-3:])}", remedy=error.remedy
        ) from error


def write_options(
    policy: ModulePolicy | None, *, at_boot: bool, dump_first: bool = False
) -> list[Path]:
    """Has modprobe load the module with a policy, and systemd at each boot; gives the files that
    were written. Raises OSError.
    """
    written = []
    if words := _words(policy, dump_first=dump_first):
        _write(OPTIONS, f"options {MODULE} {' '.join(words)}\n")
        written.append(OPTIONS)
    if at_boot:
        _write(AT_BOOT, f"{MODULE}\n")
        written.append(AT_BOOT)
    return written


def _words(policy: ModulePolicy | None, *, dump_first: bool) -> list[str]:
    """Parameters of the module."""
    words = [] if policy is None else [f"policy={policy.value}"]
    return [*words, "crash_kernel_first=1"] if dump_first else words


def crash_kernel_loaded(told: Path = CRASH_KERNEL) -> bool:
    """Whether a panic of this kernel starts another one that takes a dump (kdump)."""
    with suppress(OSError):
        return told.read_text().strip() == "1"
    return False


def _write(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(f"# Written by semper guard install.\n{line}")
    scratch.chmod(0o644)
    scratch.replace(path)


def _config(path: Path) -> str | None:
    with suppress(OSError):
        return path.read_text(errors="replace")
    return None


def _compiler(config: str | None) -> str:
    found = re.search(r"^CONFIG_GCC_VERSION=(\d+)\d{4}$", config or "", re.MULTILINE)
    return f"gcc-{found[1]}" if found and found[1] != "0" else "gcc"


def _signed_only(lockdown: Path = LOCKDOWN, enforced: Path = ENFORCED) -> bool:
    with suppress(OSError):
        if enforced.read_text().strip() == "Y":
            return True
    with suppress(OSError):
        return "[none]" not in lockdown.read_text()
    return False
