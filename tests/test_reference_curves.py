"""Losses and gradient norms of Megatron-LM on a GPU, met by training on this machine's CPU from the same seed."""

import json
from pathlib import Path

import pytest

from lockstep.cli import main

ITERATIONS = 3
# What Megatron-LM's own FP32 twin of the first curve differs by, and a share of the norm's three printed decimals.
LOSS_BAND, NORM_BAND = 2e-4, 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["seed_nodrop", "llama_like"])
def test_first_iterations_follow_megatron_lm(name: str, shared: Path, tmp_path: Path) -> None:
    reference = json.loads((shared / "reference/megatron_lm_curves.json").read_text())["runs"][name]
    words = [*reference["flags"].split(), "--exit-interval", str(ITERATIONS), "--run-dir", str(tmp_path / "run")]
    assert main(["pretrain-gpt", *words]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["lm_loss"] for line in lines]
    assert len(losses) == ITERATIONS
    # Megatron-LM's second line still counts the first iteration in.
    printed = [losses[0], (losses[0] + losses[1]) / 2, *losses[2:]]
    for ours, theirs, line in zip(printed, reference["iterations"], lines, strict=False):
        assert ours == pytest.approx(theirs["lm_loss"], abs=LOSS_BAND)
        assert line["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=NORM_BAND)
        assert line["next_lr"] == pytest.approx(theirs["lr"], rel=1e-6)
