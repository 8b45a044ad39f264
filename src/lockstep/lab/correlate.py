"""Running one job through both doors, from fresh directories, and comparing the two runs."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lockstep.errors import UserError
from lockstep.lab.compare import compare_paths
from lockstep.lab.report import show, write_report
from lockstep.recipes.translate import DEFAULT_RECIPE
from lockstep.record.paths import PARENT, fresh_dir

REFERENCE_FLAGS = (
    "--num-layers 2 --hidden-size 256 --num-attention-heads 4 --ffn-hidden-size 1024 --seq-length 512 "
    "--max-position-embeddings 512 --micro-batch-size 4 --global-batch-size 32 --train-iters 10 --eval-iters 2 "
    "--eval-interval 10 --mock-data --bf16 --use-mcore-models --tokenizer-type NullTokenizer --vocab-size 32000 "
    "--lr 3e-4 --min-lr 3e-5 --seed 1234 --log-interval 1"
)
REFERENCE_OVERRIDES = (
    "model.num_layers=2 model.hidden_size=256 model.num_attention_heads=4 model.ffn_hidden_size=1024 "
    "model.seq_length=512 dataset.sequence_length=512 train.train_iters=10 train.global_batch_size=32 "
    "train.micro_batch_size=4 validation.eval_interval=10 validation.eval_iters=2 optimizer.lr=3e-4 "
    "optimizer.min_lr=3e-5 scheduler.lr_warmup_iters=0 scheduler.lr_decay_iters=10 rng.seed=1234 logger.log_interval=1"
)
"""The matched reference pair: the two commands of the documentation with warm-up 0 on both sides."""

_RUN_DIR = re.compile(r"--run[-_]dir(=.*)?|run\.dir=.*")


@dataclass(frozen=True)
class Pair:
    """Arguments of the two doors: flags, and ``--recipe NAME key=value ...``."""

    flags: list[str]
    recipe: list[str]


def correlate(mlm: str | None, bridge: str | None, out: Path | None, calibrated: bool = False) -> int:
    """Run a pair, write the report beside the runs, and return the exit code of the comparison.

    ``calibrated`` has the band of the flag side measured before the comparison. Both sides are checked before either
    starts. They run one after the other: on a small machine two at a time would only get in each other's way.

    Raises:
        UserError: bad flags or overrides, a folder that is not empty, or a side that fails.
    """
    from lockstep.recipes.translate import spell

    pair = build_pair(mlm, bridge)
    folder = new_folder(out)
    print(f"correlate: writing to {folder}", flush=True)
    flags_dir, recipe_dir = folder / "mlm", folder / "bridge"
    run_side("mlm", ["pretrain-gpt", *pair.flags, "--run-dir", str(flags_dir)], folder)
    run_side("bridge", ["train", *pair.recipe, f"run.dir={spell(str(recipe_dir))}"], folder)
    if calibrated:
        measure_band(flags_dir)
    found = compare_paths(flags_dir, recipe_dir)
    show(found)
    print(f"report: {write_report(found, folder)[-1]}")
    return found.exit_code


def measure_band(run_dir: Path) -> None:
    """Measure what rounding does to a side, and keep it beside its record, where the comparison finds it."""
    from lockstep.lab.calibration.calibrate import calibrate

    calibrate(run_dir, partial(print, flush=True))


def build_pair(mlm: str | None, bridge: str | None) -> Pair:
    """Return the arguments of both sides; a side that is not given is derived from the other by the tree.

    Raises:
        UserError: either side does not parse or cannot run.
    """
    from lockstep.config.resolve import resolve
    from lockstep.megatron_lm.parser import parse_flags
    from lockstep.megatron_lm.translate import flags_from_config
    from lockstep.recipes.door import parse_recipe_args
    from lockstep.recipes.translate import overrides_from_config

    if mlm is None and bridge is None:
        mlm, bridge = REFERENCE_FLAGS, f"{DEFAULT_RECIPE} {REFERENCE_OVERRIDES}"
    flags = split_words("--mlm", mlm) if mlm is not None else None
    recipe = _recipe_arguments(split_words("--bridge", bridge)) if bridge is not None else None
    if recipe is None:
        overrides = overrides_from_config(parse_flags(flags or []), DEFAULT_RECIPE)
        recipe = ["--recipe", DEFAULT_RECIPE, *overrides]
    if flags is None:
        flags = flags_from_config(parse_recipe_args(recipe))
    resolve(parse_flags(flags))
    resolve(parse_recipe_args(recipe))
    return Pair(flags, recipe)


def split_words(option: str, text: str) -> list[str]:
    """Split an option's words; a run directory among them is refused."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{option}: {error} in {text!r}; close the quotes") from None
    given = next((word for word in words if _RUN_DIR.fullmatch(word)), None)
    if given:
        raise UserError(f"{option}: leave {given} out; correlate gives each side a fresh directory under --out")
    return words


def _recipe_arguments(words: list[str]) -> list[str]:
    """Take ``NAME key=value ...`` or ``--recipe NAME key=value ...``; overrides alone mean the vanilla recipe."""
    if any(word == "--recipe" or word.startswith("--recipe=") for word in words):
        return words
    if words and "=" not in words[0] and not words[0].startswith("-"):
        return ["--recipe", *words]
    return ["--recipe", DEFAULT_RECIPE, *words]


def new_folder(out: Path | None, job: str = "correlate") -> Path:
    """Return the folder to write to: the one given, which has to be new or empty, or a fresh one."""
    if out is None:
        return fresh_dir(Path.cwd() / PARENT / job)
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = sorted(path.name for path in out.iterdir())
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give a new or an empty folder") from None
    if held:
        raise UserError(f"--out {out} is not empty (it holds {held[0]}); give a new or an empty folder")
    return out.resolve()


def run_side(name: str, arguments: list[str], folder: Path, variables: dict[str, str] | None = None) -> Path:
    """Run one side of Lockstep as its own process; see ``run_logged``."""
    given = [f"{key}={value}" for key, value in (variables or {}).items()]
    print(f"[{name}] {shlex.join([*given, 'lockstep', *arguments])}", flush=True)
    return run_logged(name, [sys.executable, "-m", "lockstep.cli", *arguments], folder, variables)


def run_logged(name: str, command: list[str], folder: Path, variables: dict[str, str] | None = None) -> Path:
    """Run a command, show its output with a prefix, and return the file that keeps it, ``<name>.log``.

    Raises:
        UserError: it ends with another exit code than 0.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(variables or {})}
    log = folder / f"{name}.log"
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            sys.stdout.write(f"[{name}] {line}")
            sys.stdout.flush()
    if process.returncode:
        raise UserError(f"the {name} side ended with exit code {process.returncode}; its output is in {log}")
    return log
