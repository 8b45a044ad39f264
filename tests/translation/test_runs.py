"""Translated runs are the same runs: three iterations, bit for bit."""

import json
import shlex
from pathlib import Path

import pytest

from lockstep.config import ConfigContainer, resolve
from lockstep.errors import ConfigError
from lockstep.megatron_lm.parser import parse_flags
from lockstep.megatron_lm.translate import flags_from_config
from lockstep.recipes.door import parse_recipe_args
from lockstep.training import Command, run
from lockstep.translation.emit import words as words_of
from lockstep.translation.flags import read_flags
from lockstep.translation.translate import to_lockstep
from lockstep.translation.words import plain
from tests.commands import FLAGS, RECIPE
from tests.translation.common import RECIPE as NAME
from tests.translation.common import configurations

_SHRUNK = {
    "--num-layers": "2",
    "--hidden-size": "32",
    "--ffn-hidden-size": "64",
    "--num-attention-heads": "4",
    "--kv-channels": "8",
    "--num-query-groups": "2",
    "--seq-length": "16",
    "--max-position-embeddings": "16",
    "--micro-batch-size": "2",
    "--global-batch-size": "4",
    "--train-iters": "3",
    "--eval-iters": "1",
    "--tensor-model-parallel-size": "1",
    "--pipeline-model-parallel-size": "1",
    "--context-parallel-size": "1",
    "--tokenizer-type": "NullTokenizer",
}
"""What shrinking changes where a configuration has it."""
_DROPPED = (
    "--save",
    "--load",
    "--data-path",
    "--split",
    "--vocab-size",
    "--vocab-file",
    "--merge-file",
    "--tokenizer-model",
    "--data-cache-path",
    "--tensorboard-dir",
    "--async-save",
    "--ckpt-fully-parallel-load",
    "--mock-data",
    "--save-interval",
    "--save-retain-interval",
    "--use-checkpoint-opt_param-scheduler",
    "--sequence-parallel",
    "--num-layers-per-virtual-pipeline-stage",
    "--num-virtual-stages-per-pipeline-rank",
    "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers",
    "--pipeline-model-parallel-layout",
)


def _losses(config: ConfigContainer, run_dir: Path) -> list[dict[str, object]]:
    config.run.dir = str(run_dir)
    run(resolve(config), door="python", command=Command(["prog"], flags=""), name="tiny")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "tokens_per_second", "memory_bytes")
    assert [line["iteration"] for line in lines if line["kind"] == "train"][-1:] == [3]
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def _both(words: list[str], tmp_path: Path) -> None:
    overrides = words_of(to_lockstep(read_flags(plain(words)), NAME))
    config = parse_recipe_args(["--recipe", NAME, *overrides])
    back = flags_from_config(config)
    first = _losses(parse_flags(words), tmp_path / "flags")
    assert _losses(config, tmp_path / "overrides") == first
    assert parse_flags(back).as_dict() == parse_flags(flags_from_config(parse_flags(words))).as_dict()


def _three(words: list[str]) -> list[str]:
    """Return the reference command at three iterations and a tenth of its size."""
    small = dict(_SHRUNK, **{"--vocab-size": "64", "--eval-interval": "2"})
    result = list(words)
    for index, word in enumerate(words[:-1]):
        if word in small:
            result[index + 1] = small[word]
    return result


def test_the_reference_flags_and_their_translation(tmp_path: Path) -> None:
    _both(_three(FLAGS), tmp_path)


def test_the_reference_recipe_and_its_flags(tmp_path: Path) -> None:
    sizes = "model.hidden_size=32 model.ffn_hidden_size=64 dataset.seq_length=16 train.global_batch_size=4 "
    sizes += "train.micro_batch_size=2 train.train_iters=3 scheduler.lr_decay_iters=3 tokenizer.vocab_size=64"
    given = [
        word
        for word in RECIPE
        if not word.partition("=")[0].endswith(("_size", "iters", "seq_length", "sequence_length"))
    ]
    config = parse_recipe_args([*given, "scheduler.lr_warmup_iters=1", *sizes.split(), "validation.eval_iters=1"])
    flags = flags_from_config(config)
    assert flags[flags.index("--lr-warmup-iters") + 1] == "1"
    assert _losses(parse_flags(flags), tmp_path / "flags") == _losses(config, tmp_path / "recipe")


def _shrink(words: list[str]) -> list[str] | None:
    """Return a configuration at a tiny size, without what the trainer refuses beside the run; None if it cannot run."""
    reading = read_flags(plain(words))
    refused = {v.option.written.flag for v in to_lockstep(reading, NAME, waive_refused=True).of_class("waived")}
    result = ["--mock-data", "--vocab-size", "64", "--tokenizer-type", "NullTokenizer"]
    for option in reading.options:
        flag = option.written.flag
        if flag not in refused and flag not in _DROPPED and flag != "--tokenizer-type":
            result += [flag, *([_SHRUNK[flag]] if flag in _SHRUNK else option.written.values)]
    try:
        resolve(parse_flags(result))
    except ConfigError:
        return None
    return result


@pytest.mark.slow
def test_megatron_lms_own_configurations_shrunk(shared: Path, tmp_path: Path) -> None:
    shrunk: dict[str, list[str]] = {}
    for args in configurations(shared).values():
        if args[0].startswith("--") and (words := _shrink(args)) is not None:
            config = parse_flags(words)
            shrunk.setdefault(str([v for info, v, _ in config.items() if info.spec.effect == "run"]), words)
    assert len(shrunk) >= 10
    for number, words in enumerate(shrunk.values()):
        print(shlex.join(words))
        _both(words, tmp_path / str(number))
