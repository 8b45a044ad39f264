"""Where tensors are farthest apart, with both values: of rounding, and of processes that should have the same."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lockstep.lab.localise import report as localise_report
from lockstep.lab.localise import stages
from lockstep.lab.localise.localise import Localised
from lockstep.lab.localise.measure import Bounds, Four, Row, exact_row, four_row
from lockstep.lab.localise.probes import Logical, Probes, ProbeWriter, load_probes
from lockstep.lab.localise.walk import StageResult
from lockstep.lab.localise.worker import RUN
from lockstep.lab.verdict import Verdict
from tests.lab.test_report import _rows as rows_of
from tests.lab.test_report import localised

NAME = "decoder.layers.0.self_attention"
BOUNDS = Bounds(2, 64)


def read(folder: Path, *boxes: torch.Tensor, offsets: tuple[int, ...] = (0, 0), shape: tuple[int, ...] = ()) -> Probes:
    """Return probes in which each process tells a box at the same place; the first tells all of the tensor."""
    for rank, box in enumerate(boxes):
        writer = ProbeWriter(rank, len(boxes))
        if rank == 0:
            writer.tensor(1, stages.FORWARD, NAME, box)
        else:
            writer.tensor(1, stages.FORWARD, NAME, box, shape=shape, offsets=offsets)
        writer.number(1, stages.LOSS, "lm loss", 2.0 + rank)
        writer.write(folder, RUN)
    return load_probes(folder, RUN)


def logical(folder: Path, *boxes: torch.Tensor, offsets: tuple[int, ...] = (0, 0)) -> Logical:
    found = read(folder, *boxes, offsets=offsets, shape=tuple(boxes[0].shape)).logical(1, stages.FORWARD, NAME)
    assert found is not None
    return found


def outcome(row: Row) -> Localised:
    """Return a localisation in which a row is the only one that is not equal."""
    found = localised()
    verdict: Verdict = "bug" if row.state == "differs" else "rounding"
    result = StageResult(1, stages.FORWARD, row.state, row.reason, [row])
    return replace(found, verdict=verdict, walked=replace(found.walked, results=[result]))


def test_rounding_tells_the_farthest_element(tmp_path: Path):
    a = torch.linspace(1, 2, 12).reshape(3, 4)
    b = a.clone()
    b[2, 1] += 3e-7
    four = Four(*(logical(tmp_path / name, value) for name, value in (("a", a), ("b", b), ("x", a), ("y", a))))
    row = four_row(1, stages.FORWARD, NAME, four, BOUNDS, ("float32", "float32"))
    assert row.state == "rounding"
    assert row.where is not None
    assert (row.where.index, row.where.ranks) == ((2, 1), ())
    assert (row.where.a, row.where.b) == (float(a[2, 1]), float(b[2, 1]))
    found = outcome(row)
    begins = localise_report.as_json(found)["begins"]["where"]
    assert (begins["index"], begins["a"], begins["b"]) == ([2, 1], row.where.a, row.where.b)
    told = dict(row.split("|") for row in rows_of(localise_report.as_html(found)) if row.count("|") == 1)
    assert told["Where they are farthest apart"] == "[2, 1]"
    assert float(told["B there"]) - float(told["A there"]) == pytest.approx(
        row.where.b - row.where.a, rel=1e-2
    )  # as printed
    assert float(told["Max difference"]) == pytest.approx(row.where.b - row.where.a)


def test_a_single_number_that_is_rounded_has_no_index(tmp_path: Path):
    parts = [torch.tensor([[value]]) for value in (1.0, 1.0000002, 1.0, 1.0)]
    four = Four(*(logical(tmp_path / str(n), part) for n, part in enumerate(parts)))
    row = four_row(1, stages.FORWARD, NAME, four, BOUNDS, ("float32", "float32"))
    assert row.where is not None
    assert row.where.index == ()
    assert (row.where.a, row.where.b) == (1.0, pytest.approx(1.0000002))


def test_torn_processes_tell_both_values_at_their_place(tmp_path: Path):
    whole = torch.arange(12.0).reshape(3, 4)
    part = whole[1:, 2:].clone()
    part[0, 1] += 0.25
    part[1, 0] -= 1.5  # the farthest: [2, 2] of the whole
    row = exact_row(
        1, stages.FORWARD, NAME, logical(tmp_path / "a", whole), logical(tmp_path / "b", whole, part, offsets=(1, 2))
    )
    assert row.state == "differs"
    where = row.where
    assert where is not None
    assert (where.side, where.processes, where.index, where.a, where.b) == ("B", (0, 1), (2, 2), 10.0, 8.5)
    found = outcome(row)
    first = localise_report.as_json(found)["first"]["where"]
    assert (first["processes"], first["index"], first["a"], first["b"]) == ([0, 1], [2, 2], 10.0, 8.5)
    rows = rows_of(localise_report.as_html(found))
    assert {
        "Where they are farthest apart|[2, 2]",
        "Process 0 of B there|10",
        "Process 1 of B there|8.5",
        "Max difference|1.5",
    } <= set(rows)


def test_torn_processes_with_a_value_that_is_no_number_are_infinitely_apart(tmp_path: Path):
    whole = torch.ones(2, 2)
    other = whole.clone()
    other[1, 0] = math.nan
    (copies,) = logical(tmp_path / "b", whole, other).copies
    assert (copies.apart, copies.index) == (math.inf, (1, 0))
    assert math.isnan(copies.values[1])


def test_torn_numbers_tell_both_values(tmp_path: Path):
    copies = read(tmp_path, torch.ones(1, 1), torch.ones(1, 1), shape=(1, 1)).torn(1, stages.LOSS, "lm loss")
    assert copies is not None
    assert (copies.ranks, copies.values, copies.index) == ((0, 1), (2.0, 3.0), ())
