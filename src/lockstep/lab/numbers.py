"""The last step of a comparison: losses, gradient norms and evaluations, number by number."""

import math
from dataclasses import dataclass
from typing import Literal

from lockstep.lab.bands import loss_band, norm_band
from lockstep.lab.calibration.band import Band
from lockstep.lab.digits import EVALUATION, Ruler
from lockstep.lab.point import EvaluationKey, Point
from lockstep.lab.side import Pairs, Side, ruler
from lockstep.lab.stages import both

Grade = Literal["equal", "inside", "outside"]
LOSS, NORM = "lm_loss", "grad_norm"


@dataclass(frozen=True)
class Mismatch:
    """A number that differs. ``band`` is how far rounding may take it: as measured, or else ``unmeasured_band``.

    ``key`` is set for an evaluation.
    """

    iteration: int
    what: str
    a: float | None
    b: float | None
    band: float
    grade: Grade
    key: EvaluationKey | None = None
    measured: bool = False
    unmeasured_band: float = 0.0

    @property
    def size(self) -> float:
        """The distance of the two; infinite where one is missing or not a number."""
        if self.a is None or self.b is None:
            return math.inf
        distance = abs(self.a - self.b)
        return math.inf if math.isnan(distance) else distance

    @property
    def spelled(self) -> str:
        """Name the number and where it stands."""
        if self.key:
            return f"{self.what} of the {evaluation_name(self.key)}"
        return f"{self.what} at iteration {self.iteration}"


@dataclass(frozen=True)
class Row:
    """One line of the table: both sides at one iteration, or over ``start`` to ``iteration``."""

    iteration: int
    start: int
    loss_a: float | None
    loss_b: float | None
    norm_a: float | None
    norm_b: float | None
    lr_a: float | None
    lr_b: float | None
    grade: Grade
    band: float = 0.0

    @property
    def difference(self) -> float | None:
        """Loss of B minus loss of A."""
        return None if self.loss_a is None or self.loss_b is None else self.loss_b - self.loss_a


@dataclass(frozen=True)
class EvaluationRow:
    """One evaluation of both sides."""

    key: EvaluationKey
    loss_a: float | None
    loss_b: float | None
    grade: Grade


@dataclass(frozen=True)
class Numbers:
    """What the numbers say. ``mismatches`` are in the order in which a run meets them."""

    rows: list[Row]
    evaluations: list[EvaluationRow]
    mismatches: list[Mismatch]
    missing_evaluations: dict[str, list[EvaluationKey]]

    @property
    def compared(self) -> int:
        """Numbers of losses that both sides tell, evaluations included."""
        known = [row for row in self.rows if row.loss_a is not None and row.loss_b is not None]
        return len(known) + len(self.evaluations)

    @property
    def first_outside(self) -> Mismatch | None:
        """The first number that rounding cannot explain."""
        return next((m for m in self.mismatches if m.grade == "outside"), None)

    def losses(self) -> list[Mismatch]:
        """Return the mismatches of training losses."""
        return [m for m in self.mismatches if m.what == LOSS and m.key is None]


def judge(a: float | None, b: float | None, band: float) -> Grade:
    """Grade two numbers: NaN equals nothing, not even NaN; a number never equals a missing one."""
    if a is None or b is None:
        return "equal" if a is b else "outside"
    if a == b:
        return "equal"
    return "inside" if abs(a - b) <= band else "outside"


def compare_numbers(a: Side, b: Side, pairs: Pairs, measured: Band | None = None) -> Numbers:
    """Compare losses, gradient norms, loss scales, skipped iterations and evaluations, by a measured band if any."""
    rule = ruler(a, b)
    names = _comparable(pairs)
    rows, mismatches = [], []
    for pair in pairs.pairs:
        found = [m for m in (_compare(name, pair, rule, measured) for name in names) if m]
        mismatches += found
        rows.append(_row(pair, rule, found, measured))
    shared = [key for key in a.evaluations if key in b.evaluations]
    evaluations = []
    for key in sorted(shared, key=_run_order):
        row, found = _evaluation(a, b, key, rule, measured)
        evaluations.append(row)
        mismatches += found
    mismatches.sort(key=lambda m: (m.iteration, m.key is not None))
    told = a.tells_evaluations and b.tells_evaluations
    missing = {
        "A": sorted((key for key in b.evaluations if told and key not in a.evaluations), key=_run_order),
        "B": sorted((key for key in a.evaluations if told and key not in b.evaluations), key=_run_order),
    }
    return Numbers(rows, evaluations, mismatches, missing)


def _comparable(pairs: Pairs) -> list[str]:
    """Return what both sides tell at all; a number that one side never tells is not a difference."""
    names = (LOSS, NORM, "loss_scale", "skipped")
    return [name for name in names if name == LOSS or any(both(pair, name) for pair in pairs.pairs)]


def _compare(name: str, pair: tuple[Point, Point], rule: Ruler, measured: Band | None) -> Mismatch | None:
    a, b = (rule.cut(name, getattr(point, name)) for point in pair)
    if name in (LOSS, NORM) and pair[0].skipped and pair[1].skipped and not (_finite(a) or _finite(b)):
        return None  # Both overflowed and threw the step away: no update used these numbers.
    if rule.same_in(name, pair):
        return None
    band, coarse, known = _band(name, pair[0].iteration, a, b, rule, measured)
    grade = judge(a, b, band)
    at = pair[0].iteration
    return None if grade == "equal" else Mismatch(at, name, a, b, band, grade, measured=known, unmeasured_band=coarse)


def _band(
    name: str, iteration: int, a: float | None, b: float | None, rule: Ruler, measured: Band | None
) -> tuple[float, float, bool]:
    """Return how far rounding may take a number, how far where nothing is measured, and whether it was measured."""
    if name not in (LOSS, NORM) or a is None or b is None or not (math.isfinite(a) and math.isfinite(b)):
        return 0.0, 0.0, False
    digit = rule.unit(name, min(abs(a), abs(b)))
    coarse = loss_band(a, b) if name == LOSS else norm_band(a, b, digit)
    width = measured.width(name, iteration, min(abs(a), abs(b))) if measured else None
    if width is None:
        return coarse, coarse, False
    return width + 1.5 * digit, coarse, True


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _row(pair: tuple[Point, Point], rule: Ruler, found: list[Mismatch], measured: Band | None) -> Row:
    first = pair[0]
    values: dict[str, float | None] = {}
    # The learning rate of the update itself where both sides tell it, else the following one, as a console prints it.
    lr = "lr" if both(pair, "lr") else "next_lr"
    for name, column in ((LOSS, "loss"), (NORM, "norm"), (lr, "lr")):
        values[f"{column}_a"], values[f"{column}_b"] = (rule.cut(name, getattr(point, name)) for point in pair)
    band, _, _ = _band(LOSS, first.iteration, values["loss_a"], values["loss_b"], rule, measured)
    return Row(iteration=first.iteration, start=first.start, grade=worst([m.grade for m in found]), band=band, **values)


def worst(grades: list[Grade]) -> Grade:
    """Return the worst of several grades; ``equal`` for none."""
    return "outside" if "outside" in grades else "inside" if "inside" in grades else "equal"


def _evaluation(
    a: Side, b: Side, key: EvaluationKey, rule: Ruler, measured: Band | None
) -> tuple[EvaluationRow, list[Mismatch]]:
    losses = a.evaluations[key], b.evaluations[key]
    loss_a, loss_b = (rule.cut(EVALUATION, loss) for loss in losses)
    # An evaluation is as far off as the training loss beside it.
    band, coarse, known = _band(LOSS, key[0], loss_a, loss_b, rule, measured)
    found = []
    grade = "equal" if rule.same(EVALUATION, *losses) else judge(loss_a, loss_b, band)
    if loss_a is None and loss_b is None:
        grade = "outside"
    if grade != "equal":
        found.append(Mismatch(key[0], LOSS, loss_a, loss_b, band, grade, key, known, coarse))
    samples_a, samples_b = a.samples[key], b.samples[key]
    if samples_a is not None and samples_b is not None and samples_a != samples_b:
        found.append(Mismatch(key[0], "samples", samples_a, samples_b, 0.0, "outside", key))
    return EvaluationRow(key, loss_a, loss_b, worst([m.grade for m in found])), found


def _run_order(key: EvaluationKey) -> tuple[int, bool, bool, str]:
    """Sort evaluations as a run makes them: those during training, then the final ones, validation before test."""
    iteration, split, final = key
    return iteration, final, split == "test", split


def evaluation_name(key: EvaluationKey) -> str:
    """Spell an evaluation: ``valid evaluation at iteration 10`` or ``final test evaluation``."""
    iteration, split, final = key
    return f"{'final ' if final else ''}{split} evaluation at iteration {iteration}"
