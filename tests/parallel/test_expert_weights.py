"""Weights of experts that lie end to end, on several processes: in their buckets, and without a change of any bit."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from lockstep.models import expert_weights, moe, ops
from lockstep.models.expert_weights import lie_end_to_end
from lockstep.parallel import buckets
from lockstep.parallel.buckets import GradientBuckets, Reduction
from lockstep.parallel.mesh import Axis
from tests.parallel import sweep
from tests.parallel.spawn import on_processes

_LAYER = "decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc{}.weight"


def _named() -> list[tuple[str, nn.Parameter]]:
    names = ["embedding.weight"]
    for layer in (0, 1):
        names += [f"decoder.layers.{layer}.mlp.router.weight"]
        names += [_LAYER.format(layer, number, linear) for number in (9, 10, 11) for linear in (1, 2)]
    return [(name, nn.Parameter(torch.ones(4))) for name in names]


@pytest.mark.parametrize("size", [1, 5, 10, 16, 1000])
@pytest.mark.parametrize("apart", [True, False])
def test_the_experts_of_a_linear_follow_each_other_in_one_bucket(size: int, apart: bool) -> None:
    named, others = _named(), Axis()
    experts = Axis() if not apart else Axis(2, 0)
    reduction = Reduction(others, size, axis_of=lambda name: experts if "experts" in name else others)
    names = {param: name for name, param in named}
    found = GradientBuckets(named, torch.float32, reduction, sharded=False).buckets
    order = [[names[param] for param in bucket.params] for bucket in found]
    assert sorted(name for bucket in order for name in bucket) == sorted(name for name, _ in named)
    for layer in (0, 1):
        for linear in (1, 2):
            run = [_LAYER.format(layer, number, linear) for number in (9, 10, 11)]
            (bucket,) = (bucket for bucket in order if run[0] in bucket)
            assert bucket[bucket.index(run[0]) :][:3] == run
    if size == 1:
        assert [(bucket[0].split(".")[2:][:1], len(bucket)) for bucket in order[:4]] == [
            (["1"], 3),
            (["1"], 3),
            (["1"], 1),
            (["0"], 3),
        ]


_FULL = {
    "model.recompute_granularity": "full",
    "model.recompute_method": "uniform",
    "model.recompute_num_layers": 1,
}
_VIEWED = ("EP2 x DP2", "EP2 x sharded DP2, overlap", "sharded, recomputed", "sharded, buckets of some experts")
_FSDP = "EP2 x FSDP4, recomputation"
_LOW = {**sweep.KINDS["experts"], "mixed_precision.bf16": True, "optimizer.clip_grad": 1e9}
_SHARDED = {
    "model.expert_model_parallel_size": 2,
    "model.moe_token_dispatcher_type": "allgather",
    "ddp.use_distributed_optimizer": True,
}


def _cases() -> dict[str, dict[str, Any]]:
    of_sweep = {case.name: case.changes for case in sweep.CASES}
    return {
        **{name: of_sweep[name] for name in (*_VIEWED[:2], _FSDP)},
        _VIEWED[2]: {**_SHARDED, **_FULL},
        _VIEWED[3]: {**_SHARDED, "ddp.bucket_size": 1, "ddp.overlap_grad_reduce": True},
    }


def _equal(a: sweep.Outcome, b: sweep.Outcome) -> bool:
    pairs = ((a.grads, b.grads), (a.weights, b.weights))
    return a.losses == b.losses and all(x.keys() == y.keys() and all(x[n].equal(y[n]) for n in y) for x, y in pairs)


def _one_by_one(named: Any) -> Any:
    """Yield every parameter alone: the order of buckets before experts were kept together."""
    return ([pair] for pair in reversed(named))


def _compared() -> dict[str, dict[str, Any]]:
    """Run each case with views, and with stacks in their place, and one in another order of its buckets."""
    found: dict[str, dict[str, Any]] = {}
    taken: list[bool] = []

    def noted(weights: Any) -> bool:
        taken.append(lie_end_to_end(weights))
        return taken[-1]

    def play(changes: dict[str, Any], lies: Any) -> sweep.Outcome:
        config = sweep.configure({**_LOW, **changes}, 4)
        with mock.patch.object(expert_weights, "lie_end_to_end", lies):
            return sweep.play(config, sweep.build_mesh(config.model, "cpu"), torch.bfloat16)

    with (
        mock.patch.object(moe, "takes_grouped_products", return_value=True),
        mock.patch.object(ops, "_measured_mode", return_value="native"),
    ):
        for name, changes in _cases().items():
            taken.clear()
            viewed, stacked = play(changes, noted), play(changes, lambda _: False)
            found[name] = {"taken": {*taken}, "equal": _equal(viewed, stacked) and viewed.norms == stacked.norms}
            if name == "sharded, recomputed":
                taken.clear()
                with mock.patch.object(buckets, "_units_backwards", _one_by_one):
                    before = play(changes, noted)
                norms = max(abs(x - y) / y for x, y in zip(viewed.norms, before.norms, strict=True))
                found["other order"] = {"taken": {*taken}, "equal": _equal(viewed, before), "norms": norms}
    return found


@pytest.fixture(scope="module")
def compared() -> list[dict[str, dict[str, Any]]]:
    return on_processes(_compared, 4)


@pytest.mark.parametrize("name", _VIEWED)
def test_views_change_no_bit(name: str, compared: list[dict[str, dict[str, Any]]]) -> None:
    assert [found[name] for found in compared] == [{"taken": {True}, "equal": True}] * 4


def test_sharded_weights_are_stacked(compared: list[dict[str, dict[str, Any]]]) -> None:
    assert [found[_FSDP] for found in compared] == [{"taken": {False}, "equal": True}] * 4


def test_the_order_within_buckets_changes_no_sum(compared: list[dict[str, dict[str, Any]]]) -> None:
    """Norms are made of the norms of pieces, which begin and end elsewhere."""
    for found in compared:
        assert found["other order"]["taken"] == {False}
        assert found["other order"]["equal"]
        assert found["other order"]["norms"] < 1e-6
