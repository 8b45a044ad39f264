"""Checkpoints of several processes: exact in the layout they come from, and equal in every other."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.errors import CommonError
from lockstep.lab.compare import compare_paths
from lockstep.training.checkpoint_index import read_index, read_whole
from tests.parallel.spawn import Turn, in_turn
from tests.training.checkpoint_runs import (
    CONTEXT,
    DROPOUT,
    FSDP,
    INTERLEAVED,
    PIPELINE,
    SEQUENCE,
    SHARDED,
    TENSOR,
    TWICE,
    damage,
    echo,
    recorded,
    take,
    train,
    train_aloud,
    train_on_a_full_disk,
)

_EXACT: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2+sp async dropout": (2, {**SEQUENCE, **DROPOUT, "checkpoint.async_save": True}),
    "sharded dp2 async dropout": (2, {**SHARDED, **DROPOUT, "checkpoint.async_save": True}),
    "tp2 x sharded dp2": (4, {**TENSOR, **SHARDED}),
    "cp2, sharded, dropout": (2, {**CONTEXT, **SHARDED, **DROPOUT}),
    "fsdp2 async dropout": (2, {**FSDP, **DROPOUT, "checkpoint.async_save": True}),
    "pp2 async dropout": (2, {**PIPELINE, **DROPOUT, "checkpoint.async_save": True}),
    "interleaved pp2 x sharded dp2": (4, {**INTERLEAVED, **SHARDED}),
}
_SOURCES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "sharded dp4": (4, SHARDED),
    "tp2 x sharded dp2": (4, {**TENSOR, **SHARDED}),
    "interleaved pp2 x sharded dp2": (4, {**INTERLEAVED, **SHARDED}),
    "tp2": (2, TENSOR),
    "fsdp2 twice": (4, {**FSDP, **TWICE}),
    "tp2 x fsdp2": (4, {**TENSOR, **FSDP}),
}
_MOVES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one to tp2+sp": ("one", 2, SEQUENCE),
    "one to sharded dp4": ("one", 4, SHARDED),
    "sharded dp4 to tp2": ("sharded dp4", 2, TENSOR),
    "tp2 x sharded dp2 to one": ("tp2 x sharded dp2", 1, {}),
    "tp2 to pp2": ("tp2", 2, PIPELINE),
    "interleaved pp2 x sharded dp2 to one": ("interleaved pp2 x sharded dp2", 1, {}),
    "one to pp2 x tp2": ("one", 4, {**PIPELINE, **TENSOR}),
    "fsdp2 twice to tp2": ("fsdp2 twice", 2, TENSOR),
    "tp2 x fsdp2 to sharded dp2 twice": ("tp2 x fsdp2", 4, {**SHARDED, **TWICE}),
    "interleaved pp2 x sharded dp2 to fsdp4": ("interleaved pp2 x sharded dp2", 4, FSDP),
    "tp2 x sharded dp2 to dp2": ("tp2 x sharded dp2", 2, {}),
}


def _saving(root: Path) -> dict[str, Any]:
    return {"checkpoint.save": str(root), "checkpoint.save_interval": 20, "train.exit_interval": 10}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all runs of this file, made in one spawn."""
    root = tmp_path_factory.mktemp("runs")
    turns = [Turn(1, train, ({}, root / "uninterrupted"))]
    for name, (processes, layout) in _SOURCES.items():
        turns.append(Turn(processes, train, ({**layout, **_saving(root / name / "ckpt")}, root / name / "first")))
    for name, (processes, layout) in _EXACT.items():
        folder = root / name
        loading = {"checkpoint.load": str(folder / "ckpt")}
        if name not in _SOURCES:
            turns.append(Turn(processes, train, ({**layout, **_saving(folder / "ckpt")}, folder / "first")))
        plain = {key: value for key, value in layout.items() if not key.startswith("checkpoint.")}
        turns.append(Turn(processes, train, (plain, folder / "whole")))
        turns.append(Turn(processes, train, ({**plain, **loading}, folder / "second")))
    for name, (source, processes, layout) in _MOVES.items():
        changes = {**layout, "checkpoint.load": str(root / source / "ckpt")}
        turns.append(Turn(processes, echo, (changes, root / name / "run", root / name / "echo")))
    take(turns)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", _EXACT)
def test_resumed_run_is_bitwise_the_uninterrupted_one(name, runs) -> None:
    folder = runs / name
    whole = recorded(folder / "whole")
    assert recorded(folder / "first") + recorded(folder / "second") == whole
    assert [line["iteration"] for line in whole if line["kind"] == "train"] == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.parametrize("name", _MOVES)
def test_another_layout_starts_from_the_same_numbers(name, runs) -> None:
    source = runs / _MOVES[name][0] / "ckpt" / "iter_0000010"
    target = runs / name / "echo" / "iter_0000010"
    before, after = read_index(source), read_index(target)
    assert set(before) == set(after)
    assert {name.split(".")[1] for name in before if name.startswith("optimizer.")} == {"main", "exp_avg", "exp_avg_sq"}
    for tensor, stored in before.items():
        assert torch.equal(read_whole(source, stored), read_whole(target, after[tensor])), tensor
    head, tail = (json.loads((folder / "manifest.json").read_text()) for folder in (source, target))
    for same in ("iteration", "progress", "schedules", "optimizer", "loss_scaler"):
        assert head[same] == tail[same]


@pytest.mark.slow
@pytest.mark.parametrize("name", _MOVES)
def test_another_layout_goes_on_within_rounding(name, runs) -> None:
    decision = compare_paths(runs / "uninterrupted", runs / name / "run").decision
    assert decision.verdict == "rounding", decision
    lines = [line for line in recorded(runs / name / "run") if line["kind"] == "train"]
    assert [line["iteration"] for line in lines] == list(range(11, 21))
    weights = json.loads((runs / name / "run" / "run.json").read_text())["initial_weights"]
    assert set(weights["parameters"]) == {
        tensor.removeprefix("model.")
        for tensor in read_index(runs / name / "echo" / "iter_0000010")
        if tensor.startswith("model.")
    }


@pytest.mark.slow
def test_the_processes_share_out_the_writing(runs) -> None:
    folder = runs / "sharded dp4" / "ckpt" / "iter_0000010"
    sizes = {file.name: file.stat().st_size for file in folder.glob("tensors-*.safetensors")}
    assert sorted(sizes) == [f"tensors-{rank:05d}-00001.safetensors" for rank in range(4)]
    assert max(sizes.values()) < 1.2 * min(sizes.values()), sizes


@pytest.mark.slow
def test_two_processes_have_one_outcome(tmp_path) -> None:
    root = tmp_path / "ckpt"
    short = {"train.train_iters": 2, "validation.eval_iters": 0, "checkpoint.save_interval": 2}
    saving = {**short, **DROPOUT, "checkpoint.save": str(root)}
    loading = {"train.train_iters": 2, "validation.eval_iters": 0, **DROPOUT, "checkpoint.load": str(root)}
    plain = {**loading, **dict.fromkeys(DROPOUT, 0.0)}
    alone_fsdp = {**loading, **FSDP, "checkpoint.load_optim": False}
    alone = {**loading, **SHARDED, "checkpoint.load_optim": False}
    full = {**short, "checkpoint.save": str(tmp_path / "full")}
    asynchronous = {**full, "checkpoint.async_save": True}
    written = "tensors-00001-00001.safetensors"
    turns = {
        "saves": Turn(2, train, (saving, tmp_path / "0")),
        "mixes": Turn(2, train, (saving, tmp_path / "1")),
        "one": Turn(1, train_aloud, (loading, tmp_path / "2")),
        "plain": Turn(1, train_aloud, (plain, tmp_path / "3")),
        "weights alone": Turn(2, echo, (alone, tmp_path / "8", tmp_path / "alone")),
        "weights alone, fsdp": Turn(2, echo, (alone_fsdp, tmp_path / "9", tmp_path / "alone fsdp")),
        "another model": Turn(2, train, ({**loading, "model.ffn_hidden_size": 32}, tmp_path / "4")),
        "disk 1": Turn(2, train_on_a_full_disk, (full, tmp_path / "5", 1)),
        "disk 0": Turn(2, train_on_a_full_disk, (asynchronous, tmp_path / "6", 0)),
        "damage": Turn(1, damage, (root / "iter_0000002" / written,)),
        "damaged": Turn(2, train, (loading, tmp_path / "7")),
    }
    results = dict(zip(turns, in_turn(list(turns.values())), strict=True))
    assert results["saves"] == ["finished", "finished"]
    assert results["weights alone"] == ["finished", "finished"]
    assert results["weights alone, fsdp"] == ["finished", "finished"]
    source = root / "iter_0000002"
    damage(source / written)  # Once more mends it.
    before = read_index(source)
    for target in (tmp_path / "alone" / "iter_0000002", tmp_path / "alone fsdp" / "iter_0000002"):
        after = read_index(target)
        for name in (name.removeprefix("model.") for name in before if name.startswith("model.")):
            weights = read_whole(source, before[f"model.{name}"])
            assert torch.equal(read_whole(target, after[f"model.{name}"]), weights)
            assert torch.equal(read_whole(target, after[f"optimizer.main.{name}"]), weights.float())
    for name, message in {
        "mixes": "already holds checkpoints of another run",
        "another model": "model.ffn_hidden_size is 32, in the checkpoint 24",
        "disk 1": "saving the checkpoint of iteration 2 to .* failed: .*No space left on device",
        "disk 0": "saving the checkpoint of iteration 2 to .* failed: .*No space left on device",
        "damaged": f"{written} is damaged: its contents have changed since it was saved",
    }.items():
        first, second = results[name]
        assert isinstance(first, CommonError), (name, first)
        assert isinstance(second, CommonError), (name, second)
        assert str(first) == str(second)
        assert re.search(message, str(first)), str(first)
        assert "\n" not in str(first)
    assert list((tmp_path / "full").iterdir()) == [], "half a checkpoint does not stay on a full disk"
    assert not any((tmp_path / name).exists() for name in ("1", "4", "7")), "nothing was trained"
    (lines,) = results["one"]
    assert lines[0].endswith(f"; resuming from {root} at iteration 2")
    assert any(line.startswith("another layout than the checkpoint's: processes = 1 (checkpoint: 2)") for line in lines)
    new = "dropout starts new random streams: those of the checkpoint are of data_parallel = 2, pipeline_parallel = 1"
    assert any(line.startswith(new) for line in lines)
    assert not any("random streams" in line for line in results["plain"][0])
