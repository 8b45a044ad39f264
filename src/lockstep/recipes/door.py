"""The command line of ``run_recipe.py``: a recipe, convenience options and overrides into the config tree."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lockstep.arguments import StrictParser
from lockstep.config import ConfigContainer, Origin, all_fields, canonical
from lockstep.config.fields import coerce, describe, members
from lockstep.errors import ConfigError, nearest
from lockstep.launch import launch
from lockstep.recipes.catalog import find_recipe, get_recipe
from lockstep.recipes.overrides import apply_overrides, apply_yaml
from lockstep.recipes.registry import Task

_CONVENIENCE: dict[str, tuple[tuple[str, ...], str]] = {
    "max_steps": (("-ms", "--max_steps"), "train.train_iters"),
    "global_batch_size": (("-gb", "--global_batch_size"), "train.global_batch_size"),
    "micro_batch_size": (("-mb", "--micro_batch_size"), "train.micro_batch_size"),
    "seq_length": (("-sl", "--seq_length"), "dataset.seq_length"),
    "tensor_model_parallel_size": (("-tp", "--tensor_model_parallel_size"), "model.tensor_model_parallel_size"),
    "pipeline_model_parallel_size": (("-pp", "--pipeline_model_parallel_size"), "model.pipeline_model_parallel_size"),
    "context_parallel_size": (("-cp", "--context_parallel_size"), "model.context_parallel_size"),
    "virtual_pipeline_model_parallel_size": (
        ("-vp", "--virtual_pipeline_model_parallel_size"),
        "model.virtual_pipeline_model_parallel_size",
    ),
    "expert_model_parallel_size": (("-ep", "--expert_model_parallel_size"), "model.expert_model_parallel_size"),
    "expert_tensor_parallel_size": (("-etp", "--expert_tensor_parallel_size"), "model.expert_tensor_parallel_size"),
    "lr": (("--lr",), "optimizer.lr"),
    "min_lr": (("--min_lr",), "optimizer.min_lr"),
    "warmup_iters": (("--warmup_iters",), "scheduler.lr_warmup_iters"),
    "pretrained_checkpoint": (("--pretrained_checkpoint",), "checkpoint.pretrained_checkpoint"),
    "save_dir": (("--save_dir",), "checkpoint.save"),
    "load_dir": (("--load_dir",), "checkpoint.load"),
    "save_interval": (("--save_interval",), "checkpoint.save_interval"),
}
_STEP_FUNCTIONS = ("gpt_step",)
_TASKS: dict[str, Task] = {"pretrain": "pretrain", "sft": "sft", "lora": "peft", "dora": "peft"}
"""What a recipe has to do for a mode."""
_DATA = {False: ("mock", "megatron-indexed"), True: ("mock", "local-jsonl")}
"""Data by its name, for pre-training and for fine-tuning."""
_REFUSED_DATA = {
    ("squad", "tulu3", "openmathinstruct2", "openmathinstruct2-thinking", "gsm8k"): (
        "nothing is fetched from the Hugging Face hub; save it to a folder and name that in dataset.hf_dataset_path"
    ),
    ("energon", "local-vlm", "cord-v2", "llava-video-178k", "medpix", "raven", "rdr"): (
        "this is data for models that see images or sound, which are not supported"
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of everything but the overrides."""
    parser = StrictParser(
        prog="run_recipe.py",
        usage="%(prog)s --recipe NAME [options] [key=value ...]",
        description="Train by a named recipe, changed by key=value overrides.",
        help_column=44,
    )
    parser.add_argument("--recipe", metavar="NAME", help="Full recipe name; `lockstep recipes` lists them.")
    parser.add_argument(
        "--model", metavar="STEM", help="Recipe stem: --model llama32_1b --mode sft is llama32_1b_sft_config."
    )
    parser.add_argument("--mode", metavar="MODE", help=f"{', '.join(_TASKS)}; pretrain without it.")
    parser.add_argument(
        "--dataset",
        metavar="KIND",
        help="mock; megatron-indexed with dataset.data_path=...; to fine-tune, local-jsonl with dataset.dataset_root.",
    )
    parser.add_argument("--step-func", "--step_func", default="gpt_step", metavar="NAME", help="gpt_step.")
    parser.add_argument("--config", metavar="FILE", help="YAML file of sections and keys, applied before overrides.")
    parser.add_argument("--deterministic", action="store_true", help="Same as model.deterministic_mode=true.")
    parser.add_argument(
        "--dump-env", "--dump_env", action="store_true", help="Print the environment that the record keeps."
    )
    parser.add_argument(
        "--dry-run",
        "--dry_run",
        "--print-config",
        dest="dry_run",
        action="store_true",
        help="Print the resolved configuration and stop.",
    )
    parser.add_argument(
        "--show-samples", type=int, metavar="N", help="Print N samples for fine-tuning, what is learned marked; stop."
    )
    group = parser.add_argument_group("convenience options, weaker than overrides")
    for dest, (flags, path) in _CONVENIENCE.items():
        group.add_argument(*flags, dest=dest, metavar="VALUE", help=f"{path}.")
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    return parser


def parse_recipe_args(argv: Sequence[str]) -> ConfigContainer:
    """Return the config tree that a recipe command line asks for.

    Raises:
        ConfigError: unknown recipe, option or key, or a value of another type.
    """
    return configure(parse_options(argv))


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options and, as ``overrides``, the key=value words in their order.

    Raises:
        ConfigError: unknown options.
    """
    parser = build_parser()
    namespace, unknown = parser.parse_known_intermixed_args(argv)
    known = [flag for action in parser._actions for flag in action.option_strings]
    problems = [f"unknown option {word}.{nearest(word, known)}" for word in unknown if word.startswith("-")]
    if problems:
        raise ConfigError(problems)
    namespace.overrides += unknown
    return namespace


def recipe_name(options: argparse.Namespace) -> str:
    """Return the full name of the recipe that the options ask for.

    Raises:
        ConfigError: neither or both of --recipe and --model, or a mode that is not that of the recipe.
    """
    mode = options.mode
    if mode is not None and mode not in _TASKS:
        raise ConfigError(f"--mode {mode}: no such mode; use {', '.join(_TASKS)}.{nearest(mode, _TASKS)}")
    if bool(options.recipe) == bool(options.model):
        raise ConfigError("give --recipe NAME or --model STEM, one of the two; `lockstep recipes` lists them")
    if options.model:
        return f"{options.model}_{_TASKS[mode or 'pretrain']}_config"
    found = find_recipe(options.recipe)
    if mode is not None and found.task != _TASKS[mode]:
        raise ConfigError(
            f"--mode {mode}: recipe {found.name} is one of {found.task}; give --model {found.stem} --mode {mode}, or "
            "drop --mode"
        )
    return str(options.recipe)


def configure(options: argparse.Namespace) -> ConfigContainer:
    """Return the recipe's tree with YAML file, convenience options and overrides applied in this order."""
    if options.step_func not in _STEP_FUNCTIONS:
        raise ConfigError(f"--step-func {options.step_func}: only {', '.join(_STEP_FUNCTIONS)} is supported")
    config = get_recipe(recipe_name(options))
    if options.mode == "dora":
        config.set("peft.scheme", "dora", Origin("command line", "--mode"))
    if options.config:
        apply_yaml(config, Path(options.config))
    _apply_dataset(config, options.dataset)
    if options.deterministic:
        config.set("model.deterministic_mode", True, Origin("command line", "--deterministic"))
    _apply_convenience(config, options)
    apply_overrides(config, options.overrides)
    if options.dataset in ("megatron-indexed", "local-jsonl") and config.dataset.mock is None:
        config.set("dataset.mock", False, Origin("command line", "--dataset"))
    return config


def _apply_dataset(config: ConfigContainer, kind: str | None) -> None:
    known = _DATA[config.dataset.sft]
    if kind is not None and kind not in known:
        reason = next((why for names, why in _REFUSED_DATA.items() if kind in names), None)
        if kind in _DATA[not config.dataset.sft]:
            reason = f"this is no data for {'fine-tuning' if config.dataset.sft else 'pre-training'}"
        raise ConfigError(
            f"--dataset {kind}: {reason or 'there is no data set of this name'}; use {' or '.join(known)}"
        )
    if kind == "mock":
        config.set("dataset.mock", True, Origin("command line", "--dataset"))


def _apply_convenience(config: ConfigContainer, options: argparse.Namespace) -> None:
    problems = []
    for dest, (flags, path) in _CONVENIENCE.items():
        text = getattr(options, dest)
        if text is None:
            continue
        info = all_fields()[canonical(path)]
        kinds = members(info.type)
        try:
            value: Any = int(text) if int in kinds else float(text) if float in kinds else text
            config.set(path, coerce(value, info), Origin("command line", flags[-1]))
        except ValueError:
            expected = describe(info.type).removesuffix(" or null")
            problems.append(f"{flags[-1]}: expected {expected}, got {text!r}")
    if problems:
        raise ConfigError(problems)


def main(argv: Sequence[str]) -> int:
    """Train as a recipe and its overrides say; return the exit code.

    Raises:
        UserError: options that cannot be taken, or a run that cannot start.
    """
    options = parse_options(argv)
    config = configure(options)
    name = recipe_name(options)
    if options.dump_env:
        from lockstep.record.environment import environment_variables

        print("\n".join(f"{key}={value}" for key, value in sorted(environment_variables().items())))
    return launch(
        config,
        door="bridge",
        name=name,
        argv=argv,
        recipe=name,
        print_only=options.dry_run,
        show_samples=options.show_samples,
    )
