"""Settings that foreign runs print, read into paths of the config tree; what has none is listed."""

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lockstep.config import FieldInfo, all_fields
from lockstep.config.fields import coerce
from lockstep.errors import UserError
from lockstep.lab.foreign.trace import Settings
from lockstep.megatron_lm.composites import COMPOSITES
from lockstep.translation.bridge import paths_of

_ARGUMENT = re.compile(r"(?:^|\s)(\w+) \.+ (.*)$")
_BEGIN, _END = re.compile(r"-{5,} arguments -{5,}"), re.compile(r"-{5,} end of arguments -{5,}")
_SUMMARY = "Configuration Summary (Non-Default Values"
_SECTION = re.compile(r"\[(\w+)\](?: Non-default values.*)?:\s*$")
_SUMMARY_VALUE = re.compile(r"^\s+(\w+): (.*?)(?:  \(Mcore default: .*\))?$")
_ENUM = re.compile(r"(?:<\s*)?[A-Z]\w*\.(\w+)(?::.*>)?")
_RUNNING = re.compile(r"Running with (?:args|configs): (\{.*)$")

TORCHTITAN: dict[str, str] = {
    "training.seq_len": "model.seq_length",
    "training.max_context_length": "model.seq_length",
    "training.global_batch_size": "train.global_batch_size",
    "training.local_batch_size": "train.micro_batch_size",
    "training.batch_size": "train.micro_batch_size",
    "training.steps": "train.train_iters",
    "training.max_norm": "optimizer.clip_grad",
    "training.seed": "rng.seed",
    "debug.seed": "rng.seed",
    "optimizer.lr": "optimizer.lr",
    "optimizer.beta1": "optimizer.adam_beta1",
    "optimizer.beta2": "optimizer.adam_beta2",
    "optimizer.eps": "optimizer.adam_eps",
    "optimizer.weight_decay": "optimizer.weight_decay",
    "lr_scheduler.warmup_steps": "scheduler.lr_warmup_iters",
    "parallelism.tensor_parallel_degree": "model.tensor_model_parallel_size",
    "parallelism.pipeline_parallel_degree": "model.pipeline_model_parallel_size",
    "parallelism.context_parallel_degree": "model.context_parallel_size",
    "parallelism.expert_parallel_degree": "model.expert_model_parallel_size",
}
"""Keys of torchtitan, of present and former versions; -1 there means that it is derived."""

HUGGING_FACE: dict[str, str] = {
    "per_device_train_batch_size": "train.micro_batch_size",
    "max_steps": "train.train_iters",
    "learning_rate": "optimizer.lr",
    "adam_beta1": "optimizer.adam_beta1",
    "adam_beta2": "optimizer.adam_beta2",
    "adam_epsilon": "optimizer.adam_eps",
    "weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.clip_grad",
    "warmup_steps": "scheduler.lr_warmup_iters",
    "lr_scheduler_type": "scheduler.lr_decay_style",
    "seed": "rng.seed",
    "bf16": "mixed_precision.bf16",
    "fp16": "mixed_precision.fp16",
}
"""TrainingArguments; the schedule's name is mapped where both have it (linear, cosine, constant)."""


class Collector:
    """Takes the lines of a log one by one and keeps the settings that are printed between them."""

    def __init__(self) -> None:
        self._take: Callable[[str], bool] | None = None
        self._found: Settings | None = None
        self._values: dict[str, Any] = {}
        self._unmapped: dict[str, str] = {}
        self._section = ""
        self._text: list[str] = []
        self._written: dict[str, str] = {}

    def line(self, text: str) -> None:
        """Look at one line."""
        if self._take is not None:
            if self._take(text):
                return
            self._take = None
        if _BEGIN.search(text):
            self._start(self._argument)
        elif _SUMMARY in text:
            self._start(self._summary)
        elif text.lstrip().startswith("TrainingArguments("):
            self._start(self._training_argument)
        elif found := _RUNNING.search(text):
            self._start(self._json)
            if not self._json(found[1]):
                self._take = None

    def settings(self) -> Settings | None:
        """Return what was found, None for nothing."""
        if self._take is not None and self._values:
            self._keep(_source(self._take.__name__))
        return self._found

    def _start(self, take: Callable[[str], bool]) -> None:
        self._take, self._values, self._unmapped, self._section, self._text = take, {}, {}, "", []
        self._written = {}

    def _keep(self, source: str) -> None:
        self._found = Settings(source, self._values, self._unmapped)

    def _argument(self, text: str) -> bool:
        if _END.search(text):
            for name, value in self._written.items():
                # Megatron-LM prints a number of groups also where it has none.
                if name != "num_query_groups" or self._written.get("group_query_attention") == "True":
                    megatron_argument(name, value, self._values, self._unmapped)
            self._keep(_source("_argument"))
            return False
        if found := _ARGUMENT.search(text):
            self._written[found[1]] = found[2].strip()
        return True

    def _summary(self, text: str) -> bool:
        if found := _SECTION.search(text):
            self._section = found[1]
        elif self._section and text.rstrip().endswith("=" * 20):
            self._keep(_source("_summary"))
            return False
        elif self._section and (value := _SUMMARY_VALUE.match(text)):
            bridge_setting(f"{self._section}.{value[1]}", literal(value[2]), self._values, self._unmapped)
        return True

    def _training_argument(self, text: str) -> bool:
        if text.strip() == ")":
            self._keep(_source("_training_argument"))
            return False
        key, equals, value = text.strip().rstrip(",").partition("=")
        if equals:
            hugging_face_setting(key, literal(value), self._values, self._unmapped)
        return True

    def _json(self, text: str) -> bool:
        self._text.append(text)
        whole = "\n".join(self._text)
        try:
            tree = json.loads(whole)
        except ValueError:
            try:
                tree = ast.literal_eval(whole)
            except (ValueError, SyntaxError):
                return True
        for key, value in flatten(tree):
            torchtitan_setting(key, value, self._values, self._unmapped)
        self._keep(_source("_json"))
        return False


def _source(name: str) -> str:
    return {
        "_argument": "arguments in the log",
        "_summary": "configuration summary in the log",
        "_training_argument": "TrainingArguments in the log",
        "_json": "configuration in the log",
    }[name]


def flatten(tree: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the leaves of nested mappings by dotted key."""
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def literal(text: str) -> Any:
    """Return what a printed Python value stands for; a member of an enumeration by its name, else the text."""
    text = text.strip()
    if found := _ENUM.fullmatch(text):
        return found[1]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def put(path: str, key: str, value: Any, values: dict[str, Any], unmapped: dict[str, str], text: str = "") -> None:
    """Set a path, or list the key where the tree cannot hold the value, nor a list of it, nor the ``text`` it had."""
    info = all_fields()[path]
    if isinstance(value, tuple):
        value = list(value)
    for spelled in (value, [value], text or None):
        try:
            values[path] = coerce(spelled, info)
            return
        except ValueError:
            continue
    unmapped[key] = str(value)


def megatron_argument(name: str, text: str, values: dict[str, Any], unmapped: dict[str, str]) -> None:
    """Take one line of Megatron-LM's arguments."""
    value = literal(text)
    composite = next((c for c in COMPOSITES if c.flag.removeprefix("--").replace("-", "_") == name), None)
    if composite is not None:
        if value is True:
            values.update(composite.sets)
        return
    found = _arguments().get(name.removeprefix("deprecated_"))
    if found is None:
        unmapped[name] = text
        return
    info, inverted = found
    put(info.path, name, not value if inverted and isinstance(value, bool) else value, values, unmapped, text)


@cache
def _arguments() -> dict[str, tuple[FieldInfo, bool]]:
    """Return the field of each name in Megatron-LM's namespace, and whether the name says the opposite."""
    table: dict[str, tuple[FieldInfo, bool]] = {}
    for info in all_fields().values():
        for flag in info.spec.flags:
            name = flag.removeprefix("--").replace("-", "_")
            table[name] = (info, info.spec.negated)
            for prefix in ("no_", "disable_"):
                if info.spec.negated and name.startswith(prefix):
                    table[name.removeprefix(prefix)] = (info, False)
        if info.spec.flags:
            table.setdefault(info.name, (info, False))
    return table


def bridge_setting(key: str, value: Any, values: dict[str, Any], unmapped: dict[str, str]) -> None:
    """Take one key of Bridge's configuration."""
    if "_target_" in key or isinstance(value, Mapping):
        return
    paths = paths_of(key) or ([key] if key in all_fields() else [])
    inverted = key == "dataset.skip_getting_attention_mask_from_dataset"
    for path in paths:
        put(path, key, not value if inverted else value, values, unmapped)
    if not paths:
        unmapped[key] = str(value)


def torchtitan_setting(key: str, value: Any, values: dict[str, Any], unmapped: dict[str, str]) -> None:
    """Take one key of torchtitan's configuration."""
    path = TORCHTITAN.get(key)
    if path is None or value in (-1, None):
        unmapped[key] = str(value)
    else:
        put(path, key, value, values, unmapped)


def hugging_face_setting(key: str, value: Any, values: dict[str, Any], unmapped: dict[str, str]) -> None:
    """Take one of the Trainer's arguments."""
    path = HUGGING_FACE.get(key)
    if path is None or (key == "max_steps" and value == -1):
        unmapped[key] = str(value)
    else:
        put(path, key, str(value).lower() if key == "lr_scheduler_type" else value, values, unmapped)


def bridge_file(path: Path) -> Settings | None:
    """Read the ``run_config.yaml`` that Bridge saves with its checkpoints; None where there is none.

    Raises:
        UserError: it is cut off or damaged.
    """
    import yaml

    if not path.is_file():
        return None
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"{path} is cut off or damaged ({problem}); restore it or take it out") from None
    values: dict[str, Any] = {}
    unmapped: dict[str, str] = {}
    for key, value in flatten(tree):
        bridge_setting(key, value, values, unmapped)
    return Settings(path.name, values, unmapped)


def hugging_face_folder(folder: Path, state: Mapping[str, Any]) -> Settings | None:
    """Read what a Trainer's folder says of the run: its ``config.json`` and the state; None for nothing.

    Its ``training_args.bin`` is a pickle and is not opened.
    """
    from lockstep.hf.settings import to_config

    values: dict[str, Any] = {}
    unmapped: dict[str, str] = {}
    if isinstance(state.get("max_steps"), int) and state["max_steps"] > 0:
        values["train.train_iters"] = state["max_steps"]
    config = folder / "config.json"
    if config.is_file():
        try:
            model = to_config(json.loads(config.read_text(encoding="utf-8"))).model
            # The length of samples is the run's choice, not that of the positions that the model has.
            told = {info.path: value for info, value, origin in model.items() if origin.kind == "hf"}
            values |= {path: value for path, value in told.items() if path != "model.seq_length"}
        except (OSError, ValueError) as error:
            unmapped["config.json"] = str(error).splitlines()[0]
    return Settings("config.json and trainer_state.json", values, unmapped) if values or unmapped else None
