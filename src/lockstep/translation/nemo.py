"""Options of NeMo's trainer (``trainer.max_steps 50``), which some of Megatron-LM's test configurations hold."""

import re
from collections.abc import Sequence

from lockstep.config import all_fields
from lockstep.config.fields import coerce
from lockstep.errors import ConfigError
from lockstep.megatron_lm.parser import from_text, is_switch, item_type
from lockstep.translation.elsewhere import Elsewhere, Family
from lockstep.translation.flags import Option, Reading
from lockstep.translation.words import Word, Written

_KEY = re.compile(r"(trainer|model|data|log|optim|resume|tokenizer)(\.\w+)+")
_PATHS = {
    "trainer.max_steps": "train.train_iters",
    "trainer.val_check_interval": "validation.eval_interval",
    "trainer.limit_val_batches": "validation.eval_iters",
    "trainer.log_every_n_steps": "logger.log_interval",
    "data.micro_batch_size": "train.micro_batch_size",
    "data.global_batch_size": "train.global_batch_size",
    "data.seq_length": "model.seq_length",
    "data.num_workers": "dataset.num_workers",
    "optim.lr_scheduler.min_lr": "optimizer.min_lr",
    "optim.lr_scheduler.warmup_steps": "scheduler.lr_warmup_iters",
}
_SECTIONS = {
    "trainer.strategy.ddp": ("ddp",),
    "trainer.strategy": ("model", "ddp", "dist"),
    "model.config": ("model", "ddp", "dist"),
    "optim.config": ("optimizer",),
}
_LAUNCHER = Family("launcher", "waived", "how many processes the launcher starts", "")
_LOGS = Family("NeMo logs", "waived", "where NeMo writes its logs and checkpoints", "")
_UNKNOWN = Family("NeMo", "blocking", "an option of NeMo without a counterpart", "")
_RECIPE = Family("NeMo", "blocking", "NeMo takes every other value from a recipe of its own, not named among these", "")
RECIPE = "nemo-recipe"
"""The name under which what NeMo's own recipe says can be waived."""


def is_nemo(words: Sequence[Word]) -> bool:
    """Tell whether a command line is one of NeMo's trainer."""
    return bool(words) and _KEY.fullmatch(words[0].text.partition("=")[0]) is not None


def read_nemo(words: Sequence[Word]) -> Reading:
    """Return what options of NeMo's trainer ask for.

    Raises:
        ConfigError: words that are no options, values of another type; lists all of them.
    """
    reading, problems, index = Reading(), [], 0
    while index < len(words):
        word = words[index]
        index += 1
        key, equals, text = word.text.partition("=")
        if not _KEY.fullmatch(key):
            problems.append(f"unexpected word {word.text!r}; options of NeMo are spelled section.key value")
            continue
        values = [text] if equals else []
        while not equals and index < len(words) and not _KEY.fullmatch(words[index].text):
            values.append(words[index].text)
            index += 1
        reading.options.append(_option(Written(key, tuple(values), word.place), problems))
    reading.options.append(Option(Written(RECIPE, ()), elsewhere=Elsewhere(RECIPE, "0", None, _RECIPE)))
    for option in reading.options:
        for path, value in option.sets.items():
            reading.put(path, value, option.written.flag)
    if problems:
        raise ConfigError(problems)
    return reading


def _option(written: Written, problems: list[str]) -> Option:
    key = written.flag
    path = _path(key)
    if path is None:
        launcher, logs = key in ("trainer.num_nodes", "trainer.devices"), key.startswith(("log.", "resume."))
        family = _LAUNCHER if launcher else _LOGS if logs else _UNKNOWN
        return Option(written, elsewhere=Elsewhere(key, "1", None, family))
    info = all_fields()[path]
    try:
        if is_switch(info):
            return Option(written, {path: written.values in ((), ("true",), ("True",))})
        raw = list(written.values) if item_type(info) is not None else written.values[0]
        return Option(written, {path: coerce(from_text(raw, info), info)})
    except (ValueError, IndexError):
        problems.append(f"{written.shown}: not a value of {path}")
        return Option(written)


def _path(key: str) -> str | None:
    if key in _PATHS:
        return _PATHS[key]
    for prefix, sections in _SECTIONS.items():
        if key.startswith(f"{prefix}."):
            names = (f"{section}.{key[len(prefix) + 1 :]}" for section in sections)
            return next((name for name in names if name in all_fields()), None)
    return None
