"""The ledger in a comparison: the first micro-batch, rank and number that differ."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lockstep.lab.compare import compare_paths
from tests.lab.synthetic import Line, train_lines, write


def lines(change: Callable[[dict[str, Any]], None] | None = None) -> list[Line]:
    """Return lines with ledgers of two ranks; ``change`` edits that of iteration 3."""
    found = train_lines()
    for line in found:
        line["ledger"] = {
            "ranks": 2,
            "loss_sums": [1.0] * 4,
            "tokens": [128] * 4,
            "divisors": [512.0] * 4,
            "router_weight": 0.25,
            "hashes": [f"{line['iteration']} {i}" for i in range(4)],
            "grad_norms": {"attention": 0.5, "experts": 0.25},
        }
    if change:
        change(found[2]["ledger"])
    return found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda e: e["tokens"].__setitem__(3, 127),
            "the number of tokens with a loss of micro-batch 4 (data-parallel rank 1) is 128 against 127",
        ),
        (
            lambda e: e["divisors"].__setitem__(2, 256.0),
            "the divisor of the loss of micro-batch 3 (data-parallel rank 0) is 512.0 against 256.0",
        ),
        (
            lambda e: e["hashes"].__setitem__(1, "x"),
            "the token hash of micro-batch 2 (data-parallel rank 1) is 3 1 against x",
        ),
        (lambda e: e.update(router_weight=1.0), "the factor on router losses is 0.25 against 1"),
    ],
)
def test_first_difference_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str):
    found = compare_paths(write(tmp_path / "a", train=lines()), write(tmp_path / "b", train=lines(change)))
    assert found.decision.verdict == "bug"
    assert f"{said}, at iteration 3" in found.decision.cause


def test_kind_whose_gradients_part_alone_is_named(tmp_path: Path):
    changed = lines(lambda entries: entries["grad_norms"].update(experts=0.3))
    changed[2]["grad_norm"] += 0.05
    found = compare_paths(write(tmp_path / "a", train=lines()), write(tmp_path / "b", train=changed))
    assert found.decision.verdict == "bug"
    assert "of gradients, experts alone part first, at iteration 3 (0.25 against 0.3)" in found.decision.cause


def test_equal_ledgers_say_so(tmp_path: Path):
    found = compare_paths(write(tmp_path / "a", train=lines()), write(tmp_path / "b", train=lines()))
    assert found.decision.verdict == "identical"
    assert [stage.state for stage in found.stages if stage.name == "ledger"] == ["equal"]
