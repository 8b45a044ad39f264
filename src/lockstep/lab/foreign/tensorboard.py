"""TensorBoard event files of any trainer whose tags are known, or named by the user."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.errors import UserError
from lockstep.lab.digits import Digits
from lockstep.lab.foreign.columns import COUNTED, Columns
from lockstep.lab.foreign.trace import Format, Trace
from lockstep.lab.point import Point

EVENT_FILES = "events.out.tfevents.*"
_SHOWN = 12
_VS_SAMPLES = " vs samples"


@dataclass(frozen=True)
class Family:
    """Tags of one trainer; a tag that ends with ``*`` stands for the only one that begins so.

    ``counts_from`` is the step of the first iteration, ``averages`` whether a value is the mean since the one before.
    """

    name: str
    tags: Mapping[str, str]
    counts_from: int = 1
    averages: bool = False


FAMILIES = (
    Family(
        "Megatron-LM, Megatron Bridge or Lockstep",
        {"lm_loss": "lm loss", "grad_norm": "grad-norm", "next_lr": "learning-rate", "loss_scale": "loss-scale"}
        | {"global_batch_size": "batch-size", "evaluation": "lm loss validation"},
    ),
    Family(
        "torchtitan",
        {"lm_loss": "loss_metrics/global_avg_loss", "grad_norm": "grad_norm", "lr": "lr/*"}
        | {"consumed_tokens": "n_tokens_seen", "evaluation": "validation_metrics/loss"},
    ),
    Family(
        "NeMo",
        {"lm_loss": "reduced_train_loss", "grad_norm": "grad_norm", "lr": "lr"}
        | {"consumed_samples": "consumed_samples", "evaluation": "val_loss"},
        counts_from=0,
    ),
    Family(
        "Hugging Face",
        {
            "lm_loss": "train/loss",
            "grad_norm": "train/grad_norm",
            "lr": "train/learning_rate",
            "evaluation": "eval/loss",
        },
        averages=True,
    ),
)
FACTS = (
    "numbers are float32; the tags of Megatron-LM, Bridge and torchtitan are of the iteration alone, those of Hugging "
    "Face averages since the last one; learning-rate is that of the following iteration, other rates that of their own"
)


def event_files(path: Path) -> list[Path]:
    """Return the event files of a folder in the order of their time stamps; a file stands for itself."""
    return sorted(path.glob(EVENT_FILES)) if path.is_dir() else [path]


def parse(path: Path, columns: Columns) -> Trace:
    """Read a folder of event files, or one.

    Raises:
        UserError: a damaged file, or tags that leave open which is the loss; lists them.
    """
    files = event_files(path)
    if not files:
        raise UserError(f"{path} holds no {EVENT_FILES}; give the folder that holds them")
    notes: list[str] = []
    scalars: dict[str, list[tuple[int, float]]] = {}
    for file in files:
        for tag, step, value in _events(file, notes):
            scalars.setdefault(tag, []).append((step, value))
    family = _custom(columns, scalars, path) if columns.names else _family(path, scalars)
    title = f"TensorBoard events of {family.name}"
    trace = Trace(path, Format("tensorboard", title, FACTS), notes=notes)
    _fill(trace, family, scalars)
    trace.digits = dict.fromkeys(("lm_loss", "grad_norm", "lr", "next_lr", "loss_scale"), Digits(single=True))
    return trace


def _events(file: Path, notes: list[str]) -> Iterator[tuple[str, int, float]]:
    """Yield tag, step and value of every scalar; a last record that was not written whole ends the file."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub import errors
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    size = file.stat().st_size
    if not size:
        raise UserError(f"{file} is empty; the run has written no event, or the copy is not whole")
    reader = PyRecordReader_New(str(file))
    read = 0
    while True:
        try:
            reader.GetNext()
            record = reader.record()
            event = Event.FromString(record)
        except errors.OutOfRangeError:
            return
        except Exception as error:
            if read == 0 or "truncated" not in str(error):
                raise UserError(f"{file} is damaged after {read} records ({error}); restore it") from None
            notes.append(f"the last record of {file.name} is cut off and was left out")
            return
        read += 1
        for value in event.summary.value:
            if (number := _scalar(value)) is not None:
                yield value.tag, event.step, number


def _scalar(value: Any) -> float | None:
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if value.HasField("tensor"):
        from tensorboard.util.tensor_util import make_ndarray

        array = make_ndarray(value.tensor)
        return float(array) if array.ndim == 0 and array.dtype.kind in "fiu" else None
    return None


def _family(path: Path, scalars: Mapping[str, Any]) -> Family:
    found = [family for family in FAMILIES if family.tags["lm_loss"] in scalars]
    if len(found) == 1:
        return found[0]
    what = "no tag is known to be the loss" if not found else f"{' and '.join(f.name for f in found)} tags are there"
    tags = [tag for tag in scalars if not tag.endswith(_VS_SAMPLES)]
    more = f" and {len(tags) - _SHOWN} more" if len(tags) > _SHOWN else ""
    raise UserError(
        f"{path}: {what}; say which by --columns loss=TAG (there are: {', '.join(tags[:_SHOWN]) or 'none'}{more})"
    )


def _custom(columns: Columns, scalars: Mapping[str, Any], path: Path) -> Family:
    missing = [tag for tag in columns.names.values() if tag not in scalars]
    if missing or "lm_loss" not in columns.names:
        what = f"no tag {missing[0]}" if missing else "--columns names no loss"
        raise UserError(f"{path}: {what}; there are: {', '.join(list(scalars)[:_SHOWN])}")
    return Family(
        "tags that were named",
        columns.names,
        1 if columns.counts_from is None else columns.counts_from,
        columns.averages,
    )


def _fill(trace: Trace, family: Family, scalars: Mapping[str, list[tuple[int, float]]]) -> None:
    shift = 1 - family.counts_from
    known = {name: tag for name, spelled in family.tags.items() if (tag := _tag(spelled, scalars)) is not None}
    series = {name: _by_step(scalars[tag]) for name, tag in known.items() if name != "evaluation"}
    losses = scalars[known["lm_loss"]]
    series.setdefault("consumed_samples", _samples(known["lm_loss"], scalars))
    to_come = Counter(step for step, _ in losses)
    previous = 0
    for step, loss in losses:
        iteration = step + shift
        numbers: dict[str, Any] = {
            name: _of_pass(values.get(step, []), to_come[step]) for name, values in series.items()
        }
        to_come[step] -= 1
        numbers |= {name: None if numbers.get(name) is None else int(numbers[name]) for name in COUNTED}
        start = previous + 1 if family.averages and previous < iteration else iteration
        trace.read(Point(**numbers | {"iteration": iteration, "start": start, "lm_loss": loss}))
        previous = iteration
    if "evaluation" in known:
        _evaluate(trace, [(step + shift, loss) for step, loss in scalars[known["evaluation"]]], previous)


def _evaluate(trace: Trace, losses: list[tuple[int, float]], last: int) -> None:
    """Add the evaluations. After training, Megatron-LM writes those on both splits under the tag of the others."""
    final = [("valid", True), ("test", True)]
    for iteration in dict.fromkeys(iteration for iteration, _ in losses):
        values = [loss for at, loss in losses if at == iteration]
        kinds = final if len(values) == len(final) else [("valid", False), *final]
        if len(values) > len(kinds) or (len(values) > 1 and iteration != last):
            trace.notes.append(f"{len(values)} evaluations at iteration {iteration} have one tag and were left out")
            continue
        for (split, after), loss in zip(kinds, values, strict=False):
            trace.evaluate(iteration, loss, split, after)


def _by_step(values: Iterable[tuple[int, float]]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for step, value in values:
        found.setdefault(step, []).append(value)
    return found


def _of_pass(values: list[float], from_the_end: int) -> float | None:
    """Return the value of one pass over an iteration, counted from the last one: a tag may have come in later."""
    return values[-min(from_the_end, len(values))] if values else None


def _samples(loss: str, scalars: Mapping[str, list[tuple[int, float]]]) -> dict[int, list[float]]:
    """Return consumed samples by step, from the copy of the curve over samples that Megatron-LM writes."""
    over = scalars.get(loss + _VS_SAMPLES, [])
    if len(over) != len(scalars[loss]):
        return {}
    return _by_step((step, samples) for (step, _), (samples, _) in zip(scalars[loss], over, strict=True))


def _tag(spelled: str, scalars: Mapping[str, Any]) -> str | None:
    if not spelled.endswith("*"):
        return spelled if spelled in scalars else None
    found = [tag for tag in scalars if tag.startswith(spelled[:-1])]
    return found[0] if len(found) == 1 else None


def is_event_file(path: Path) -> bool:
    """Tell an event file by its name."""
    return ".tfevents." in path.name
