"""Curves of many iterations with as many points as a picture has columns, and every spike still in them."""

import math
from collections.abc import Sequence

COLUMNS = 900
"""Columns of a drawn curve: about one a pixel."""


def kept(at: Sequence[int], values: Sequence[float], columns: int = COLUMNS) -> list[int]:
    """Return the positions of the points to draw, in order; all of them where they are few.

    Of each column its first and last point stay, its lowest and its highest, and one without a finite value if there
    is any: the curve covers the same pixels as with all points, and is broken where it has a gap.
    """
    if len(at) <= 4 * columns:
        return list(range(len(at)))
    first, width = at[0], (at[-1] - at[0] + 1) / columns
    found: list[int] = []
    begin = 0
    while begin < len(at):
        column = int((at[begin] - first) / width)
        end = begin + 1
        while end < len(at) and int((at[end] - first) / width) == column:
            end += 1
        found += _telling(values, begin, end)
        begin = end
    return found


def _telling(values: Sequence[float], begin: int, end: int) -> list[int]:
    column = range(begin, end)
    finite = [i for i in column if math.isfinite(values[i])]
    telling = {begin, end - 1}
    if finite:
        telling |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    if len(finite) < len(column):
        telling.add(next(i for i in column if not math.isfinite(values[i])))
    return sorted(telling)
