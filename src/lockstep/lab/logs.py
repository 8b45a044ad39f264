"""Parsing of console logs as Megatron-LM, Megatron Bridge and Lockstep print them.

Text around a line (a launcher's rank prefix, colours) is ignored. A log prints a loss with 7 digits, a learning rate
with 7 digits and a gradient norm with 3 decimals.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.errors import UserError
from lockstep.lab.foreign.repeats import Item, Settled, settle, settle_evaluations
from lockstep.lab.foreign.settings import Collector, bridge_file
from lockstep.lab.foreign.text import read_lines
from lockstep.lab.foreign.trace import Settings, rhythm

MEGATRON_LM, BRIDGE = "Megatron-LM or Lockstep", "Megatron Bridge"

_TRAIN = re.compile(r"\biteration\s+(\d+)\s*/\s*(\d+)\s*\|(.*)")
_EVALUATION = re.compile(r"\bvalidation(\S*) loss at iteration (\d+)(?: on (validation|test) set)?\s*\|(.*)")
_LAST = "number of nan iterations"
_STAMP = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?\]")


@dataclass(frozen=True)
class LogLine:
    """One training line. ``next_lr`` is the learning rate of the iteration that follows, as the trainers print it.

    ``lm_loss`` is the mean from iteration ``Log.window_start`` to this one; NaN where the trainer left a NaN out.
    """

    iteration: int
    lm_loss: float | None
    grad_norm: float | None
    next_lr: float | None
    loss_scale: float | None
    consumed_samples: int | None
    global_batch_size: int | None
    skipped: int


@dataclass(frozen=True)
class LogEvaluation:
    """One validation line; ``split`` is ``valid`` or ``test``, ``final`` marks those after training."""

    iteration: int
    split: str
    final: bool
    lm_loss: float


@dataclass
class Log:
    """What a log prints. ``printer`` names whose format it has, ``settled`` how repeated iterations were settled."""

    path: Path
    printer: str = MEGATRON_LM
    train_iters: int = 0
    lines: dict[int, LogLine] = field(default_factory=dict)
    evaluations: dict[tuple[int, str, bool], LogEvaluation] = field(default_factory=dict)

    notes: list[str] = field(default_factory=list)
    settled: Settled[LogLine] = field(default_factory=Settled)
    settings: Settings | None = None

    @property
    def interval(self) -> int:
        """Iterations between two lines, as far as the lines tell."""
        return rhythm(self.lines)

    def window_start(self, end: int) -> int:
        """Return the first iteration that the line of ``end`` averages.

        Megatron-LM prints a line for the first iteration of a process and keeps that iteration in the average of the
        next line, also with a log interval of 1; Bridge does neither.
        """
        first, interval = self.settled.begin(end), self.interval
        resumed = first != min(self.lines)
        carried = self.printer != BRIDGE and (resumed or first == 1 or first % interval > 0)
        if carried and end == first:
            return first
        if carried and end == (first // interval + 1) * interval:
            return first
        return max(end - interval + 1, 1)


def is_train_line(text: str) -> bool:
    """Tell whether a line is a training or validation line of Megatron-LM, Bridge or Lockstep."""
    return bool(_TRAIN.search(text) or _EVALUATION.search(text))


def parse_log(path: Path) -> Log:
    """Read a console log.

    Raises:
        UserError: the file cannot be read, holds no line of a known format, or prints an iteration twice with
            different numbers (two runs in one file).
    """
    log = Log(path)
    lines: list[Item[LogLine]] = []
    evaluations: list[tuple[int, tuple[int, str, bool], LogEvaluation]] = []
    collector = Collector()
    for number, (rank, text) in enumerate(read_lines(path), start=1):
        collector.line(text)
        found = _TRAIN.search(text)
        if found and _is_cut_off(found[3]):
            log.notes.append(f"line {number}, of iteration {found[1]}, is cut off and was left out")
        elif found:
            line = _train_line(int(found[1]), _fields(found[3]))
            lines.append(Item(line.iteration, rank, line))
            log.train_iters = int(found[2])
            if stamp := _STAMP.search(text):
                log.printer = MEGATRON_LM if stamp[1] else BRIDGE
        elif (found := _EVALUATION.search(text)) and (evaluation := _evaluation(found)):
            key = (evaluation.iteration, evaluation.split, evaluation.final)
            evaluations.append((len(lines), key, evaluation))
    if not lines and not evaluations:
        raise UserError(
            f"{path} holds no whole training or validation line of Megatron-LM, Megatron Bridge or Lockstep; "
            "give a run directory or a console log"
        )
    log.settings = collector.settings()
    if log.settings is None and log.printer == BRIDGE:
        log.settings = bridge_file(path.parent / "run_config.yaml")
    log.settled = settle(str(path), lines)
    log.lines = log.settled.values
    log.evaluations = settle_evaluations(str(path), evaluations, log.settled)
    return log


def _is_cut_off(text: str) -> bool:
    """Tell whether the fields of a training line end before the last of them: within one, or before the loss scale."""
    fields = _fields(text)
    return _LAST not in fields and (bool(text.rpartition("|")[2].strip()) or "loss scale" not in fields)


def _fields(text: str) -> dict[str, str]:
    """Return the fields that a bar ends: what follows the last one lacks digits, or is no field."""
    pairs = (part.rpartition(":") for part in text.split("|")[:-1])
    return {key.strip(): value.strip() for key, _, value in pairs if key.strip()}


def _train_line(iteration: int, fields: dict[str, str]) -> LogLine:
    skipped = int(_number(fields, "number of skipped iterations") or 0)
    loss = _number(fields, "lm loss")
    # The trainers print a loss only if it is >= 0, which drops NaN; the count of NaN iterations tells.
    if loss is None and _number(fields, "number of nan iterations"):
        loss = math.nan
    consumed, batch = _number(fields, "consumed samples"), _number(fields, "global batch size")
    return LogLine(
        iteration=iteration,
        lm_loss=loss,
        grad_norm=_number(fields, "grad norm"),
        next_lr=_number(fields, "learning rate"),
        loss_scale=_number(fields, "loss scale"),
        consumed_samples=None if consumed is None else int(consumed),
        global_batch_size=None if batch is None else int(batch),
        skipped=skipped,
    )


def _evaluation(found: re.Match[str]) -> LogEvaluation | None:
    loss = _number(_fields(found[4]), "lm loss value")
    if loss is None:
        return None
    split = ("test" if found[3] == "test" else "valid") + found[1]
    return LogEvaluation(int(found[2]), split, found[3] is not None, loss)


def _number(fields: dict[str, str], key: str) -> float | None:
    try:
        return float(fields[key])
    except (KeyError, ValueError):
        return None
