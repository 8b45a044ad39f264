import pytest

from lockstep.data.splits import documents_of, parse_split
from lockstep.errors import UserError


def sizes(split: str, count: int) -> list[list[int] | None]:
    intervals = [documents_of(i, count) if i else None for i in parse_split(split)]
    return [None if d is None else [int(d[0]), int(d[-1]) + 1] if len(d) else [] for d in intervals]


def test_documents_are_rounded_not_cut_off() -> None:
    assert sizes("969, 30, 1", 723) == [[0, 701], [701, 722], [722, 723]]
    assert sizes("1,1,1", 100000) == [[0, 33333], [33333, 66667], [66667, 100000]]


def test_halves_round_to_even_as_python_does() -> None:
    assert sizes("1,1", 5) == [[0, 2], [2, 5], None]
    assert sizes("1,1", 7) == [[0, 4], [4, 7], None]


@pytest.mark.parametrize(
    ("split", "expected"),
    [("100", [True, False, False]), ("99,1,0", [True, True, False]), ("0,0,2.5", [False, False, True])],
)
def test_weight_0_is_no_split(split: str, expected: list[bool]) -> None:
    assert [interval is not None for interval in parse_split(split)] == expected


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "0,0,0", "-1,2", "nan,1", "inf", "90/10", "90,,10"])
def test_what_is_not_a_split_is_refused(split: str) -> None:
    with pytest.raises(UserError, match="expected up to three weights such as 969,30,1"):
        parse_split(split)
