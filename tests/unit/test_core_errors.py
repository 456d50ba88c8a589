"""The error tree: one table, over the wire and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from sempervirt.core import errors
from sempervirt.core.errors import (
    KINDS,
    CommandFailed,
    ImageLocked,
    InvalidRequest,
    SempervirtError,
    SpecError,
    Unavailable,
    from_wire,
    kind_of,
)


def every_class() -> list[type[SempervirtError]]:
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, SempervirtError)
    ]


def test_every_error_has_its_own_row() -> None:
    assert {kind.error for kind in KINDS} == set(every_class())
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)


def test_derived_errors_come_before_their_parents() -> None:
    for index, kind in enumerate(KINDS):
        for later in KINDS[index + 1 :]:
            assert not issubclass(later.error, kind.error)


def test_exit_codes_are_never_success_and_statuses_are_errors() -> None:
    for kind in KINDS:
        assert kind.exit_code not in (0, 3)  # 3 is a locked image, from semper-blkd alone
        assert kind.http_status >= 400


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_over_the_wire_and_back(kind: errors.Kind) -> None:
    back = from_wire(kind.name, "what happened", "what to do")
    assert str(back) == "what happened; what to do"
    assert isinstance(back, kind.error.__mro__[1]) or type(back) is kind.error
    assert kind_of(back).exit_code == kind.exit_code


def test_an_unknown_kind_is_still_an_error() -> None:
    assert type(from_wire("from-the-future", "m", "")) is SempervirtError


def test_a_failed_command_can_be_pasted_into_a_shell() -> None:
    error = CommandFailed("qemu-img info 'a b'", 1, ["first", "last"])
    assert str(error) == "`qemu-img info 'a b'`: exit code 1: last"
    assert isinstance(error, Unavailable)
    late = CommandFailed("sleep 9", None, [])
    assert "deadline" in str(late)


def test_a_spec_error_names_its_place() -> None:
    error = SpecError("is missing", file=Path("web.toml"), line=3, key="disks[0].image")
    assert str(error) == "web.toml:3: disks[0].image: is missing"
    assert isinstance(error, InvalidRequest)
    assert kind_of(ImageLocked("x")).name == "image-locked"
