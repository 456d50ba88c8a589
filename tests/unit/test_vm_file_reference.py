"""The reference of the VM file has every key, with an example that is accepted."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from sempervirt.core.errors import SpecError
from sempervirt.qemu import reference
from sempervirt.qemu.reference import TABLES, Table
from sempervirt.qemu.spec import PciSpec, VmSpec
from sempervirt.qemu.spec_file import parse_spec
from tests.unit.test_docs import ROOT

PAGE = ROOT / "docs/reference/vm-file.md"
FILE = Path("/vms/web.toml")
KEYS = [(table, key) for table in TABLES for key, _ in reference.keys(table)]


def tables(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The model and every table that its keys lead to."""
    yield model
    for field in model.model_fields.values():
        for one in models(field.annotation):
            yield from tables(one)


def models(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from models(part)


def holder(spec: VmSpec, table: Table) -> Any:
    """The table of a parsed file that an example is in."""
    found: Any = spec
    for part in filter(None, table.heading.strip("[]").split(".")):
        found = getattr(found, part)
    return found[0] if table.heading.startswith("[[") else found


def test_the_page_is_what_the_model_says() -> None:
    assert PAGE.read_text() == reference.text(), (
        "write it again: python -m sempervirt.qemu.reference > docs/reference/vm-file.md"
    )


def test_every_table_and_every_key_is_in_the_reference() -> None:
    assert {table.model for table in TABLES} == set(tables(VmSpec))
    for table in TABLES:
        told = {key for key, _ in reference.keys(table)}
        of_tables = {
            key for key, field in table.model.model_fields.items() if [*models(field.annotation)]
        }
        assert told == set(table.model.model_fields) - of_tables, f"{table.title}: no example"
        assert all(field.description for _, field in reference.keys(table)), table.title


@pytest.mark.parametrize(("table", "key"), KEYS, ids=lambda one: getattr(one, "title", one))
def test_every_example_is_accepted_and_says_something(table: Table, key: str) -> None:
    found = holder(parse_spec(reference.whole(table, key), FILE), table)
    field = table.model.model_fields[key]
    assert isinstance(found, table.model)
    assert getattr(found, key) is not None
    if key != "kind":  # there is one
        assert field.is_required() or getattr(found, key) != field.default


def test_an_example_that_is_wrong_is_found() -> None:
    table = next(one for one in TABLES if one.model is PciSpec)
    good = reference.whole(table, "pci")
    with pytest.raises(SpecError, match="no PCI address"):
        parse_spec(good.replace("0000:01:00.0", "1:00.0"), FILE)


@pytest.mark.parametrize("page", [PAGE, ROOT / "docs/first-guest.md", ROOT / "README.md"])
def test_the_whole_file_that_a_page_shows_is_accepted(page: Path) -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert parse_spec(text, FILE).disks[0].name == "root"
