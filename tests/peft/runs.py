"""Runs that train adapters for a tiny Hugging Face model, through the flag door."""

import json
from pathlib import Path
from typing import Any

from lockstep.cli import main

FLAGS = (
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr-decay-iters 20 --mock-data "
    "--lr 1e-2 --eval-iters 0 --tokenizer-type NullTokenizer --vocab-size 69 --use-checkpoint-args --device cpu "
    "--hidden-dropout 0 --attention-dropout 0"
).split()


def flags(run: Path, base: Path, scheme: str, *words: str) -> list[str]:
    """Return the command line of a run."""
    given = [
        "pretrain-gpt",
        *FLAGS,
        "--run-dir",
        str(run),
        "--peft-scheme",
        scheme,
        "--lora-dim",
        "4",
        "--lora-alpha",
        "8",
    ]
    return [*given, "--pretrained-checkpoint", str(base), *words]


def trained(run: Path, base: Path, scheme: str, *words: str) -> tuple[dict[str, Any], list[float]]:
    """Train and return what the record says of the run, and its losses."""
    assert main(flags(run, base, scheme, *words)) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return json.loads((run / "run.json").read_text()), [line["lm_loss"] for line in lines if "lm_loss" in line]
