"""The pairs of commands that started it all: every setting that differs is named without being asked."""

import time
from pathlib import Path

import pytest

from lockstep.cli import main
from lockstep.lab.compare import Comparison, compare_paths

_FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --seq-length 64 "
    "--max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --eval-iters 0 "
    "--mock-data --bf16 --tokenizer-type NullTokenizer --vocab-size 100 --lr 3e-4 --min-lr 3e-5 --seed 1234"
)
_OVERRIDES = (
    "model.num_layers=2 model.hidden_size=32 model.num_attention_heads=4 model.ffn_hidden_size=64 "
    "model.seq_length=64 dataset.sequence_length=64 train.train_iters=4 train.global_batch_size=4 "
    "train.micro_batch_size=2 validation.eval_iters=0 optimizer.lr=3e-4 optimizer.min_lr=3e-5 "
    "scheduler.lr_decay_iters=4 rng.seed=1234 tokenizer.vocab_size=100"
)


def pair(folder: Path, overrides: str) -> Comparison:
    """Run both doors and compare the records, in less than ten seconds."""
    flags = ["pretrain-gpt", *_FLAGS.split(), "--run-dir", str(folder / "mlm")]
    recipe = ["train", "--recipe", "vanilla_gpt_pretrain_config", *_OVERRIDES.split(), *overrides.split()]
    assert main(flags) == 0
    assert main([*recipe, f"run.dir={folder / 'bridge'}"]) == 0
    started = time.monotonic()
    found = compare_paths(folder / "mlm", folder / "bridge")
    assert time.monotonic() - started < 10
    return found


def test_warmup_0_against_1_names_the_setting_and_the_first_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = pair(tmp_path, "scheduler.lr_warmup_iters=1 scheduler.lr_warmup_init=3e-4")
    assert found.decision.verdict == "config"
    assert found.decision.cause.startswith("scheduler.lr_warmup_iters (0 against 1) differs")
    schedule = next(stage for stage in found.stages if stage.name == "schedule")
    assert schedule.first == 2
    assert "learning rate of iteration 2" in schedule.detail


def test_settings_of_the_two_recipes_are_all_named(tmp_path: Path):
    changes = "scheduler.lr_decay_style=cosine optimizer.adam_beta2=0.95 optimizer.weight_decay=0.033"
    found = pair(tmp_path, f"{changes} scheduler.lr_warmup_iters=0 model.activation_func=quick_gelu")
    named = {d.path for d in found.findings.active}
    assert found.decision.verdict == "config"
    assert {
        "scheduler.lr_decay_style",
        "optimizer.adam_beta2",
        "optimizer.weight_decay",
        "model.activation_func",
    } <= named
    told = " ".join([found.decision.cause, *(d.path for d in found.findings.differences or [])])
    assert all(path in told for path in named)
