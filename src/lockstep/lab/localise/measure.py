"""How far two tensors are apart, and how far rounding can take them.

Three comparisons, the strictest first. Values that are equal need no bound. The same step in float64 on both sides
shows what is computed, without the rounding of the run: there the sides may differ by what float64 rounds in so many
sums of such a length, and by no more. And each side against its own float64 values shows how much it rounds: in units
of its own dtype, two correct sides round about alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lockstep.lab.localise.probes import Box, Copies, Logical, farthest_place
from lockstep.lab.localise.stages import CLIPPED, GRADIENTS, REDUCED, UPDATE

State = Literal["equal", "rounding", "differs", "unknown"]

ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half the distance of neighbouring numbers, relative to them."""

_STEPS_OF_LAYER = 8
"""Sums one after another in a layer: two norms, four products, scores and their weighted sum."""
_SAFETY = 8.0
NEGLIGIBLE = 1e-3
"""A gradient this much smaller than the others is measured by their size: it may be zero but for rounding."""
_ALIKE = 64.0
"""How many times as much as the other one a side may round."""


@dataclass(frozen=True)
class Bounds:
    """What rounding can do in a model of these sizes; ``inner`` is the dtype of what a float64 pass computes in."""

    layers: int
    longest: int
    adam_eps: float = 1e-8
    inner: str = "float64"

    @classmethod
    def of(cls, config: Mapping[str, Mapping[str, Any]], inner: str = "float64") -> "Bounds":
        """Return the bounds of a resolved config."""
        model, tokens = (
            config["model"],
            (config["train"]["global_batch_size"] or 1) * (config["model"]["seq_length"] or 1),
        )
        sizes = [model[name] or 1 for name in ("hidden_size", "ffn_hidden_size", "vocab_size", "seq_length")]
        return cls(model["num_layers"] or 1, max(tokens, *sizes), float(config["optimizer"]["adam_eps"]), inner)

    def relative(self, stage: str, size: float = 0.0) -> float:
        """Return how far apart, relative to their size, float64 values of a stage may be; ``size`` is of gradients."""
        steps = _STEPS_OF_LAYER * self.layers + 2
        backward = stage in (GRADIENTS, REDUCED, CLIPPED, UPDATE)
        bound = _SAFETY * ROUNDOFF[self.inner] * math.sqrt(self.longest) * steps * (2 if backward else 1)
        if stage == UPDATE:
            # Adam divides a gradient by its size plus epsilon: what is noise in a small one grows by as much.
            bound *= max(1.0, size / self.adam_eps)
        return min(bound, 1e-2)

    @property
    def alike(self) -> float:
        """How many times as many units as the other one a side may round; long sums round more in one dtype."""
        return max(_ALIKE, 4 * math.sqrt(self.longest))


@dataclass(frozen=True)
class Where:
    """The element that is farthest apart, its values, and the processes and micro-batches that differ.

    ``a`` and ``b`` are of the two sides, or of two ``processes`` of one side that should have the same.
    """

    index: tuple[int, ...]
    a: float
    b: float
    side: str
    ranks: tuple[int, ...]
    micro_batches: tuple[int, ...]
    processes: tuple[int, int] | None = None


@dataclass(frozen=True)
class Row:
    """One tensor or number of the walk.

    Attributes:
        apart: difference of the runs relative to their size; None where there is nothing to compare.
        apart_in_float64: the same in float64.
        bound: how far apart rounding can take them in float64.
        units: by how many roundings of its dtype each side is off its own float64 values.
        reason: what decided, as a clause.
        where: the farthest element, of the comparison that decided.
    """

    iteration: int
    stage: str
    name: str
    state: State
    reason: str = ""
    apart: float | None = None
    apart_in_float64: float | None = None
    bound: float | None = None
    units: tuple[float, float] | None = None
    where: Where | None = None


@dataclass(frozen=True)
class Four:
    """A tensor of both sides, as they compute and in float64."""

    a: Logical
    b: Logical
    a64: Logical | None = None
    b64: Logical | None = None


def rms(tensor: Tensor) -> float:
    """Return the root of the mean square."""
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0


def relative(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """Return the distance of two tensors relative to the larger one; infinite if one has a NaN or another shape."""
    if a.shape != b.shape:
        return math.inf
    if torch.equal(a, b):
        return 0.0
    distance = rms(a.double() - b.double())
    size = max(rms(a), rms(b), floor)
    return math.inf if math.isnan(distance) or size == 0 else distance / size


def units(run: Logical, twin: Logical, dtype: str, floor: float) -> float:
    """Return by how many roundings a run is off its float64 values."""
    return relative(run.whole, twin.whole, floor) / ROUNDOFF[dtype]


def farthest(a: Logical, b: Logical, tolerance: float) -> Where | None:
    """Return where two tensors are farthest apart, and which processes have boxes that are beyond ``tolerance``."""
    if a.whole.shape != b.whole.shape or a.whole.numel() == 0:
        return None
    index = farthest_place((a.whole.double() - b.whole.double()).abs())
    side, one, other = ("A", a, b) if len({x.rank for x in a.boxes}) > len({x.rank for x in b.boxes}) else ("B", b, a)
    beyond = _beyond(one, other, tolerance)
    ranks = tuple(sorted({box.rank for box in beyond}))
    micro = tuple(sorted({box.micro_batch for box in beyond if box.micro_batch is not None}))
    return Where(index, float(a.whole[index]), float(b.whole[index]), side, ranks, micro)


def rounded_at(a: Logical, b: Logical) -> Where:
    """Return where two tensors of one shape are farthest apart by rounding, which no process is the reason of."""
    index = farthest_place((a.whole.double() - b.whole.double()).abs())
    values = float(a.whole[index]), float(b.whole[index])
    return Where(index if a.whole.numel() > 1 else (), *values, "B", (), ())


def _beyond(one: Logical, other: Logical, tolerance: float) -> list[Box]:
    """Return the boxes of a tensor that are farther than ``tolerance`` from another one; none of a sum."""
    if len({box.term for box in one.boxes}) > 1:
        return []  # no process has it alone
    return [
        box
        for box in one.boxes
        if box.tensor.numel()
        and not bool(((box.tensor.double() - other.whole[box.place].double()).abs() <= tolerance).all())
    ]


def exact_row(iteration: int, stage: str, name: str, a: Logical, b: Logical) -> Row:
    """Compare values that have to be equal."""
    if a.whole.shape != b.whole.shape:
        reason = f"its shape is {_shape(a)} in A and {_shape(b)} in B"
        return Row(iteration, stage, name, "differs", reason, math.inf)
    for side, found in (("A", a), ("B", b)):
        if found.copies:
            reason, where = torn(side, found.copies[0], _beyond(found, b if side == "A" else a, 0.0))
            return Row(iteration, stage, name, "differs", reason, where=where)
    if torch.equal(a.whole, b.whole):
        return Row(iteration, stage, name, "equal", apart=0.0)
    share = float((a.whole != b.whole).double().mean())
    reason = "all of its values differ" if share == 1 else f"{share:.2%} of its values differ"
    return Row(iteration, stage, name, "differs", reason, relative(a.whole, b.whole), where=farthest(a, b, 0.0))


def four_row(
    iteration: int,
    stage: str,
    name: str,
    four: Four,
    bounds: Bounds,
    dtypes: tuple[str, str],
    *,
    floor: float = 0.0,
    size: float = 0.0,
    judge_units: bool = True,
) -> Row:
    """Compare a tensor of both sides as they compute and in float64.

    ``floor`` is the least size that differences are measured by, ``size`` that of gradients, for an update.
    ``judge_units`` is False where the sides began at different weights, so that their rounding cannot be told.
    """
    a, b, a64, b64 = four.a, four.b, four.a64, four.b64
    if a.whole.shape != b.whole.shape:
        return exact_row(iteration, stage, name, a, b)
    for side, found in (("A", a), ("B", b)):
        if not found.covered:
            return Row(iteration, stage, name, "unknown", f"no process of {side} tells all of it")
    apart = relative(a.whole, b.whole, floor)
    if a64 is None or b64 is None:
        state: State = "equal" if apart == 0 else "unknown"
        return Row(iteration, stage, name, state, "" if state == "equal" else "there is no float64 pass", apart)
    bound = bounds.relative(stage, size)
    exact = relative(a64.whole, b64.whole, floor)
    shown: dict[str, Any] = {"apart": apart, "apart_in_float64": exact, "bound": bound}
    for side, found in (("A", a64), ("B", b64)):
        scale = max(rms(found.whole), floor)
        apart_copies = next((c for c in found.copies if c.apart > bound * scale), None)
        if apart_copies is not None:
            reason, where = torn(side, apart_copies, _beyond(found, b64 if side == "A" else a64, bound * scale))
            return Row(iteration, stage, name, "differs", reason, where=where, **shown)
    if exact > bound:
        reason = f"in float64 the sides are {exact:.3g} of its size apart, where rounding explains {bound:.2g}"
        scale = max(rms(a64.whole), rms(b64.whole), floor)
        return Row(iteration, stage, name, "differs", reason, where=farthest(a64, b64, bound * scale), **shown)
    if apart == 0:
        return Row(iteration, stage, name, "equal", **shown)
    for number, (side, found) in enumerate((("A", a), ("B", b))):
        if dtypes[number] == "float16" and not bool(found.whole.isfinite().all()):
            reason, where = f"float16 overflowed in {side}", rounded_at(a, b)
            return Row(iteration, stage, name, "rounding", reason, where=where, **shown)
    found_units = units(a, a64, dtypes[0], floor), units(b, b64, dtypes[1], floor)
    shown["units"] = found_units
    low, high = sorted(found_units)
    if judge_units and high > bounds.alike * max(low, 1.0):
        side, number = ("A", 0) if found_units[0] > found_units[1] else ("B", 1)
        reason = (
            f"{side} is off its own float64 values by {high:.3g} roundings of {dtypes[number]}, the other side by "
            f"{low:.2g}: something in it is computed in a lower precision"
        )
        return Row(iteration, stage, name, "differs", reason, where=farthest(a, b, 0.0), **shown)
    return Row(iteration, stage, name, "rounding", "the sides agree in float64", where=rounded_at(a, b), **shown)


def torn(side: str, copies: Copies, beyond: Sequence[Box] = ()) -> tuple[str, Where]:
    """Return the reason and the place where processes of one side have not what they should have alike.

    ``beyond`` are those of its boxes that are not what the other side has.
    """
    first, second = copies.ranks
    reason = f"processes {first} and {second} of {side} should have the same and are {copies.apart:.3g} apart"
    ranks = tuple(sorted({box.rank for box in beyond}))
    if not ranks or set(ranks) >= {first, second}:
        ranks = (first, second)
    return reason, Where(copies.index, *copies.values, side, ranks, (), copies.ranks)


def _shape(found: Logical) -> str:
    return str(list(found.whole.shape))
