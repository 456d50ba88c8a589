"""End to end: a host's kernel dies, and its VM is carried out by our agent, over our wire, to
another.

One boot of an emulated host sees several deaths, each with a VM of its own: booting the host and
its agent takes most of the time.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from sempervirt.demo.guard import counter
from sempervirt.demo.guard.counter import Count, lost
from tests.guard.moved import run

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.root]

SERIES, OTHER = "6.1", "6.12"
# From the module's word of the death until the guest is heard elsewhere. The host is emulated, and
# emulates its guest, on processors with other work: how long it takes on a quiet machine is
# measured by `make guard-end-to-end`.
RUNS_ELSEWHERE_S = 60.0


@pytest.mark.timeout(660)
def test_an_oops_loads_the_module_and_then_a_panic_goes_ahead_once_the_vm_is_out() -> None:
    """With the presets as shipped: first the kernel survives, and nobody has loaded the module.

    The other deaths, of a host that goes on afterwards, are in the campaign.
    """
    told = run(
        SERIES, "--in-response", "--let-go", "--death", "oops", "--death", "panic", bound_s=640
    )
    assert told["failure"] == ""
    oops, panic = told["outcomes"]
    assert (oops["wrong"], panic["wrong"]) == ("", "")
    assert oops["event"].startswith("BUG: kernel NULL pointer dereference")
    assert "panic in task" in panic["event"]
    assert max(one["event_to_running_s"] for one in (oops, panic)) < RUNS_ELSEWHERE_S


def test_without_the_module_the_vm_is_lost() -> None:
    """On the other kernel: what is survived there is in the campaign."""
    told = run(OTHER, "--unguarded", bound_s=380)
    assert told == {"outcomes": [], "failure": ""}


# The judge


def said(*numbers: int, nonce: int = 7) -> str:
    return "".join(f"C {nonce:08X} {number:08X}\n" for number in numbers)


def test_the_judge_sees_what_is_lost() -> None:
    assert lost(said(1, 2, 3), said(4, 5)) == ""
    assert lost(said(1, 2, 3), said(5, 6)) == "after 3 comes 5"
    assert lost(said(1, 2, 3), said(3, 4)) == "after 3 comes 3"
    assert lost(said(1, 3), said(4)) == "after 1 comes 3"
    assert "booted again" in lost(said(1, 2), said(3, nonce=8))
    assert "0 times there" in lost(said(1), "")


@pytest.mark.parametrize("at", range(len(said(4))))
def test_a_line_that_begins_here_and_ends_there_is_whole(at: int) -> None:
    line = said(4)
    assert lost(said(1, 2, 3) + line[:at], line[at:] + said(5)) == ""
    # The control: a byte of it that is lost, or comes twice.
    assert lost(said(1, 2, 3) + line[:at], line[at + 1 :] + said(5)) != ""
    assert lost(said(1, 2, 3) + line[: at + 1], line[at:] + said(5)) != ""


def test_the_counter_is_what_its_source_says(tmp_path: Path) -> None:
    source = Path(counter.__file__).with_suffix(".s")
    made, linked = tmp_path / "counter.o", tmp_path / "counter.bin"
    assert shutil.which("as"), "the assembler is missing"
    subprocess.run(["as", "--32", "-o", made, source], check=True)
    subprocess.run(
        ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", linked, made],
        check=True,
    )
    assert linked.read_bytes() == counter.disk(512)


def test_lines_of_the_counter_are_read_and_half_ones_are_not() -> None:
    text = "SeaBIOS\r\nC 0000000A 00000001\nC 0000000A 00000002\nC 0000000A 000"
    assert counter.read(text) == [Count(10, 1), Count(10, 2)]
