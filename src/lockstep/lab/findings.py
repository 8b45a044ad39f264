"""Everything a comparison found, and which setting can have caused what."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.lab.calibration.band import Band
from lockstep.lab.config_diff import ConfigDifference
from lockstep.lab.dormant import COMPUTE, DATA, EVALUATION, INIT, LENGTH, SCHEDULE, UPDATE
from lockstep.lab.numbers import Mismatch, Numbers, evaluation_name
from lockstep.lab.side import Pairs, Side
from lockstep.lab.spans import spans
from lockstep.lab.stages import Stage


@dataclass(frozen=True)
class Findings:
    """The walk's results. ``differences`` is None where a side states no config; ``band_of`` is whose band is used."""

    a: Side
    b: Side
    pairs: Pairs
    printed: bool
    differences: list[ConfigDifference] | None
    data: Stage
    init: Stage
    schedule: Stage
    numbers: Numbers
    ledger: Stage
    band: Band | None = None
    band_of: str = ""

    @property
    def active(self) -> list[ConfigDifference]:
        """Settings that differ and act in both runs."""
        return [d for d in self.differences or [] if d.role == "active"]

    @property
    def missing(self) -> bool:
        """An iteration or an evaluation is not there on one side, or on both in the middle of their curves."""
        return bool(
            self.pairs.missing_a
            or self.pairs.missing_b
            or self.numbers.missing_evaluations["A"]
            or self.numbers.missing_evaluations["B"]
        )

    @property
    def anchor(self) -> Mismatch | None:
        """The mismatch that asks for an explanation: the first outside the band, else the last one inside."""
        return self.numbers.first_outside or (self.numbers.mismatches[-1] if self.numbers.mismatches else None)

    @property
    def partial(self) -> bool:
        """Settings are compared as far as a log prints them."""
        return self.differences is not None and (self.a.run is None or self.b.run is None)

    @property
    def other_masks(self) -> bool:
        """Both sides drop, and draw their masks apart: data-parallel processes and pipeline stages have their own."""
        config = [side.config or {} for side in (self.a, self.b)]
        layouts = [(side.fact("features") or {}).get("layout") or {} for side in (self.a, self.b)]
        axes = ("data_parallel", "pipeline_parallel")
        return all(_drops(each) for each in config) and any(layouts[0].get(x) != layouts[1].get(x) for x in axes)

    def unknown(self) -> list[str]:
        """Name what the sides do not tell of the contract."""
        names = ["config"] if self.differences is None else ["the rest of the config"] if self.partial else []
        return names + [stage.name for stage in (self.data, self.init, self.schedule) if stage.state == "unknown"]

    def explaining(self, part: str) -> list[ConfigDifference]:
        """Return the active differences that can change one part of a run directly."""
        return [d for d in self.active if part in d.reach]

    def causes(self) -> list[ConfigDifference]:
        """Return the settings that can have caused what was found, in the order of the tree."""
        return [d for d in self.differences or [] if self._causes_something(d)]

    def ruled_out(self) -> list[ConfigDifference]:
        """Return active differences that can have caused nothing of what was found."""
        return [d for d in self.active if not self._causes_something(d)]

    def _causes_something(self, difference: ConfigDifference) -> bool:
        if LENGTH in difference.reach and (self.pairs.missing_a or self.pairs.missing_b):
            return True  # Also those without effect on numbers, such as an early exit.
        if difference.role != "active":
            return False
        for part, stage in ((DATA, self.data), (INIT, self.init), (SCHEDULE, self.schedule)):
            if stage.state == "differs" and part in difference.reach:
                return True
        missing = self.numbers.missing_evaluations
        if EVALUATION in difference.reach and (missing["A"] or missing["B"]):
            return True
        return self.anchor is not None and self.can_cause(difference, self.anchor)

    def can_cause(self, difference: ConfigDifference, mismatch: Mismatch) -> bool:
        """Tell whether a setting can have caused a mismatch: through which part of the run, and early enough."""
        parts = difference.reach
        evaluated = mismatch.key is not None
        # A loss shows the updates of earlier iterations, an evaluation also that of its own.
        updates = mismatch.iteration if evaluated else mismatch.iteration - 1
        first = min((side.first for side in (self.a, self.b) if side.first is not None), default=1)
        checks = (
            COMPUTE in parts,
            DATA in parts and (evaluated or _may_act(self.data, mismatch.iteration)),
            INIT in parts and self.init.state != "equal",
            SCHEDULE in parts and _may_act(self.schedule, updates),
            UPDATE in parts and updates >= first and self._update_acts(difference),
            EVALUATION in parts and evaluated,
        )
        return any(checks)

    def _update_acts(self, difference: ConfigDifference) -> bool:
        """Clipping thresholds that no gradient norm reached have done nothing."""
        if difference.path != "optimizer.clip_grad":
            return True
        limits = [value for value in (difference.a, difference.b) if isinstance(value, int | float) and value > 0]
        norms = [norm for row in self.numbers.rows for norm in (row.norm_a, row.norm_b)]
        return any(norm is None or math.isnan(norm) or norm >= min(limits) for norm in norms) or not norms

    def missing_text(self) -> str:
        """Say which iterations are missing where; empty if none."""
        a, b = set(self.pairs.missing_a), set(self.pairs.missing_b)
        parts = []
        for label, missing in (("A", a - b), ("B", b - a), ("A and B", a & b)):
            if missing:
                parts.append(f"{spans(sorted(missing))} missing in {label}")
        return "; ".join(parts)

    def missing_evaluations_text(self) -> str:
        """Say which evaluations are missing where; empty if none."""
        parts = []
        for label, keys in self.numbers.missing_evaluations.items():
            if keys:
                more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                verb = "are" if len(keys) > 1 else "is"
                parts.append(f"the {evaluation_name(keys[0])}{more} {verb} missing in {label}")
        return "; ".join(parts)


def _drops(config: Mapping[str, Any]) -> bool:
    """Tell whether a run has dropout anywhere."""
    adapters = config.get("peft.dropout") if config.get("peft.scheme") else 0.0
    return any(config.get(f"model.{name}_dropout") for name in ("hidden", "attention")) or bool(adapters)


def _may_act(stage: Stage, latest: int) -> bool:
    if stage.state != "differs":
        return stage.state == "unknown"
    return stage.first is None or stage.first <= latest
