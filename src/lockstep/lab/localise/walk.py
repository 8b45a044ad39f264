"""The walk over the probes of two sides: every stage in the order of execution, and the first that differs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lockstep.lab.config_diff import ABSENT, ConfigDifference, config_differences
from lockstep.lab.localise import stages
from lockstep.lab.localise.active import disagreements
from lockstep.lab.localise.measure import (
    NEGLIGIBLE,
    Bounds,
    Four,
    Row,
    State,
    Where,
    exact_row,
    four_row,
    relative,
    rms,
    torn,
)
from lockstep.lab.localise.probes import Logical, Probes
from lockstep.record.schema import encode

NOT_LOOKED_AT = "not looked at: an earlier stage differs"
_SURROUNDINGS = ("code", "packages", "device", "environment")
_HOST = ("LOCAL_WORLD_SIZE", "WORLD_SIZE")
_WHERE_CODE_IS = "PYTHONPATH"  # the commit says more


@dataclass(frozen=True)
class Code:
    """The code that a side ran by; ``commit`` is None where it is in none, as in an installed package."""

    commit: str | None
    dirty: bool = False

    def __str__(self) -> str:
        return f"{(self.commit or 'unknown')[:12]}{' with local changes' if self.dirty else ''}"


@dataclass(frozen=True)
class Pass:
    """A side: what it saw as it computes and in float64; ``foreign`` where it is no run of Lockstep."""

    label: str
    title: str
    run: Probes
    twin: Probes
    foreign: bool = False

    @property
    def dtype(self) -> str:
        """The dtype that it computes in."""
        return str(self.run.facts["dtype"])

    @property
    def code(self) -> Code:
        """The code that ran it, as its processes tell."""
        told = self.run.facts.get("code") or {}
        return Code(told.get("commit"), bool(told.get("dirty")))


@dataclass(frozen=True)
class StageResult:
    """What a stage of an iteration came to; ``iteration`` is None for those of the whole run."""

    iteration: int | None
    stage: str
    state: State
    detail: str
    rows: list[Row] = field(default_factory=list)

    @property
    def walked(self) -> bool:
        """Whether it was looked at: what comes after the first difference follows from it."""
        return self.detail != NOT_LOOKED_AT


@dataclass(frozen=True)
class Walked:
    """All stages that were walked, with the settings that differ and the first difference."""

    a: Pass
    b: Pass
    results: list[StageResult]
    differences: list[ConfigDifference]

    @property
    def first(self) -> Row | None:
        """The first tensor or number that rounding does not explain.

        Between two codes a setting that only one of them follows is no more than a hint where a tensor differs.
        """
        rows = [row for row in self._rows() if row.state == "differs"]
        behind = [row for row in rows if row.stage != stages.FEATURES] if self.two_codes else []
        return next(iter(behind or rows), None)

    @property
    def hints(self) -> list[Row]:
        """Settings that only one of two codes follows, beside a tensor that differs."""
        first = self.first
        if first is None or first.stage == stages.FEATURES:
            return []
        return [row for row in self._rows() if row.stage == stages.FEATURES and row.state == "differs"]

    @property
    def two_codes(self) -> bool:
        """Whether the sides ran by different code."""
        return not self.b.foreign and self.a.code != self.b.code

    @property
    def begins(self) -> Row | None:
        """The first that is not equal bit for bit."""
        return next((row for row in self._rows() if row.state in ("differs", "rounding")), None)

    def _rows(self) -> Iterator[Row]:
        return (row for result in self.results for row in result.rows)


def walk(a: Pass, b: Pass, iterations: Sequence[int]) -> Walked:
    """Compare everything that both sides tell, to the end of the stage in which the first difference lies."""
    differences = []
    if not b.foreign:
        differences = config_differences(_flat(a.run), _flat(b.run), {}, {})
        if a.code != b.code:  # what only one commit can be told is a part of the difference of the code
            differences = [d for d in differences if ABSENT not in (d.a, d.b)]
    results = [_environment(a, b), _config(a, b, differences), _features(a, b)]
    walker = _Walker(a, b, any(d.role == "active" for d in differences))
    for iteration in iterations:
        for stage in stages.ITERATION:
            passed = (stages.FEATURES,) if a.code != b.code else ()
            if any(r.state == "differs" for result in results if result.stage not in passed for r in result.rows):
                results.append(StageResult(iteration, stage, "unknown", NOT_LOOKED_AT))
                continue
            rows = walker.rows(iteration, stage)
            results.append(StageResult(iteration, stage, *_summary(stage, rows), rows))
    return Walked(a, b, results, differences)


def same_streams(a: Pass, b: Pass) -> bool:
    """Tell whether both sides draw the same dropout masks: data-parallel processes and stages have their own."""
    layouts = [side.run.facts["layout"] for side in (a, b)]
    micro = [side.run.facts["config"]["train"]["micro_batch_size"] for side in (a, b)]
    axes = ("data_parallel", "pipeline_parallel")
    return micro[0] == micro[1] and all(layouts[0][axis] == layouts[1][axis] for axis in axes)


def drops(side: Pass) -> bool:
    """Tell whether a side has dropout anywhere."""
    config = side.run.facts["config"]
    chances = [config["model"]["hidden_dropout"], config["model"]["attention_dropout"]]
    adapters = config.get("peft", {})
    return max(*chances, adapters.get("dropout") or 0.0 if adapters.get("scheme") else 0.0) > 0


def _flat(probes: Probes) -> dict[str, Any]:
    config = probes.facts["config"]
    return {f"{section}.{key}": encode(value) for section, values in config.items() for key, value in values.items()}


def _environment(a: Pass, b: Pass) -> StageResult:
    found = []
    for entry in _SURROUNDINGS:
        one, other = a.run.facts.get(entry) or {}, b.run.facts.get(entry) or {}
        keys = [
            key
            for key in dict.fromkeys([*one, *other])
            if one.get(key) != other.get(key) and key not in (*_HOST, _WHERE_CODE_IS)
        ]
        found += [f"{key} {one.get(key)} against {other.get(key)}" for key in keys]
    if b.foreign:
        return StageResult(None, stages.ENVIRONMENT, "equal", "both were run here")
    state: State = "rounding" if found else "equal"
    return StageResult(None, stages.ENVIRONMENT, state, "; ".join(found) or "code, packages and device are equal")


def _config(a: Pass, b: Pass, differences: list[ConfigDifference]) -> StageResult:
    if b.foreign:
        return StageResult(None, stages.CONFIG, "equal", f"{b.title} takes the settings of A")
    acting = [str(d) for d in differences if d.role == "active"]
    layout = [str(d) for d in differences if d.role != "active" and d.path.startswith(("model.", "ddp.", "dist."))]
    if acting:
        return StageResult(None, stages.CONFIG, "rounding", f"settings that act: {', '.join(acting)}")
    return StageResult(None, stages.CONFIG, "equal", "every setting that acts is equal" + _also(layout))


def _also(layout: list[str]) -> str:
    return f"; layout: {', '.join(layout)}" if layout else ""


def _features(a: Pass, b: Pass) -> StageResult:
    found = [
        (side.label, text)
        for side in (a, b)
        if not side.foreign
        for text in disagreements(side.run.facts["active"], side.run.facts["config"])
    ]
    rows = []
    told = [text for _, text in found]
    if a.code != b.code:  # what both codes do alike tells nothing of their difference
        found = [(who, text) for who, text in found if told.count(text) == 1]
    for who, text in found:
        name, _, reason = text.partition(": ")
        rows.append(Row(0, stages.FEATURES, name, "differs", f"{reason} of {who}"))
    alike = "what is not active is so on both sides" if told else "what is asked for is active"
    detail = "; ".join(f"{who}: {text}" for who, text in found) or alike
    return StageResult(None, stages.FEATURES, "differs" if rows else "equal", detail, rows)


_NOTHING = {
    stages.STATE: "B takes that of A",
    stages.AFTER: "the optimizers update the models' own weights",
}


def _summary(stage: str, rows: list[Row]) -> tuple[State, str]:
    if not rows:
        return ("equal", _NOTHING[stage]) if stage in _NOTHING else ("unknown", "nothing to compare")
    wrong = [row for row in rows if row.state == "differs"]
    if wrong:
        return "differs", f"{wrong[0].name}: {wrong[0].reason}"
    unknown = [row for row in rows if row.state == "unknown"]
    rounded = [row for row in rows if row.state == "rounding"]
    if len(rows) == 1 and rounded and rounded[0].apart_in_float64 is not None:
        row = rounded[0]
        return "rounding", f"{row.apart:.2g} of its size apart, in float64 {row.apart_in_float64:.2g}"
    if rounded:
        far = max(rounded, key=lambda row: row.apart or 0.0)
        exact = max((row.apart_in_float64 or 0.0 for row in rounded), default=0.0)
        text = (
            f"{len(rounded)} of {len(rows)} differ from {rounded[0].name} on, by at most {far.apart:.2g} of their size"
        )
        return "rounding", text + (f", in float64 by {exact:.2g}" if exact else "")
    if unknown:
        return "unknown", f"{unknown[0].name}: {unknown[0].reason}"
    return "equal", f"{len(rows)} equal bit for bit"


class _Walker:
    """Compares the stages of an iteration."""

    def __init__(self, a: Pass, b: Pass, acting: bool) -> None:
        self._a, self._b, self._acting = a, b, acting
        inner = str(b.twin.facts.get("inner", "float64"))
        self._bounds = Bounds.of(a.run.facts["config"], inner)
        self._dtypes = (a.dtype, b.dtype)
        self._same_start: dict[int, bool] = {}
        self._flipped = False
        self._chosen_alike: torch.Tensor | None = None

    def rows(self, iteration: int, stage: str) -> list[Row]:
        """Return the rows of a stage in the order of execution."""
        compare = {
            stages.DATA: self._data,
            stages.WEIGHTS: self._weights,
            stages.STATE: self._state,
            stages.SCHEDULE: self._schedule,
            stages.LOSS: self._loss,
            stages.NORM: self._norm,
            stages.UPDATE: self._update,
            stages.AFTER: self._after,
        }.get(stage)
        return list(compare(iteration) if compare else self._tensors(iteration, stage))

    def _shared(self, iteration: int, stage: str) -> list[str]:
        theirs = set(self._b.run.names(iteration, stage))
        return stages.in_order(stage, [name for name in self._a.run.names(iteration, stage) if name in theirs])

    def _pair(self, iteration: int, stage: str, name: str) -> tuple[Logical, Logical]:
        one, other = self._a.run.logical(iteration, stage, name), self._b.run.logical(iteration, stage, name)
        assert one is not None, f"A has {name}"
        assert other is not None, f"B has {name}"
        return one, other

    def _four(self, iteration: int, stage: str, name: str) -> Four:
        twins = self._a.twin.logical(iteration, stage, name), self._b.twin.logical(iteration, stage, name)
        return Four(*self._pair(iteration, stage, name), *twins)

    def _data(self, iteration: int) -> Iterator[Row]:
        names = [*self._a.run.names(iteration, stages.DATA), *self._b.run.names(iteration, stages.DATA)]
        for name in stages.in_order(stages.DATA, list(dict.fromkeys(names))):
            missing = [s.label for s in (self._a, self._b) if s.run.logical(iteration, stages.DATA, name) is None]
            if missing:
                yield Row(iteration, stages.DATA, name, "differs", f"{missing[0]} has none")
            else:
                yield exact_row(iteration, stages.DATA, name, *self._pair(iteration, stages.DATA, name))

    def _weights(self, iteration: int) -> Iterator[Row]:
        rows = [self._start_row(iteration, stages.WEIGHTS, name) for name in self._shared(iteration, stages.WEIGHTS)]
        self._same_start[iteration] = all(row.state == "equal" or row.reason.startswith("rounded") for row in rows)
        yield from self._missing(iteration, stages.WEIGHTS)
        yield from rows

    def _missing(self, iteration: int, stage: str) -> Iterator[Row]:
        one, other = (set(side.run.names(iteration, stage)) for side in (self._a, self._b))
        for name in sorted(one ^ other):
            yield Row(iteration, stage, name, "differs", f"only {'A' if name in one else 'B'} has it")

    def _start_row(self, iteration: int, stage: str, name: str) -> Row:
        """Compare what an iteration begins with: later ones inherit the rounding of those before."""
        one, other = self._pair(iteration, stage, name)
        row = exact_row(iteration, stage, name, one, other)
        if row.state == "equal" or one.whole.shape != other.whole.shape or one.copies or other.copies:
            return row
        for exact, low in ((one, other), (other, one)):
            if torch.equal(exact.whole.to(getattr(torch, low.dtype)).double(), low.whole):
                reason = f"rounded to {low.dtype} they are equal"
                return Row(iteration, stage, name, "rounding", reason, row.apart, where=row.where)
        if iteration == 1:
            return row
        if self._repeats:
            reason = "both sides repeat the same steps and have to begin with the same bits"
            return replace(row, reason=reason)
        for label, this, that in (("A", one, other), ("B", other, one)):
            if stage == stages.STATE and not bool(this.whole.any()) and bool(that.whole.any()):
                return replace(row, reason=f"it is zero in {label}")
        return replace(row, state="rounding", reason="left by the iterations before")

    @property
    def _repeats(self) -> bool:
        """Whether the sides are to do the same, operation by operation: one layout, dtype, device, and config."""
        facts = [side.run.facts for side in (self._a, self._b)]
        return not (self._b.foreign or self._acting) and all(
            facts[0].get(name) == facts[1].get(name) for name in ("layout", "dtype", "device", "packages")
        )

    def _state(self, iteration: int) -> Iterator[Row]:
        names = [side.run.number_names(iteration, stages.STATE) for side in (self._a, self._b)]
        for name in names[0]:
            if not name.startswith(stages.STREAM) or same_streams(self._a, self._b):
                yield from self._number(iteration, stages.STATE, name)
        if not self._b.foreign and same_streams(self._a, self._b) and drops(self._a) and drops(self._b):
            for name in dict.fromkeys([*names[0], *names[1]]):
                if not name.startswith(stages.STREAM) or (name in names[0] and name in names[1]):
                    continue
                reason = f"only {'A' if name in names[0] else 'B'} has it"
                yield Row(iteration, stages.STATE, name, "differs", reason)
        for name in self._shared(iteration, stages.STATE):
            yield self._start_row(iteration, stages.STATE, name)

    def _schedule(self, iteration: int) -> Iterator[Row]:
        names = stages.in_order(stages.SCHEDULE, self._a.run.number_names(iteration, stages.SCHEDULE))
        for name in names:
            if name == "loss scale" and self._dtypes[0] != self._dtypes[1]:
                continue
            yield from self._number(iteration, stages.SCHEDULE, name)

    def _number(self, iteration: int, stage: str, name: str) -> Iterator[Row]:
        one, other = self._a.run.number(iteration, stage, name), self._b.run.number(iteration, stage, name)
        if one is None or other is None:
            return
        for side in (self._a, self._b):
            copies = side.run.torn(iteration, stage, name)
            if copies is not None:
                reason, where = torn(side.label, copies)
                yield Row(iteration, stage, name, "differs", reason, where=where)
                return
        if one == other:
            yield Row(iteration, stage, name, "equal", apart=0.0)
            return
        apart = abs(one - other) / max(abs(one), abs(other))
        reason, where = f"it is {one:.9g} in A and {other:.9g} in B", Where((), one, other, "B", (), ())
        yield Row(iteration, stage, name, "differs", reason, apart, where=where)

    def _tensors(self, iteration: int, stage: str) -> Iterator[Row]:
        names = self._shared(iteration, stage)
        factors = self._scales(iteration) if stage == stages.GRADIENTS else (1.0, 1.0)
        floor = 0.0 if stage == stages.FORWARD else self._floor(iteration, stage, names) / factors[0]
        for name in names:
            four = _scaled(self._four(iteration, stage, name), factors)
            yield self._row(iteration, stage, name, four, floor=0.0 if name.startswith(stages.OUTPUT) else floor)

    def _scales(self, iteration: int) -> tuple[float, float]:
        """Return the loss scales, which gradients before their sum still have."""
        a, b = (side.run.number(iteration, stages.SCHEDULE, "loss scale") or 1.0 for side in (self._a, self._b))
        return a, b

    def _floor(self, iteration: int, stage: str, names: Sequence[str]) -> float:
        """Return the least size that gradients of parameters are measured by: some are zero but for rounding."""
        found = (self._a.run.logical(iteration, stage, name) for name in names if not name.startswith(stages.OUTPUT))
        return NEGLIGIBLE * max((rms(each.whole) for each in found if each is not None), default=0.0)

    def _row(self, iteration: int, stage: str, name: str, four: Four, **settings: float) -> Row:
        if name.endswith("router.experts"):
            row = self._experts(iteration, name, four)
        else:
            judge = self._same_start.get(iteration, False) and not self._flipped and stage != stages.UPDATE
            if name.endswith("router.weights") and self._chosen_alike is not None:
                four, judge = _only(four, self._chosen_alike), self._same_start.get(iteration, False)
            row = four_row(iteration, stage, name, four, self._bounds, self._dtypes, judge_units=judge, **settings)
        return row

    def _experts(self, iteration: int, name: str, four: Four) -> Row:
        """Compare which experts tokens go to: rounding may change it, but not in float64."""
        if four.a64 is None or four.b64 is None:
            return exact_row(iteration, stages.FORWARD, name, four.a, four.b)
        exact = exact_row(iteration, stages.FORWARD, name, four.a64, four.b64)
        if exact.state == "differs":
            return exact
        exact_choice = four.a64.whole
        # The weights of the first router with other choices can still be judged, where they are of the same experts.
        alike = torch.stack([each.whole == exact_choice for each in (four.a, four.b)]).all(dim=0).all(dim=-1)
        flips = not bool(alike.all())
        self._chosen_alike = alike if flips and not self._flipped else None
        self._flipped = self._flipped or flips
        row = exact_row(iteration, stages.FORWARD, name, four.a, four.b)
        if row.state == "equal":
            return row
        return Row(iteration, row.stage, name, "rounding", "the sides agree in float64", row.apart, where=row.where)

    def _loss(self, iteration: int) -> Iterator[Row]:
        scales = self._scales(iteration)
        for name in self._shared(iteration, stages.LOSS):
            four = self._four(iteration, stages.LOSS, name)
            if name == "divisor":
                four = _scaled(four, (1 / scales[0], 1 / scales[1]))
            if four.a.whole.shape == four.b.whole.shape:
                yield self._row(iteration, stages.LOSS, name, four)
            elif name != "divisor":
                yield self._row(iteration, stages.LOSS, f"{name}, all micro-batches", _totals(four))

    def _norm(self, iteration: int) -> Iterator[Row]:
        name = "gradient norm"
        numbers = [side.number(iteration, stages.NORM, name) for side in self._passes()]
        if None not in numbers:
            four = Four(
                *(_of_number(number, dtype) for number, dtype in zip(numbers, self._four_dtypes(), strict=True))
            )
            yield self._row(iteration, stages.NORM, name, four)

    def _passes(self) -> tuple[Probes, Probes, Probes, Probes]:
        return self._a.run, self._b.run, self._a.twin, self._b.twin

    def _four_dtypes(self) -> tuple[str, str, str, str]:
        return (*self._dtypes, "float64", "float64")

    def _update(self, iteration: int) -> Iterator[Row]:
        """Compare what the update added to each weight."""
        floor = NEGLIGIBLE * (self._a.run.number(iteration, stages.SCHEDULE, "lr") or 0.0)
        for name in self._shared(iteration, stages.MAIN):
            start = self._a.run.logical(iteration, stages.WEIGHTS, name)
            steps = [_step(side.run, iteration, name, None) for side in (self._a, self._b)]
            steps += [_step(side.twin, iteration, name, start) for side in (self._a, self._b)]
            grad = self._a.twin.logical(iteration, stages.CLIPPED, name)
            size = 0.0 if grad is None else rms(grad.whole)
            yield self._row(iteration, stages.UPDATE, name, Four(*steps), floor=floor, size=size)

    def _after(self, iteration: int) -> Iterator[Row]:
        """Check, side by side, that the model has the weights of its optimizer, rounded to its dtype."""
        for side in (self._a, self._b):
            if side.foreign:
                continue
            for name in stages.in_order(stages.AFTER, side.run.names(iteration, stages.AFTER)):
                main = side.run.logical(iteration, stages.MAIN, name)
                model = side.run.logical(iteration, stages.AFTER, name)
                if main is None or model is None:
                    continue
                wanted = main.whole.to(getattr(torch, model.dtype)).double()
                state: State = "equal" if torch.equal(wanted, model.whole) and not model.copies else "differs"
                reason = f"the model of {side.label} has not the weights that its optimizer made"
                apart = relative(wanted, model.whole)
                yield Row(iteration, stages.AFTER, name, state, reason if state == "differs" else "", apart)


def _scaled(four: Four, factors: Sequence[float]) -> Four:
    def one(found: Logical | None, factor: float) -> Any:
        if found is None or factor == 1.0:
            return found
        return Logical(found.whole / factor, found.dtype, found.boxes, found.covered, found.copies)

    return Four(*(one(found, factors[n % 2]) for n, found in enumerate((four.a, four.b, four.a64, four.b64))))


def _only(four: Four, tokens: torch.Tensor) -> Four:
    """Return weights of experts [b, s, k] without those of other tokens [b, s] and of assignments that are dropped."""
    sides = [found for found in (four.a, four.b, four.a64, four.b64) if found is not None]
    kept = tokens[..., None] & torch.stack([found.whole != 0 for found in sides]).all(dim=0)
    return Four(*(replace(found, whole=found.whole.where(kept, 0.0), boxes=()) for found in sides))


def _totals(four: Four) -> Four:
    def total(found: Logical | None) -> Any:
        return None if found is None else Logical(found.whole.sum()[None], found.dtype, (), found.covered)

    return Four(total(four.a), total(four.b), total(four.a64), total(four.b64))


def _of_number(number: float | None, dtype: str) -> Logical:
    return Logical(torch.tensor([number], dtype=torch.float64), dtype, (), True)


def _step(probes: Probes, iteration: int, name: str, start: Logical | None) -> Any:
    """Return what an update added to a weight; a pass in float64 began at ``start``."""
    after = probes.logical(iteration, stages.MAIN, name)
    before = start or probes.logical(iteration, stages.STATE, f"main.{name}")
    before = before or probes.logical(iteration, stages.WEIGHTS, name)
    if after is None or before is None:
        return None
    return Logical(after.whole - before.whole, after.dtype, after.boxes, after.covered, after.copies)
