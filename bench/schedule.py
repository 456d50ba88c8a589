"""The order of the measurements: random, the same for the same seed, comparable ones together."""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

Group = TypeVar("Group")
Member = TypeVar("Member")


def interleaved(
    groups: Iterable[tuple[Group, Sequence[Member]]], rounds: int, seed: int
) -> Iterator[tuple[int, Group, Member]]:
    """Every member of every group once in each round, as (round, group, member).

    The groups of a round come in random order; the members of a group follow each other, in random
    order as well: they are what is compared, so the machine should be the same for all of them.
    """
    generator = random.Random(seed)
    fixed = [(group, list(members)) for group, members in groups]
    for number in range(rounds):
        for group, members in generator.sample(fixed, len(fixed)):
            for member in generator.sample(members, len(members)):
                yield number, group, member
