"""Packing: every sample once, no pack too full, the packs of a plain first fit."""

import itertools

import numpy as np
import pytest

from lockstep.data.sft.packing import Algorithm, pack


def members(lengths: list[int], room: int, algorithm: Algorithm, seed: int = 7) -> list[list[int]]:
    samples, starts = pack(np.array(lengths, dtype=np.int64), room, algorithm, seed)
    return [samples[a:b].tolist() for a, b in itertools.pairwise(starts)]


def plain_first_fit(lengths: list[int], order: list[int], room: int) -> list[list[int]]:
    packs: list[list[int]] = []
    for number in order:
        fits = (p for p in packs if sum(lengths[i] for i in p) + lengths[number] <= room)
        found = next(fits, None)
        if found is None:
            packs.append(found := [])
        found.append(number)
    return packs


def test_a_case_made_by_hand() -> None:
    assert members([3, 8, 2, 5, 2], 10, "first_fit_decreasing") == [[1, 2], [3, 0, 4]]


@pytest.mark.parametrize("count", [1, 2, 3, 64, 257])
def test_packs_are_those_of_a_plain_first_fit(count: int) -> None:
    lengths = np.random.default_rng(count).integers(1, 33, size=count).tolist()
    by_length = sorted(range(count), key=lambda i: -lengths[i])
    assert members(lengths, 32, "first_fit_decreasing") == plain_first_fit(lengths, by_length, 32)
    shuffled = np.random.default_rng(7).permutation(count).tolist()
    found = members(lengths, 32, "first_fit_shuffle")
    assert found == plain_first_fit(lengths, shuffled, 32)
    assert sorted(i for p in found for i in p) == list(range(count))


def test_the_seed_decides_about_a_shuffle_alone() -> None:
    lengths = list(range(1, 30))
    assert members(lengths, 32, "first_fit_shuffle", 1) == members(lengths, 32, "first_fit_shuffle", 1)
    assert members(lengths, 32, "first_fit_shuffle", 1) != members(lengths, 32, "first_fit_shuffle", 2)
    assert members(lengths, 32, "first_fit_decreasing", 1) == members(lengths, 32, "first_fit_decreasing", 2)
