"""The verdict: one word, one sentence of cause, and what to do next."""

import math
import shlex
from dataclasses import dataclass
from typing import Literal

from lockstep.lab.bands import bf16_ulp
from lockstep.lab.config_diff import ConfigDifference, show
from lockstep.lab.dormant import DATA, INIT, SCHEDULE
from lockstep.lab.findings import Findings
from lockstep.lab.flips import beyond_flips, command, may_be_flips, reach
from lockstep.lab.numbers import LOSS, NORM, Mismatch
from lockstep.lab.side import Side
from lockstep.lab.stages import Stage

Verdict = Literal["identical", "rounding", "config", "data", "init", "schedule", "bug", "cannot tell"]

_NAMED_KEYS = 3


@dataclass(frozen=True)
class Decision:
    """``cause`` is one sentence; ``next_step`` is what to do now, empty where nothing is left to do."""

    verdict: Verdict
    cause: str
    next_step: str = ""


def decide(found: Findings) -> Decision:
    """Name the first cause that explains what was found; a side that contradicts itself proves nothing equal."""
    decision = _decide(found)
    side = next((side for side in (found.a, found.b) if side.conflict), None)
    return (
        decision if side is None or decision.verdict not in ("identical", "rounding") else _contradicts(side, decision)
    )


def _contradicts(side: Side, decision: Decision) -> Decision:
    kind = "equal" if decision.verdict == "identical" else "inside the band"
    return Decision(
        "cannot tell",
        f"In {side.label}, {side.conflict}, before and after a resume; with the later numbers everything is {kind}.",
        "Split the file where the run resumes, and compare the parts.",
    )


def _decide(found: Findings) -> Decision:
    numbers = found.numbers
    if not numbers.compared:
        return _nothing_shared(found)
    stages = {DATA: found.data, INIT: found.init, SCHEDULE: found.schedule}
    differing = [(part, stage) for part, stage in stages.items() if stage.state == "differs"]
    made_alike = found.ledger.state != "differs" or found.active
    if not differing and not numbers.mismatches and not found.missing and made_alike:
        return _identical(found)
    for part, stage in differing:
        if not found.explaining(part):
            return _unexplained(found, part, stage)
    causes = found.causes()
    outside = numbers.first_outside
    if outside and not any(found.can_cause(d, outside) for d in causes):
        if found.unknown():
            return _unknown_cause(found, outside)
        if found.other_masks:
            return _masks_apart(outside)
        return _flipped(found, outside) or _bug(found, outside)
    if causes:
        return _config(found, causes)
    if found.missing:
        return _incomplete(found)
    if found.ledger.state == "differs" and not found.active:
        return _made_otherwise(found)
    if found.other_masks:
        return _masks_apart(numbers.mismatches[0])
    return _too_wide(found) or _rounding(found)


def _nothing_shared(found: Findings) -> Decision:
    a, b = (_extent(side.points) for side in (found.a, found.b))
    cause = f"A and B have no iteration and no evaluation in common (A has {a}, B has {b})."
    if found.active:
        cause = f"{cause[:-1]}; their configs differ in {_keys(found.active)}."
    return Decision(
        "cannot tell", cause, "Run both over the same iterations, with --log-interval 1, and compare again."
    )


def _extent(points: dict) -> str:
    return f"iterations {min(points)} to {max(points)}" if points else "no iterations"


def _identical(found: Findings) -> Decision:
    numbers = found.numbers
    iterations, evaluations = len(numbers.rows), len(numbers.evaluations)
    counted = [f"{n} {noun}" for n, noun in ((iterations, "iterations"), (evaluations, "evaluations")) if n]
    how = "equal to the printed digits" if found.printed else "bitwise equal"
    cause = f"Every loss and gradient norm of {' and '.join(counted)} is {how}"
    if found.active:
        cause += f", although the configs differ in {_keys(found.active)}"
    stopped = _stopped(found)
    if stopped:
        cause += f", as far as they go ({stopped})"
    return Decision("identical", cause + ".")


def _stopped(found: Findings) -> str:
    """Say which sides are records of runs that did not come to their end; empty if none."""
    return ", ".join(
        f"{side.label} is {side.run.status}"
        for side in (found.a, found.b)
        if side.run and side.run.status != "finished"
    )


def _unexplained(found: Findings, part: str, stage: Stage) -> Decision:
    """A part of the contract differs and no setting explains it."""
    outside = found.numbers.first_outside
    early = outside is not None and part == SCHEDULE and stage.first is not None and outside.iteration <= stage.first
    if early and outside and found.unknown():
        # Two logs: the numbers part before the schedule can act, so that it is not the cause.
        return _unknown_cause(found, outside)
    same = "the configs agree" if found.differences is not None else "the configs are not known"
    if found.partial:
        same = "the settings that both tell agree"
    if found.active:
        same = f"no setting that differs explains it ({_keys(found.active)})"
    then = f"; {_spread(found)}" if found.numbers.rows else ""
    if early:
        then += ", earlier than the schedule can explain"
    next_steps: dict[str, str] = {
        DATA: "Compare the data files and the sample order: run `lockstep data verify` on both, and check dataset "
        "paths and seeds with `lockstep inspect`.",
        INIT: "Check the seed, the device that drew the weights and any checkpoint that was loaded with "
        "`lockstep inspect`; `--use-cpu-initialization` draws the same weights on every device.",
        SCHEDULE: "Compare the learning-rate settings of both runs: --lr, --min-lr, the decay style, warm-up and decay "
        "lengths, and the batch sizes.",
    }
    verdict: dict[str, Verdict] = {DATA: "data", INIT: "init", SCHEDULE: "schedule"}
    return Decision(verdict[part], f"{_capital(stage.detail)}, and {same}{then}.", next_steps[part])


def _config(found: Findings, causes: list[ConfigDifference]) -> Decision:
    verb = "differs" if len(causes) == 1 else "differ"
    parts = [f"{_keys(causes)} {verb}"]
    if found.numbers.rows:
        parts.append(_spread(found))
    missing = "; ".join(text for text in (found.missing_text(), found.missing_evaluations_text()) if text)
    if missing:
        parts.append(missing)
    change = " ".join(_setting(d) for d in causes[:_NAMED_KEYS])
    return Decision(
        "config", f"{parts[0]}: {'; '.join(parts[1:])}.", f"Give B the settings of A ({change}) and compare again."
    )


def _setting(difference: ConfigDifference) -> str:
    return f"{difference.path}={show(difference.a)}"


def _flipped(found: Findings, outside: Mismatch) -> Decision | None:
    """Where a choice that flipped explains the size of every difference, only a measured band can tell."""
    chooses = may_be_flips(found)
    if chooses is None:
        return None
    cause = (
        f"{_capital(_apart(outside))}; but {chooses}, a choice that flips can take it {reach(found, outside):g} "
        "times as far, and no band was measured."
    )
    return Decision(
        "cannot tell", cause, f"Measure what rounding does to this run, `{command(found)}`, and compare again."
    )


def _bug(found: Findings, outside: Mismatch) -> Decision:
    outside = beyond_flips(found) or outside  # A choice that flipped can be the reason of those before it.
    cannot = found.active
    same = "Config, data, initial weights and schedule are equal"
    if cannot:
        same = f"The configs differ only in {_keys(cannot)}, which cannot have caused this"
    ledger = [found.ledger.detail] if found.ledger.state == "differs" else found.ledger.evidence
    cause = f"{same}, but {'; '.join([_apart(outside), *ledger])}."
    return Decision("bug", cause, _where_to_look(found, outside))


def _masks_apart(outside: Mismatch) -> Decision:
    cause = f"{_capital(_apart(outside))}; both have dropout, and layouts that draw other masks."
    return Decision("cannot tell", cause, "Run both with dropout 0 and compare again.")


def _made_otherwise(found: Findings) -> Decision:
    cause = f"Config, data, initial weights and schedule are equal, but {found.ledger.detail}."
    return Decision("bug", cause, "Look first at what counts tokens and divides losses.")


def _too_wide(found: Findings) -> Decision | None:
    """Where a measured band has grown as wide as a difference that would else be outside, nothing can be told."""
    inside = [m for m in found.numbers.mismatches if m.measured and m.grade == "inside"]
    hidden = [m for m in inside if m.size > reach(found, m) * m.unmeasured_band]
    if not hidden:
        return None
    first = hidden[0]
    cause = (
        f"{_capital(first.spelled)} differs by {first.size:.3g}, but rounding was measured to take it as far as "
        f"{first.band:.3g} by then: the band is as wide as the difference."
    )
    return Decision(
        "cannot tell",
        cause,
        f"Compare iterations before {first.iteration}, where the band is narrow: `lockstep localise` runs both again "
        "with probes on; or run both in float32, or with a lower learning rate.",
    )


def _where_to_look(found: Findings, outside: Mismatch) -> str:
    """Point at the step of training whose result is the first to be wrong."""
    first = min(row.iteration for row in found.numbers.rows) if found.numbers.rows else 0
    if outside.key:
        place = "evaluation: every training loss before it is inside the band"
    elif outside.what == NORM:
        place = (
            f"the backward pass of iteration {outside.iteration}: its loss is inside the band, its gradients are not"
        )
    elif outside.iteration == first:
        place = f"the forward pass: the loss of iteration {first} comes before any update"
    else:
        place = f"the update of iteration {outside.iteration - 1} and earlier: the losses up to it are inside the band"
    text = f"Look first at {place}; the notes name the code, packages and devices that differ."
    if not outside.key and found.a.run and found.b.run:
        paths = " ".join(shlex.quote(str(side.path)) for side in (found.a, found.b))
        text += f" `lockstep localise {paths}` runs both again and names the first tensor that differs."
    return text


def _unknown_cause(found: Findings, outside: Mismatch) -> Decision:
    cause = f"{_capital(_apart(outside))}, and {_list(found.unknown())} cannot be compared."
    return Decision("cannot tell", cause, _record_both(found))


def _record_both(found: Findings) -> str:
    """Say how to make known what is not; another trainer that was run on purpose is not replaced by Lockstep."""
    logs = [side.label for side in (found.a, found.b) if side.run is None]
    if found.a.engine or found.b.engine:
        return _of_an_engine(found)
    if not logs:
        return "Run both again with this version of Lockstep and compare the run directories."
    return (
        f"Run {' and '.join(logs)} with Lockstep (`lockstep pretrain-gpt <flags>` or `lockstep train --recipe ...`) "
        "and compare the run directories, which hold config, token hashes and initial weights."
    )


def _of_an_engine(found: Findings) -> str:
    """Say what is left where one side is another trainer's own run, of which no record is to be had."""
    outside = found.numbers.first_outside
    if outside is None:
        return ""
    config = next((side.config for side in (found.a, found.b) if side.run and side.config), {})
    again = []
    if any(config.get(f"model.{name}_dropout") for name in ("attention", "hidden")):
        again.append("with --attention-dropout 0 --hidden-dropout 0")
    if low := [flag for flag in ("bf16", "fp16") if config.get(f"mixed_precision.{flag}")]:
        again.append(f"without --{low[0]}")
    look = _where_to_look(found, outside)
    if not again:
        return look
    return f"Run both again {' and '.join(again)}; if they still part: {look[:1].lower()}{look[1:]}"


def _incomplete(found: Findings) -> Decision:
    texts = [text for text in (found.missing_text(), found.missing_evaluations_text()) if text]
    rest = "every number that both have is equal" if not found.numbers.mismatches else _spread(found)
    stopped = _stopped(found)
    status = f" ({stopped})" if stopped else ""
    return Decision(
        "cannot tell",
        f"{_capital('; '.join(texts))}{status}, while {rest}.",
        "Run both to the same iteration, with the same --log-interval, and compare again.",
    )


def _rounding(found: Findings) -> Decision:
    losses = [m for m in found.numbers.mismatches if m.what == LOSS]
    norms = [m for m in found.numbers.mismatches if m.what == NORM]
    parts = []
    if losses:
        worst = max(losses, key=lambda m: m.size)
        parts.append(
            f"losses differ first at iteration {losses[0].iteration} and by at most {worst.size:.3g} "
            f"(iteration {worst.iteration}), inside {_rule(worst)} ({worst.band:.6g})"
        )
    if norms:
        worst = max(norms, key=lambda m: m.size / m.band if m.band else 0.0)
        parts.append(
            f"gradient norms differ by at most {worst.size:.3g} (iteration {worst.iteration}), "
            f"inside {_rule(worst)} ({worst.band:.6g})"
        )
    measured = f"the band was measured on {found.band_of}" if found.band else "no band was measured"
    unknown = f"; {_list(found.unknown())} cannot be compared" if found.unknown() else ""
    cause = f"{_capital(' and '.join(parts))}; {measured}{unknown}."
    return Decision("rounding", cause, _record_both(found) if unknown else "")


def _spread(found: Findings) -> str:
    """Say through which iteration the losses are equal, how far they part after it, and how much that is."""
    losses = found.numbers.losses()
    if not losses:
        others = found.numbers.mismatches
        return "every training loss is equal" + (f", {others[0].spelled} is the first to differ" if others else "")
    earlier = [row.iteration for row in found.numbers.rows if row.iteration < losses[0].iteration]
    finite = [m for m in losses if math.isfinite(m.size)]
    start = f"losses are equal through iteration {earlier[-1]}" if earlier else "losses differ from the first iteration"
    if not finite:
        return f"{start} and {_apart(losses[0])}"
    worst = max(finite, key=lambda m: m.size)
    ulp = bf16_ulp(min(abs(worst.a or 0.0), abs(worst.b or 0.0)))
    ratio = worst.size / ulp if ulp else math.inf
    scale = (
        f"below one BF16 ulp of the loss ({ulp:.6g})"
        if ratio < 1
        else f"{ratio:.1f} times one BF16 ulp of the loss ({ulp:.6g})"
    )
    after = " after it" if earlier else ""
    spread = f"{start} and differ by at most {worst.size:.3g}{after} (at iteration {worst.iteration}), {scale}"
    bad = next((m for m in losses if not math.isfinite(m.size)), None)
    return f"{spread}, and {_apart(bad)}" if bad else spread


def _apart(m: Mismatch) -> str:
    """Say how one number differs: ``lm_loss at iteration 3 is 10.1 in A and 10.2 in B, 0.1 apart, more than ...``."""
    a, b = _value(m.a), _value(m.b)
    if a == b == "NaN":
        return f"{m.spelled} is NaN in both, and NaN never equals NaN"
    text = f"{m.spelled} is {a} in A and {b} in B"
    if not math.isfinite(m.size) or m.grade != "outside":
        return text
    if not m.band:
        return text
    return f"{text}, {m.size:.3g} apart, more than {_rule(m)} ({m.band:.6g})"


def _rule(m: Mismatch) -> str:
    if m.measured:
        return "the measured band"
    if m.float32:
        return "what float32 explains by then"
    return "half a BF16 ulp of the loss" if m.what == LOSS else "one BF16 ulp of the norm"


def _value(value: float | None) -> str:
    if value is None:
        return "missing"
    return "NaN" if isinstance(value, float) and math.isnan(value) else f"{value:.9g}"


def _keys(differences: list[ConfigDifference]) -> str:
    named = _list([str(d) for d in differences[:_NAMED_KEYS]])
    more = len(differences) - _NAMED_KEYS
    return f"{', '.join(str(d) for d in differences[:_NAMED_KEYS])} and {more} more" if more > 0 else named


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _capital(text: str) -> str:
    """Start a sentence; a dotted key or a number's name keeps its spelling."""
    return text if text.partition(" ")[0].count("_") else text[:1].upper() + text[1:]
