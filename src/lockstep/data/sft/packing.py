"""Which samples share a sequence: first fit, in a shuffled order or from the longest to the shortest."""

from typing import Literal

import numpy as np

Algorithm = Literal["first_fit_shuffle", "first_fit_decreasing"]


def pack(lengths: np.ndarray, room: int, algorithm: Algorithm, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the packs: sample numbers one pack after another, int64 [n], and where each pack begins, int64 [p + 1].

    Every sample goes to the first pack that has room for it. Samples stand in a pack, and packs among each other, in
    the order in which they were dealt out.

    Args:
        lengths: places that each sample needs, int64 [n]; none is above ``room``.
        room: places of a pack.
        algorithm: the order of dealing out: shuffled by ``seed``, or longest first (of equals, the earlier row first).
        seed: seed of the shuffle.
    """
    assert len(lengths) == 0 or int(lengths.max()) <= room, "samples are cut before they are packed"
    if algorithm == "first_fit_decreasing":
        order = np.argsort(-lengths, kind="stable")
    else:
        order = np.random.default_rng(seed).permutation(len(lengths))
    packs: list[list[int]] = []
    free = _FirstFit(len(lengths), room)
    for number in order.tolist():
        found = free.take(int(lengths[number]))
        if found == len(packs):
            packs.append([])
        packs[found].append(number)
    samples = np.array([number for numbers in packs for number in numbers], dtype=np.int64)
    starts = np.cumsum([0, *map(len, packs)], dtype=np.int64)
    return samples, starts


class _FirstFit:
    """The places left in each of ``count`` packs; finds the first that has enough in logarithmic time.

    A tree over the packs: the leaf of pack i is node ``width + i``, and a node has the most of its two children.
    """

    def __init__(self, count: int, room: int) -> None:
        self._width = 1 << max(0, count - 1).bit_length()
        self._most = [room] * (2 * self._width)

    def take(self, places: int) -> int:
        """Return the first pack with so many places left, and take them from it."""
        most, node = self._most, 1
        while node < self._width:
            node *= 2
            if most[node] < places:
                node += 1
        found = node - self._width
        most[node] -= places
        while node > 1:
            node //= 2
            most[node] = max(most[2 * node], most[2 * node + 1])
        return found
