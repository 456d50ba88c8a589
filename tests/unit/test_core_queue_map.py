"""Maps of queues to threads: what one is, and how queues are spread."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sempervirt.core.queue_map import (
    Binding,
    Choice,
    DevicePlan,
    check_map,
    format_map,
    parse_map,
    spread,
)

QUEUES = st.integers(1, 64)


@given(QUEUES, QUEUES, st.none() | QUEUES)
def test_every_queue_has_a_thread_and_the_threads_are_evenly_loaded(
    queues: int, per_thread: int, threads_max: int | None
) -> None:
    thread_map = spread(queues, per_thread, threads_max)
    assert check_map(thread_map, queues) == thread_map  # one for each queue, numbered densely
    load = Counter(thread_map)
    assert max(load.values()) - min(load.values()) <= 1
    if threads_max is None:
        assert max(load.values()) <= per_thread
        assert len(load) == 1 or (len(load) - 1) * per_thread < queues, "fewer would do"
    else:
        assert len(load) == min(threads_max, -(-queues // per_thread))


@given(st.lists(st.integers(-1, 5), max_size=8), st.none() | st.integers(1, 8))
def test_what_is_a_map(numbers: list[int], queues: int | None) -> None:
    dense = set(numbers) == set(range(len(set(numbers)))) and numbers != []
    try:
        checked = check_map(numbers, queues)
    except ValueError:
        assert not dense or queues not in {None, len(numbers)}
    else:
        assert dense
        assert queues in {None, len(numbers)}
        assert parse_map(format_map(checked)) == checked == tuple(numbers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a map"),
        ("0,,1", "is not a map"),
        ("0,x", "write for example 0,0,1,1"),
        ("1,2", "nothing is on thread 0"),
        ("0,2", "nothing is on thread 1"),
        ("0,-1", "without gaps"),
        # To look through all numbers up to this one would take minutes.
        ("0,400000000000", "nothing is on thread 1"),
    ],
)
def test_what_is_no_map_is_told(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_map(text)


def test_in_words() -> None:
    binding = Binding((0, 1, 0, 1), "preset of 2026-11-23")
    plan = DevicePlan("vhost-user-blk", binding, Choice("mmap", "preset of 2026-11-23"))
    assert str(plan) == "4 queues on 2 threads, engine mmap (preset of 2026-11-23)"
    plan = DevicePlan("vhost-user-blk", Binding((0,), "VM file"), Choice("auto", "built-in"))
    assert str(plan) == "1 queue on 1 thread (VM file), engine auto (built-in)"
    plan = DevicePlan("virtio-net", Binding((0, 0), "main loop"), Choice("qemu", "VM file"))
    assert str(plan) == "2 queue pairs on 1 thread (main loop), engine qemu (VM file)"
