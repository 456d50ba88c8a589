"""Sizes, names, durations, back-off, journals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sempervirt.core.durations import Backoff, elapsed_ms, format_duration
from sempervirt.core.events import JOURNAL_LENGTH, Journal
from sempervirt.core.names import NAME_MAX, check_name, split_disk_name, suggest
from sempervirt.core.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20),
        ("4G", 4 << 30),
        ("1.5T", 3 << 39),
        ("64KiB", 64 << 10),
        ("64kb", 64 << 10),
        ("17", 17),
        ("17B", 17),
        (" 2 G ", 2 << 30),
        (4096, 4096),
        (0, 0),
    ],
)
def test_sizes_that_people_write(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1.3K", "5X", "1e3", "512 MM", -1, True, 1.5])
def test_what_is_not_a_size(text: str | int) -> None:
    with pytest.raises(ValueError, match=r"size|bytes"):
        parse_size(text)


@given(st.integers(min_value=1, max_value=1023), st.sampled_from(["K", "M", "G", "T", "P"]))
def test_a_whole_number_of_a_unit_is_written_as_it_was_read(number: int, unit: str) -> None:
    assert format_size(parse_size(f"{number}{unit}")) == f"{number}{unit}"


def test_sizes_as_they_are_shown() -> None:
    assert [format_size(n) for n in (0, 17, 1536, (5 << 30) + 1)] == ["0", "17", "1.5K", "5G"]


@pytest.mark.parametrize("name", ["web", "a", "db-1.example_x", "0", "a" * NAME_MAX])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "-a", "a/b", "a b", "ä", "a" * (NAME_MAX + 1), "a\n"])
def test_what_is_not_a_name(name: str) -> None:
    with pytest.raises(ValueError, match="is not a name"):
        check_name(name)


def test_disk_names() -> None:
    assert split_disk_name("web/root") == ("web", "root")
    for wrong in ("web", "web/", "/root", "web/root/x", ""):
        with pytest.raises(ValueError, match="VM/DISK"):
            split_disk_name(wrong)


def test_suggestions() -> None:
    assert suggest("memroy", ["memory", "machine"]) == 'did you mean "memory"?'
    assert suggest("zzz", ["memory"]) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12 ms"),
        (1, "1 s"),
        (59.9, "59 s"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (7320, "2 h 2 min"),
        (100000, "1 d 3 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_elapsed_milliseconds() -> None:
    assert elapsed_ms(1_000_000, 3_500_000) == 2.5
    assert elapsed_ms(None, 1) is None
    assert elapsed_ms(1, None) is None


def test_backoff_doubles_to_its_ceiling() -> None:
    backoff = Backoff(free=2, first_s=0.5, ceiling_s=3)
    delays = [backoff.delay_s(failures) for failures in range(8)]
    assert delays == [0, 0, 0, 0.5, 1, 2, 3, 3]
    assert not backoff.at_ceiling(5)
    assert backoff.at_ceiling(6)
    assert backoff.delay_s(10_000) == 3


def test_a_journal_forgets_the_oldest() -> None:
    journal = Journal()
    for time in range(JOURNAL_LENGTH + 5):
        journal.note(time, "save" if time % 2 == 0 else "restore", str(time))
    assert len(journal.events) == JOURNAL_LENGTH
    assert journal.events[0].message == "5"
    last = journal.last("save")
    assert last is not None
    assert last.message == str(JOURNAL_LENGTH + 4)
    assert journal.last("claim") is None
