"""From two sides to the first cause: which iterations, running both again, the walk, and the verdict over it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lockstep.lab.compare import Comparison, compare_paths
from lockstep.lab.config_diff import ConfigDifference
from lockstep.lab.dormant import COMPUTE, DATA, INIT, SCHEDULE, UPDATE
from lockstep.lab.localise import stages
from lockstep.lab.localise.code import verify
from lockstep.lab.localise.measure import Row, Where
from lockstep.lab.localise.sides import REFERENCE, TRANSFORMERS, Foreign, Rerun, from_checkpoint, run_again
from lockstep.lab.localise.walk import Pass, Walked, drops, same_streams, walk
from lockstep.lab.verdict import Verdict

_ELSEWHERE = "Packages, device or code are not those of the records: run both again as they are now, and localise those"
_LOST = "Commit the changes, run it once more, and localise that run."


@dataclass(frozen=True)
class Localised:
    """The outcome: the verdict with one sentence, and the walk it rests on."""

    verdict: Verdict
    sentence: str
    next_step: str
    walked: Walked
    iterations: list[int]
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 for ``identical`` and ``rounding``, 1 for every other verdict."""
        return 0 if self.verdict in ("identical", "rounding") else 1

    def processes(self, label: str) -> int:
        """Return how many processes a side has."""
        return _processes(self.walked, label)


def localise(
    a: Rerun,
    b: Rerun | Foreign,
    folder: Path,
    iterations: Sequence[int] | None = None,
    say: Callable[[str], None] = print,
    *,
    checkpoints: bool = False,
) -> Localised:
    """Run both sides again at the iterations in question and walk over what they show; probes go to ``folder``.

    With ``checkpoints`` a side begins at its newest checkpoint before them instead of at the start.

    Raises:
        UserError: a side cannot be run again.
    """
    found = _compared(a, b)
    chosen = sorted(set(iterations)) if iterations else in_question(a, b, found)
    first, second = folder / "a", folder / "b"
    if checkpoints:
        a = from_checkpoint(a, chosen[0])
        b = from_checkpoint(b, chosen[0]) if isinstance(b, Rerun) else b
    run_again(a, "A", chosen, first, None, say)
    if isinstance(b, Rerun):
        run_again(b, "B", chosen, second, first, say)
    else:
        say(f"[B] {b.kind}: the same steps with A's tokens, weights and optimizer state")
    told = judge(_passes(a, b, first, second, chosen), chosen, _unrepeated(a, b, first, second, chosen), found)
    return with_changes(told, a, b)


def with_changes(told: Localised, a: Rerun, b: Rerun | Foreign) -> Localised:
    """Return the outcome with what there is to say of uncommitted changes of a record, and no surer than they allow."""
    for label, side, seen in (("A", a, told.walked.a), ("B", b, told.walked.b)):
        if isinstance(side, Foreign) or side.record is None or not side.dirty or seen.code.commit != side.commit:
            continue
        ran = f"{label} ran with uncommitted changes on commit {str(side.commit)[:12]}, and again"
        if seen.code.dirty:
            told = replace(told, notes=[f"{ran} with those that are here now, which can be others", *told.notes])
            continue
        repeats = not any(note.startswith(f"{label} does not repeat") for note in told.notes)
        told = replace(told, notes=[f"{ran} without them", *told.notes])
        sentence = f"{told.sentence} This is without the uncommitted changes of {label}, which are in no commit"
        if repeats:
            told = replace(told, sentence=f"{sentence}.")
        elif told.exit_code == 0:
            sentence += f", and {label} does not repeat its record."
            told = replace(told, verdict="cannot tell", sentence=sentence, next_step=_LOST)
        else:
            told = replace(told, sentence=f"{sentence} and can be a further cause.")
    return told


def judge(
    sides: tuple[Pass, Pass], iterations: list[int], unrepeated: Sequence[str] = (), found: Comparison | None = None
) -> Localised:
    """Walk over the probes of two sides and decide; ``found`` is what their records say.

    ``unrepeated`` says which sides did not give again what they recorded: where the records differ by more than
    rounding and the new runs do not, the cause lies outside of what was run again.
    """
    walked = walk(*sides, iterations)
    verdict, sentence, next_step = _decide(walked, iterations, found)
    differs = _recorded_difference(found, verdict)
    if unrepeated and differs is not None:
        verdict, next_step = "cannot tell", _ELSEWHERE
        sentence += f" But the records differ {differs}, and {unrepeated[0]}."
    return Localised(verdict, sentence, next_step, walked, iterations, list(unrepeated))


def _recorded_difference(found: Comparison | None, verdict: Verdict) -> str | None:
    """Return where two records differ by more than a verdict on their sides allows."""
    if found is None or verdict not in ("identical", "rounding"):
        return None
    numbers = found.findings.numbers
    if verdict == "rounding":
        outside = numbers.first_outside
        return None if outside is None else f"by more than that at iteration {outside.iteration}"
    return f"at iteration {numbers.mismatches[0].iteration}" if numbers.mismatches else None


def _compared(a: Rerun, b: Rerun | Foreign) -> Comparison | None:
    if isinstance(b, Foreign) or a.record is None or b.record is None:
        return None
    return compare_paths(a.record.path, b.record.path)


def in_question(a: Rerun, b: Rerun | Foreign, found: Comparison | None) -> list[int]:
    """Return the first iteration at which the records differ, with the one before it: its update may be the cause.

    Where the first that is outside the band comes later, it is one too.
    """
    begins = max(a.begins_after, b.begins_after if isinstance(b, Rerun) else 0) + 1
    if found is None:  # of other code an update and what the next step makes of it
        return [begins] if isinstance(b, Foreign) else [begins, begins + 1]
    mismatches = found.findings.numbers.mismatches
    outside = found.findings.numbers.first_outside
    stated = [stage.first for stage in found.stages if stage.state == "differs" and stage.first is not None]
    first = min([*(m.iteration for m in mismatches), *stated], default=begins)
    wanted = {first - 1, first} | ({outside.iteration - 1, outside.iteration} if outside else set())
    return sorted(number for number in wanted if number >= begins) or [begins]


def _passes(a: Rerun, b: Rerun | Foreign, first: Path, second: Path, iterations: list[int]) -> tuple[Pass, Pass]:
    from lockstep.lab.localise.foreign import from_conversion, from_folder
    from lockstep.lab.localise.probes import load_probes
    from lockstep.lab.localise.reference import ReferenceDecoder
    from lockstep.lab.localise.replay import Decoder, replay
    from lockstep.lab.localise.worker import RUN, TWIN

    one = Pass("A", a.title, load_probes(first, RUN), load_probes(first, TWIN))
    verify(a, "A", one.run.facts.get("code") or {})
    title = b.title if isinstance(b, Rerun) else b.kind
    if isinstance(b, Foreign):
        model = one.run.facts["config"]["model"]
        decoder: Decoder
        if b.kind == REFERENCE:
            decoder = ReferenceDecoder(model)
        elif b.kind == TRANSFORMERS:
            decoder = from_conversion(model, second)
        else:
            assert b.folder is not None, "a folder has a path"
            decoder = from_folder(b.folder)
        title = decoder.title
        replay(decoder, one.run, iterations, second)
    other = Pass("B", title, load_probes(second, RUN), load_probes(second, TWIN), foreign=isinstance(b, Foreign))
    verify(b, "B", other.run.facts.get("code") or {})
    return one, other


def _unrepeated(a: Rerun, b: Rerun | Foreign, first: Path, second: Path, iterations: list[int]) -> list[str]:
    """Say which sides did not give again what their records hold: both were run again by the code that is here."""
    from lockstep.lab.localise.probes import load_probes
    from lockstep.lab.localise.worker import RUN

    notes = []
    for side, label, folder in ((a, "A", first), (b, "B", second)):
        if isinstance(side, Foreign) or side.record is None:
            continue
        probes, lines = load_probes(folder, RUN), {line.iteration: line for line in side.record.train}
        for iteration in iterations:
            again = probes.number(iteration, stages.LOSS, "lm loss")
            if iteration in lines and again != lines[iteration].lm_loss:
                recorded = lines[iteration].lm_loss
                notes.append(
                    f"{label} does not repeat itself: its record has the loss {recorded!r} at iteration {iteration}, "
                    f"run again it is {again!r}; code, packages or device are not those of the record"
                )
                break
    return notes


def _decide(walked: Walked, iterations: list[int], found: Comparison | None) -> tuple[Verdict, str, str]:
    first = walked.first
    if first is not None:
        return _cause(walked, first)
    unknown = [r for r in walked.results if r.state == "unknown" and r.stage in (stages.FORWARD, stages.UPDATE)]
    if unknown:
        result = unknown[0]
        return "cannot tell", f"At {result.stage} of iteration {result.iteration}: {result.detail}.", ""
    begins = walked.begins
    number = _listed(iterations)
    if begins is None:
        return "identical", f"Everything that {number} {_shows(iterations)} is equal bit for bit.", ""
    sentence = f"In float64 both sides compute the same at {number}: what differs is rounding. {_begins(begins)}."
    acting = [str(d) for d in walked.differences if d.role == "active"]
    if acting:
        sentence = f"{sentence[:-1]}; the settings that differ are {', '.join(acting)}."
    outside = found.findings.numbers.first_outside if found else None
    if outside is not None and begins.stage in (stages.WEIGHTS, stages.STATE) and begins.iteration > 1:
        earlier = f"the weights before iteration {begins.iteration} differ already"
        return "cannot tell", f"{sentence[:-1]}, but {earlier}.", "Localise an earlier one: --iteration 1"
    return "rounding", sentence, ""


def _begins(row: Row) -> str:
    apart = f", {row.apart:.2g} of its size apart" if row.apart else ""
    exact = f" ({row.apart_in_float64:.2g} in float64)" if row.apart_in_float64 is not None else ""
    return f"It begins at iteration {row.iteration}, {row.stage}: {row.name}{apart}{exact}"


def _listed(iterations: list[int]) -> str:
    if len(iterations) == 1:
        return f"iteration {iterations[0]}"
    return f"iterations {', '.join(map(str, iterations[:-1]))} and {iterations[-1]}"


def _shows(iterations: list[int]) -> str:
    return "shows" if len(iterations) == 1 else "show"


_STAGES: dict[str, tuple[Verdict, str]] = {
    stages.DATA: ("data", DATA),
    stages.WEIGHTS: ("init", INIT),
    stages.SCHEDULE: ("schedule", SCHEDULE),
    stages.UPDATE: ("bug", UPDATE),
}


def _cause(walked: Walked, row: Row) -> tuple[Verdict, str, str]:
    verdict, part = _STAGES.get(row.stage, ("bug", COMPUTE))
    if verdict == "init" and row.iteration > 1:
        verdict = "bug"  # of resuming: nothing is drawn any more
    settings = [d for d in walked.differences if _explains(d, part)] if row.stage != stages.FEATURES else []
    place = f"Iteration {row.iteration}, {row.stage}: " if row.iteration else f"{row.stage.capitalize()}: "
    sentence = f"{place}{row.name} is the first that differs: {row.reason}"
    if row.where is not None and row.where.index and row.where.a != row.where.b:
        sentence += f"; {_place(row.where)}"
    if row.where is not None and row.where.ranks and _processes(walked, row.where.side) > 1:
        named = f"{_ranks(row.where.ranks)} of {row.where.side}"
        sentence += f", on {named}" if named not in row.reason else ""
        if row.where.micro_batches:
            sentence += f" in micro-batch {row.where.micro_batches[0]}"
    masked = row.stage not in (*stages.FACTS, stages.DATA, stages.WEIGHTS, stages.STATE, stages.SCHEDULE)
    if masked and drops(walked.a) and drops(walked.b) and not same_streams(walked.a, walked.b):
        sentence += ". Both have dropout, and layouts or micro-batches that draw other masks"
        return "cannot tell", f"{sentence}.", "Localise runs with dropout 0."
    inherited = row.stage in (stages.WEIGHTS, stages.STATE) and row.iteration > 1
    if inherited and not settings and not _begins_here(walked, row.iteration):
        sentence += ". It comes from an earlier iteration"
        return "cannot tell", f"{sentence}.", "Localise earlier ones, such as --iteration 1."
    if settings:
        named = ", ".join(str(d) for d in settings)
        change = " ".join(f"{d.path}={d.a}" for d in settings)
        return (
            "config",
            f"{named} {'differs' if len(settings) == 1 else 'differ'}. {sentence}.",
            (f"Give B the settings of A ({change}) and localise again."),
        )
    sentence += ". Everything before it is equal or rounding."
    codes = codes_of(walked)
    if codes is None:
        return verdict, sentence, _where_to_look(row)
    change = " ".join(code.partition(" ")[0] for code in codes)
    sentence += f" A is computed by commit {codes[0]}, B by commit {codes[1]}."
    sentence += "".join(f" {row.name}: {row.reason}." for row in walked.hints)
    return verdict, sentence, f"{_where_to_look(row)} `git diff {change} -- src` shows what changed."


def codes_of(walked: Walked) -> tuple[str, str] | None:
    """Return which commits computed the two sides, where these are two."""
    return (str(walked.a.code), str(walked.b.code)) if walked.two_codes else None


def _place(where: Where) -> str:
    one, other = "A", "B"
    if where.processes is not None:
        one, other = (f"process {rank}" for rank in where.processes)
    return f"at {list(where.index)} it is {where.a:.9g} in {one} and {where.b:.9g} in {other}"


def _processes(walked: Walked, label: str) -> int:
    side = walked.a if label == "A" else walked.b
    return 1 if side.foreign else int(side.run.facts["layout"]["processes"])


def _begins_here(walked: Walked, iteration: int) -> bool:
    """Tell whether a side resumed right before an iteration."""
    starts = [side.run.facts.get("begins_after", 0) for side in (walked.a, walked.b)]
    return starts[0] != starts[1] and max(starts) == iteration - 1


def _explains(difference: ConfigDifference, part: str) -> bool:
    precision = difference.path.startswith("mixed_precision.")  # float64 has none
    return difference.role == "active" and not precision and (part in difference.reach or COMPUTE in difference.reach)


def _ranks(ranks: tuple[int, ...]) -> str:
    if len(ranks) == 1:
        return f"process {ranks[0]}"
    return f"processes {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


_LOOK = {
    stages.FEATURES: "Look at what builds the module: it does not follow its setting.",
    stages.DATA: "Look at data set, sampler and masks: the model has not run yet.",
    stages.WEIGHTS: "Look at initialisation, checkpoint or conversion of this parameter.",
    stages.STATE: "Look at what was saved and restored.",
    stages.SCHEDULE: "Look at the schedules and at the parameter groups of the optimizer.",
    stages.FORWARD: "Look at what computes this tensor from those before it, which are equal.",
    stages.LOSS: "Look at masks, the count of valid tokens and the divisor.",
    stages.GRADIENTS: "Look at the backward pass of what stands behind this tensor: all later ones are equal.",
    stages.REDUCED: "Look at the sums over micro-batches and processes: their gradients add up to the right one.",
    stages.NORM: "Look at which parameters are counted how often.",
    stages.CLIPPED: "Look at the clipping: norm and gradients before it are equal.",
    stages.UPDATE: "Look at the optimizer: gradients, learning rate and weight decay are equal.",
    stages.AFTER: "Look at what copies the optimizer's weights into the model.",
}


def _where_to_look(row: Row) -> str:
    return _LOOK[row.stage]
