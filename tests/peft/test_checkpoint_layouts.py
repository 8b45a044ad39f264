"""Checkpoints of adapters in layouts: exact to resume, equal in every other, and those of one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.training.checkpoint_index import read_index, read_whole
from tests.parallel.spawn import Turn
from tests.training.checkpoint_runs import FSDP, PIPELINE, SEQUENCE, SHARDED, echo, recorded, take, train

_DORA: dict[str, Any] = {
    "peft.scheme": "dora",
    "peft.dim": 4,
    "peft.target_modules": ["linear_q", "linear_v", "linear_proj", "linear_fc1", "linear_fc2"],
    "peft.lora_B_init_method": "normal",
    "peft.dropout": 0.1,
    "train.train_iters": 6,
    "validation.eval_interval": 3,
}
_LAYOUTS: dict[str, dict[str, Any]] = {"tp": SEQUENCE, "pp": PIPELINE, "fsdp": FSDP}
_RESUMED = ("tp", "fsdp")
_MOVES: dict[str, tuple[str, dict[str, Any]]] = {
    "tp to one": ("tp", {}),
    "pp to fsdp": ("pp", FSDP),
    "fsdp to tp": ("fsdp", SEQUENCE),
    "tp to sharded": ("tp", SHARDED),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all runs of this file, made in one spawn."""
    root = tmp_path_factory.mktemp("runs")
    base = {"checkpoint.save": str(root / "base"), "checkpoint.save_interval": 2, "train.exit_interval": 2}
    adapted = {**_DORA, "checkpoint.pretrained_checkpoint": str(root / "base"), "mixed_precision.bf16": False}
    turns = [
        Turn(1, train, ({**base, "mixed_precision.bf16": False}, root / "run")),
        Turn(1, train, (adapted, root / "one")),
    ]
    for name, layout in _LAYOUTS.items():
        folder = root / name
        saves = str(folder / "ckpt")
        saving = {"checkpoint.save": saves, "checkpoint.save_interval": 20, "train.exit_interval": 3}
        turns.append(Turn(2, train, ({**adapted, **layout, **saving}, folder / "first")))
        if name in _RESUMED:
            turns.append(Turn(2, train, ({**adapted, **layout}, folder / "whole")))
            turns.append(Turn(2, train, ({**adapted, **layout, "checkpoint.load": saves}, folder / "second")))
    for name, (source, layout) in _MOVES.items():
        changes = {**adapted, **layout, "checkpoint.load": str(root / source / "ckpt")}
        turns.append(Turn(2 if layout else 1, echo, (changes, root / name / "run", root / name / "echo")))
    take(turns)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", _RESUMED)
def test_resumed_run_is_bitwise_the_uninterrupted_one(name: str, runs: Path) -> None:
    first, second, whole = (recorded(runs / name / part) for part in ("first", "second", "whole"))
    assert first + second == whole


@pytest.mark.slow
@pytest.mark.parametrize("name", _LAYOUTS)
def test_a_layout_starts_from_the_weights_and_adapters_of_one_process(name: str, runs: Path) -> None:
    ours, alone = (json.loads((runs / folder / "run.json").read_text()) for folder in (f"{name}/first", "one"))
    assert ours["initial_weights"]["fingerprint"] == alone["initial_weights"]["fingerprint"]
    first, expected = recorded(runs / name / "first")[0], recorded(runs / "one")[0]
    if name == "tp":  # others draw other dropout masks
        assert first["lm_loss"] == pytest.approx(expected["lm_loss"], rel=1e-5)
        assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", _MOVES)
def test_another_layout_starts_from_the_same_numbers(name: str, runs: Path) -> None:
    source = runs / _MOVES[name][0] / "ckpt" / "iter_0000003"
    target = runs / name / "echo" / "iter_0000003"
    before, after = read_index(source), read_index(target)
    assert set(before) == set(after)
    assert all(".adapter." in tensor for tensor in before)
    # layers; matrices and lengths of five adapters; weight and two moments
    assert len(before) == 4 * 5 * 3 * 3
    for tensor, stored in before.items():
        assert torch.equal(read_whole(source, stored), read_whole(target, after[tensor])), tensor
