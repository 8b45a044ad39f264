"""Gradients in buckets: layout, when reductions start, and that overlap changes no bit."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from lockstep.config import ConfigContainer
from lockstep.parallel.buckets import Bucket, GradientBuckets, Reduction, bucket_size
from lockstep.parallel.mesh import Axis, Mesh
from lockstep.parallel.placement import Placement
from lockstep.training.checkpoint_state import model_tensors
from lockstep.training.setup import build_parallel_model
from lockstep.training.sharded import ShardedMainWeights, _Weights
from tests.parallel import sweep
from tests.parallel.spawn import on_processes


@dataclass(frozen=True)
class _Watched(Axis):
    """Two processes of which the other one has no gradients; keeps the lengths of what is reduced."""

    size: int = 2
    lengths: list[int] = field(default_factory=list)

    def begin_sum(self, tensor: torch.Tensor) -> None:
        self.lengths.append(len(tensor))


def _params(*sizes: int) -> list[tuple[str, nn.Parameter]]:
    return [(str(number), nn.Parameter(torch.ones(size))) for number, size in enumerate(sizes)]


def _buckets(
    named: list[tuple[str, nn.Parameter]], size: int, *, overlap: bool = True, late: str = ""
) -> tuple[GradientBuckets, list[int]]:
    axis = _Watched()
    reduction = Reduction(axis, size, overlap=overlap, late=lambda name: name == late)
    return GradientBuckets(named, torch.float32, reduction, sharded=False), axis.lengths


def test_buckets_follow_the_parameters_backwards_and_late_ones_come_last() -> None:
    named = _params(4, 2, 6, 3)
    buckets, _ = _buckets(named, 5, late="2")
    names = {param: name for name, param in named}
    assert [[names[p] for p in bucket.params] for bucket in buckets.buckets] == [["3", "1"], ["0"], ["2"]]
    assert [bucket.length for bucket in buckets.buckets] == [6, 4, 6]  # two processes divide 6, 4 and 6


def test_a_bucket_starts_with_the_last_gradient_of_the_last_micro_batch() -> None:
    named = _params(4, 2, 6)
    buckets, lengths = _buckets(named, 1)
    for _ in range(2):  # the second step must not see the first
        lengths.clear()
        buckets.start_step(2)
        for _, param in named:
            param.sum().backward()
        assert lengths == []
        named[2][1].sum().backward()
        assert lengths == [6]
        named[0][1].sum().backward()
        assert lengths == [6]  # in order: the second bucket has not begun
        named[1][1].sum().backward()
        assert lengths == [6, 2, 4]
        grads = buckets.finish()
        assert lengths == [6, 2, 4]
        assert all(grad.eq(2.0).all() for grad in grads)


@pytest.mark.parametrize("overlap", [True, False])
def test_what_no_micro_batch_reached_is_zero_and_reduced_at_the_end(overlap: bool) -> None:
    named = _params(4, 2, 6)
    buckets, lengths = _buckets(named, 1, overlap=overlap)
    buckets.start_step(1)
    for _, param in named:
        param.sum().backward()
    buckets.finish()
    lengths.clear()
    buckets.start_step(1)
    for number in (2, 0):
        named[number][1].sum().backward()
    assert lengths == ([6] if overlap else [])
    assert [float(grad.sum()) for grad in buckets.collected()] == [4.0, 0.0, 6.0]
    buckets.finish()
    assert lengths == [6, 2, 4]


def test_late_gradients_wait_for_the_end() -> None:
    named = _params(4, 2)
    buckets, lengths = _buckets(named, 1, late="1")
    buckets.start_step(1)
    for _, param in named:
        param.sum().backward()
    assert lengths == [4]


def test_a_gradient_after_the_last_is_not_lost_in_silence() -> None:
    named = _params(4)
    buckets, _ = _buckets(named, 1)
    buckets.start_step(1)
    named[0][1].sum().backward()
    with pytest.raises(AssertionError, match="more gradients than micro-batches"):
        named[0][1].sum().backward()


def test_the_parts_of_all_processes_cover_each_parameter_once() -> None:
    params = [param for _, param in _params(4, 2, 5)]
    found: dict[nn.Parameter, list[int]] = {param: [] for param in params}
    for rank in range(3):
        for param, (begin, end), place in Bucket(params, torch.float32, Reduction(Axis(3, rank))).pieces():
            found[param] += range(begin, end)
            assert place.stop - place.start == end - begin
    assert [found[param] for param in params] == [list(range(len(param))) for param in params]


def test_parts_are_filled_up() -> None:
    bucket = Bucket([param for _, param in _params(4, 2, 5)], torch.float32, Reduction(Axis(2, 0), multiple=16))
    assert bucket.length == 32
    assert [len(view) for view in bucket.views(bucket.grads)] == [4, 2, 5]


def test_the_size_of_a_bucket() -> None:
    config = ConfigContainer()
    assert bucket_size(config, 10**9, 8) == 40_000_000
    assert bucket_size(config, 10**9, 64) == 64_000_000
    config.ddp.bucket_size = 1000
    assert bucket_size(config, 10**9, 64) == 1000
    config.ddp.bucket_size, config.ddp.num_buckets = None, 7
    assert bucket_size(config, 700, 64) == 100


def test_a_checkpoint_waits_for_weights_under_way() -> None:
    config = sweep.configure({}, 1)
    model, _, _ = build_parallel_model(config, Mesh(), torch.device("cpu"), torch.float32)
    waited: list[bool] = []
    model.register_state_dict_pre_hook(lambda *_: waited.append(True))
    tensors = model_tensors(model, Placement(config.model, Mesh()))
    assert waited == [True]
    assert len(tensors) == len(list(model.parameters()))


_BUCKETS = {"ddp.bucket_size": 5000}
_OVERLAP = {"ddp.overlap_grad_reduce": True}
_GATHER = {"ddp.use_distributed_optimizer": True}
_BF16 = {"mixed_precision.bf16": True}
_CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "DP4, BF16 gradients": (torch.bfloat16, {**_BF16, "ddp.grad_reduce_in_fp32": False}),
    "sharded DP4, float64": (torch.float64, _GATHER),
    "TP2+SP x sharded DP2, BF16": (
        torch.bfloat16,
        {**_BF16, "model.tensor_model_parallel_size": 2, "model.sequence_parallel": True, **_GATHER},
    ),
    "PP2 interleaved x sharded DP2, BF16": (
        torch.bfloat16,
        {
            **_BF16,
            "model.pipeline_model_parallel_size": 2,
            "model.virtual_pipeline_model_parallel_size": 2,
            **_GATHER,
        },
    ),
}


class _Idle(_Weights):
    """Weights that travel only when something waits for them."""

    _asked = False

    def gather(self) -> None:
        self._asked = True

    def wait(self) -> None:
        if self._asked:
            self._asked = False
            super().gather()
            super().wait()


def _make_idle(model: Any, step: Any, optimizer: Any) -> None:
    if isinstance(optimizer.weights, ShardedMainWeights):
        for weights in optimizer.weights._weights:
            weights.__class__ = _Idle


def _forget_to_wait(model: Any, step: Any, optimizer: Any) -> None:
    """Let the last layer of each process use its weights before they are there."""
    _make_idle(model, step, optimizer)
    list(model.decoder.layers.values())[-1]._forward_pre_hooks.clear()


def _equal(a: sweep.Outcome, b: sweep.Outcome) -> bool:
    return a.norms == b.norms and all(
        torch.equal(x[name], y[name]) for x, y in ((a.grads, b.grads), (a.weights, b.weights)) for name in y
    )


def _compared() -> dict[str, bool]:
    """Tell of each case whether a job with overlap is the job without, bit for bit."""
    found = {}
    for name, (dtype, changes) in _CASES.items():
        gather = {"ddp.overlap_param_gather": "ddp.use_distributed_optimizer" in changes}
        plain = sweep.configure({**changes, **_BUCKETS}, 4)
        late = sweep.configure({**changes, **_BUCKETS, **_OVERLAP, **gather}, 4)
        mesh = sweep.build_mesh(plain.model, "cpu")
        expected = sweep.play(plain, mesh, dtype)
        found[name] = _equal(sweep.play(late, mesh, dtype, sabotage=_make_idle), expected)
    # The last case, whose layers are spread over the processes.
    found["planted"] = _equal(sweep.play(late, mesh, dtype, sabotage=_forget_to_wait), expected)
    return found


@pytest.fixture(scope="module")
def compared() -> list[dict[str, bool]]:
    return on_processes(_compared, 4)


def test_overlap_changes_no_bit(compared: list[dict[str, bool]]) -> None:
    for found in compared:
        same = {name: equal for name, equal in found.items() if name != "planted"}
        assert len(same) == len(_CASES)
        assert all(same.values()), same


def test_a_layer_that_does_not_wait_is_seen(compared: list[dict[str, bool]]) -> None:
    assert not any(found["planted"] for found in compared)
