"""Installing the module: what is missing is said at once; a real build is in tests/guard."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from sempervirt.core.errors import InvalidRequest, StateConflict
from sempervirt.guard.installation import (
    Facts,
    Key,
    crash_kernel_loaded,
    find_source,
    install,
    look,
    missing,
    require,
    write_options,
)
from sempervirt.guard.sources.module import TRIED

MODULE = Path(__file__).parents[2] / "kernel/semper_guard"
WHOLE = Facts(
    release="6.1.0-57-cloud-amd64", headers=Path("/headers"), has_headers=True, preempt_rt=False,
    compiler="gcc-12", compiler_path="/usr/bin/gcc-12", make_path="/usr/bin/make", source=MODULE,
    signed_only=False, key=None, may_load=True, loads=True,
)  # fmt: skip


def test_nothing_is_missing_where_all_is_there() -> None:
    assert missing(WHOLE) == []
    require(WHOLE)


@pytest.mark.parametrize(
    ("facts", "what", "remedy"),
    [
        (replace(WHOLE, release="5.10.0-30-amd64"), "no module for kernel 5.10", "6.1 or 6.12"),
        (replace(WHOLE, release="6.13.1"), "no module for kernel 6.13.1", "6.1 or 6.12"),
        (replace(WHOLE, preempt_rt=True), "PREEMPT_RT", "without"),
        (replace(WHOLE, has_headers=False), "no kernel headers", "linux-headers-6.1.0-57"),
        (replace(WHOLE, compiler_path=None), "built by gcc-12", "apt-get install gcc-12"),
        (replace(WHOLE, make_path=None), "no make", "apt-get install make"),
        (replace(WHOLE, source=None), "source is not there", "--source"),
        (replace(WHOLE, signed_only=True), "signed modules only", "mokutil"),
        (replace(WHOLE, may_load=False), "CAP_SYS_MODULE", "root"),
    ],
)
def test_each_thing_that_is_missing_is_said_with_its_remedy(
    facts: Facts, what: str, remedy: str
) -> None:
    (found,) = missing(facts)
    assert what in found.what
    assert remedy in found.remedy


def test_all_that_is_missing_is_said_at_once() -> None:
    facts = replace(WHOLE, has_headers=False, make_path=None, may_load=False)
    assert len(missing(facts)) == 3
    with pytest.raises(StateConflict, match=r"headers.*make.*CAP_SYS_MODULE"):
        require(facts)


def test_what_loading_needs_is_not_missing_for_a_build_alone() -> None:
    assert missing(replace(WHOLE, may_load=False, signed_only=True, loads=False)) == []
    key = Key(Path("key"), Path("certificate"))
    assert missing(replace(WHOLE, signed_only=True, key=key)) == []


def test_the_kernels_that_were_tried_are_those_that_the_module_takes() -> None:
    text = (MODULE / "main.c").read_text()
    assert f"tried on kernels {' and '.join(TRIED)} only" in text


def test_the_source_is_found_in_a_checkout() -> None:
    assert find_source() == MODULE


def test_what_a_host_has_is_read_from_its_headers(tmp_path: Path) -> None:
    (tmp_path / ".config").write_text("\nCONFIG_GCC_VERSION=140200\nCONFIG_PREEMPT_RT=y\n")
    facts = look(release="6.12.1", headers=tmp_path, loads=False)
    assert (facts.compiler, facts.has_headers, facts.preempt_rt) == ("gcc-14", True, True)
    assert not look(release="6.12.1", headers=tmp_path / "none", loads=False).has_headers


def test_options_are_written_where_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sempervirt.guard import installation
    from sempervirt.guard.presets import ModulePolicy

    monkeypatch.setattr(installation, "OPTIONS", tmp_path / "modprobe.d/guard.conf")
    monkeypatch.setattr(installation, "AT_BOOT", tmp_path / "modules-load.d/guard.conf")
    assert write_options(None, at_boot=False) == []
    written = write_options(ModulePolicy.LENIENT, at_boot=True)
    texts = [path.read_text().splitlines()[1] for path in written]
    assert texts == ["options semper_guard policy=lenient", "semper_guard"]
    (alone,) = write_options(None, at_boot=False, dump_first=True)
    assert alone.read_text().splitlines()[1] == "options semper_guard crash_kernel_first=1"


def test_a_crash_kernel_is_seen(tmp_path: Path) -> None:
    told = tmp_path / "kexec_crash_loaded"
    assert not crash_kernel_loaded(told)
    told.write_text("0\n")
    assert not crash_kernel_loaded(told)
    told.write_text("1\n")
    assert crash_kernel_loaded(told)


def test_for_a_kernel_that_was_never_tried_nothing_else_is_asked_for() -> None:
    facts = replace(WHOLE, release="6.18.44", has_headers=False, make_path=None)
    assert [one.what for one in missing(facts)] == [
        "there is no module for kernel 6.18.44, only for 6.1 and 6.12"
    ]


@pytest.mark.parametrize("named", ["x", "lib", "usr/modules"])
def test_a_place_that_depmod_would_not_look_at_is_refused(tmp_path: Path, named: str) -> None:
    built = tmp_path / "semper_guard.ko"
    built.write_bytes(b"")
    with pytest.raises(InvalidRequest, match="no place of modules"):
        asyncio.run(install(built, "6.1.0-57-cloud-amd64", tmp_path / named))
    assert list(tmp_path.iterdir()) == [built]
