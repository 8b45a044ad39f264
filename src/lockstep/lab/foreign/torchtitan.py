"""torchtitan's console log."""

import re
from pathlib import Path

from lockstep.lab.digits import digits_of
from lockstep.lab.foreign.settings import Collector
from lockstep.lab.foreign.text import read_lines
from lockstep.lab.foreign.trace import Format, Trace, number
from lockstep.lab.point import Point

FORMAT = Format(
    "torchtitan",
    "torchtitan console log",
    "a line is of its step alone, the first and every log_freq-th; its loss is over all tokens of all ranks; "
    "no learning rate is printed",
)
_NUMBER = r"([-+]?(?:[\d.]+(?:e[-+]?\d+)?|nan|inf))"
TRAIN = re.compile(rf"(?<!validate )\bstep:\s*(\d+)\s+loss:\s*{_NUMBER}(?:\s+grad_norm:\s*{_NUMBER})?", re.IGNORECASE)
_VALIDATE = re.compile(rf"\bvalidate step:\s*(\d+)\s+loss:\s*{_NUMBER}", re.IGNORECASE)


def recognises(text: str) -> bool:
    """Tell whether a line is one of torchtitan's."""
    return bool(TRAIN.search(text))


def parse(path: Path) -> Trace:
    """Read a log.

    Raises:
        UserError: the file cannot be read.
    """
    trace = Trace(path, FORMAT)
    collector = Collector()
    losses, norms, evaluations = [], [], []
    for rank, text in read_lines(path, trace.notes):
        collector.line(text)
        if found := _VALIDATE.search(text):
            trace.evaluate(int(found[1]), number(found[2]))
            evaluations.append(found[2])
        elif found := TRAIN.search(text):
            step, loss = int(found[1]), number(found[2])
            norm = number(found[3]) if found[3] else None
            trace.read(Point(iteration=step, start=step, lm_loss=loss, grad_norm=norm), rank)
            losses.append(found[2])
            norms.append(found[3] or "")
    trace.digits = {"lm_loss": digits_of(losses), "grad_norm": digits_of(norms), "evaluation": digits_of(evaluations)}
    trace.settings = collector.settings()
    return trace
