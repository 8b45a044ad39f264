"""Checkpoints of processes that share out experts: exact in their layout, and equal in every other."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lockstep.lab.compare import compare_paths
from lockstep.parallel import buckets
from lockstep.training.checkpoint_index import read_index, read_whole
from tests.parallel.spawn import Turn
from tests.training.checkpoint_runs import SEQUENCE, SHARDED, echo, recorded, take, train

_EXPERTS: dict[str, Any] = {
    "model.num_moe_experts": 4,
    "model.moe_ffn_hidden_size": 16,
    "model.add_bias_linear": False,
    "model.moe_aux_loss_coeff": [0.01],
    "mixed_precision.bf16": False,
    "train.check_weight_hash_across_dp_replicas_interval": 5,
}
_SHARED_OUT = {**_EXPERTS, "model.expert_model_parallel_size": 2, "model.moe_token_dispatcher_type": "alltoall"}
_WHOLE = {**_SHARED_OUT, **SEQUENCE, "model.expert_tensor_parallel_size": 1}
_FSDP = {
    **_SHARED_OUT,
    "dist.use_torch_fsdp2": True,
    "train.check_weight_hash_across_dp_replicas_interval": None,
}
_SOURCES: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, _SHARED_OUT),
    "sharded": (4, {**_SHARED_OUT, **SHARDED}),
    "fsdp": (4, _FSDP),
    "whole": (4, {**_WHOLE, **SHARDED}),
    "apart": (4, {**_SHARED_OUT, **SHARDED, "ddp.bucket_size": 2000}),
}
_MOVES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "ep2 to one": ("ep2", 1, _EXPERTS),
    "ep2 to ep2 x sharded dp2": ("ep2", 4, {**_SHARED_OUT, **SHARDED}),
    "ep2 x sharded dp2 to dp2": ("sharded", 2, _EXPERTS),
    "ep2 x fsdp4 to one": ("fsdp", 1, _EXPERTS),
    "ep2 to ep2 x fsdp2": ("ep2", 2, _FSDP),
    "ep2 x tp2 of whole experts x sharded dp2 to one": ("whole", 1, _EXPERTS),
    "ep2 to ep2 x tp2 of whole experts": ("ep2", 2, _WHOLE),
    "experts apart in their buckets to together": ("apart", 4, {**_SHARED_OUT, **SHARDED}),
}


def train_with_experts_apart(changes: dict[str, Any], run_dir: Path) -> str:
    """Train with buckets in the order of parameters, as they were before the experts of a linear stayed together."""
    with mock.patch.object(buckets, "_units_backwards", lambda named: ([pair] for pair in reversed(named))):
        return train(changes, run_dir)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all runs of this file, made in one spawn."""
    root = tmp_path_factory.mktemp("runs")
    turns = [Turn(1, train, (_EXPERTS, root / "one"))]
    for name, (processes, layout) in _SOURCES.items():
        folder = root / name
        saving = {"checkpoint.save": str(folder / "ckpt"), "checkpoint.save_interval": 20, "train.exit_interval": 10}
        job = train_with_experts_apart if name == "apart" else train
        turns.append(Turn(processes, job, ({**layout, **saving}, folder / "first")))
    processes, layout = _SOURCES["sharded"]
    loading = {"checkpoint.load": str(root / "sharded" / "ckpt")}
    turns.append(Turn(processes, train, (layout, root / "sharded" / "whole")))
    turns.append(Turn(processes, train, ({**layout, **loading}, root / "sharded" / "second")))
    for name, (source, processes, layout) in _MOVES.items():
        changes = {**layout, "checkpoint.load": str(root / source / "ckpt")}
        turns.append(Turn(processes, echo, (changes, root / name / "run", root / name / "echo")))
    take(turns)
    return root


@pytest.mark.slow
def test_resumed_run_is_bitwise_the_uninterrupted_one(runs) -> None:
    first, second, whole = (recorded(runs / "sharded" / name) for name in ("first", "second", "whole"))
    assert first + second == whole


@pytest.mark.slow
@pytest.mark.parametrize("name", _MOVES)
def test_another_layout_starts_from_the_same_numbers(name, runs) -> None:
    source = runs / _MOVES[name][0] / "ckpt" / "iter_0000010"
    target = runs / name / "echo" / "iter_0000010"
    before, after = read_index(source), read_index(target)
    assert set(before) == set(after)
    assert (
        sum(".local_experts." in tensor for tensor in before) == 4 * 4 * 2 * 3
    )  # layers, experts, linears; weight and two moments
    for tensor, stored in before.items():
        assert torch.equal(read_whole(source, stored), read_whole(target, after[tensor])), tensor


@pytest.mark.slow
def test_the_order_within_buckets_is_no_part_of_a_checkpoint(runs) -> None:
    together, apart = (runs / name / "ckpt" / "iter_0000010" for name in ("sharded", "apart"))
    ours, theirs = read_index(together), read_index(apart)
    assert ours.keys() == theirs.keys()
    for tensor, stored in ours.items():
        one, other = read_whole(together, stored), read_whole(apart, theirs[tensor])
        # Norms of gradients, by which both are clipped, are made of the norms of other pieces.
        assert float((one - other).norm()) <= 1e-4 * float(one.norm()), tensor


@pytest.mark.slow
@pytest.mark.parametrize("name", _MOVES)
def test_another_layout_goes_on_within_rounding(name, runs) -> None:
    decision = compare_paths(runs / "one", runs / name / "run").decision
    assert decision.verdict == "rounding", decision
    run = json.loads((runs / name / "run" / "run.json").read_text())
    one = json.loads((runs / "one" / "run.json").read_text())
    assert run["initial_weights"]["parameters"].keys() == one["initial_weights"]["parameters"].keys()
