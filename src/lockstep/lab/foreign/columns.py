"""Which column, key or tag holds which number: as the user says, or by its name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lockstep.errors import UserError, nearest

COUNTED = ("consumed_samples", "consumed_tokens", "global_batch_size")
NAMES: dict[str, tuple[str, ...]] = {
    "iteration": ("iteration", "iter", "step", "global_step", "trainer/global_step", "train/global_step", "_step"),
    "lm_loss": (
        "lm_loss",
        "lm loss",
        "loss",
        "train_loss",
        "train/loss",
        "training_loss",
        "reduced_train_loss",
        "train/CE loss",
        "loss_metrics/global_avg_loss",
    ),
    "grad_norm": (
        "grad_norm",
        "grad-norm",
        "grad norm",
        "train/grad_norm",
        "gradient_norm",
        "optim/total grad norm",
    ),
    "lr": ("lr", "learning_rate", "train/learning_rate", "optim/LR (group 0)"),
    "next_lr": ("next_lr", "learning-rate", "learning rate"),
    "loss_scale": ("loss_scale", "loss-scale", "loss scale"),
    "consumed_samples": ("consumed_samples", "consumed samples", "samples"),
    "consumed_tokens": (
        "consumed_tokens",
        "tokens",
        "n_tokens_seen",
        "num_input_tokens_seen",
        "throughput/total tokens",
    ),
    "global_batch_size": ("global_batch_size", "batch-size", "global batch size"),
    "evaluation": ("evaluation", "eval_loss", "eval/loss", "val_loss", "validation_loss", "valid_loss", "val/loss"),
}
"""Names under which trainers write each number; the first of each is ours."""

_OURS = {"loss": "lm_loss", "step": "iteration"}


@dataclass(frozen=True)
class Columns:
    """What ``--columns`` says: names by number, the step of the first iteration, whether losses are averages."""

    names: Mapping[str, str] = field(default_factory=dict)
    counts_from: int | None = None
    averages: bool = False


def parse_columns(text: str) -> Columns:
    """Read ``loss=NAME,iteration=NAME,from=0,average=true``.

    Raises:
        UserError: a word without ``=``, or an unknown number.
    """
    names: dict[str, str] = {}
    counts_from, averages = None, False
    for word in text.split(","):
        key, equals, value = word.partition("=")
        key = _OURS.get(key.strip(), key.strip())
        if not equals or not value.strip():
            raise UserError(f"--columns: {word!r} is not of the form loss=NAME; separate several by commas")
        if key == "from" and value.strip() in ("0", "1"):
            counts_from = int(value)
        elif key == "average" and value.strip() in ("true", "false"):
            averages = value.strip() == "true"
        elif key in NAMES:
            names[key] = value.strip()
        else:
            known = ["loss", *NAMES, "from", "average"]
            raise UserError(
                f"--columns: {word!r} is not known (from=0 or 1, average=true or false).{nearest(key, known)}"
            )
    return Columns(names, counts_from, averages)


def choose(where: str, header: Iterable[str], columns: Columns) -> dict[str, str]:
    """Return the name of the column of each number that is there.

    Raises:
        UserError: a named column is missing, or iteration or loss are not there or could be several.
    """
    there = [name for name in header if name]
    for key, name in columns.names.items():
        if name not in there:
            raise UserError(f"{where}: no column {name} for {key}.{nearest(name, there)} There are: {_list(there)}")
    chosen = dict(columns.names)
    for key, names in NAMES.items():
        if key in chosen:
            continue
        found = [column for column in there if column.strip().lower() in {name.lower() for name in names}]
        if len(found) > 1:
            spelled = "loss" if key == "lm_loss" else key
            raise UserError(f"{where}: {_list(found)} may be the {spelled}; say which by --columns {spelled}=NAME")
        if found:
            chosen[key] = found[0]
    for key, spelled in (("iteration", "iteration"), ("lm_loss", "loss")):
        if key not in chosen:
            raise UserError(
                f"{where}: no column is known to be the {spelled}; say which by --columns {spelled}=NAME "
                f"(there are: {_list(there)})"
            )
    return chosen


def _list(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
