"""Expert parallelism against one process: faults that the comparison must see, dropped tokens, BF16."""

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lockstep.config.model import ModelConfig
from lockstep.models import moe
from lockstep.models.moe import Dispatcher, Experts, MixtureOfExperts
from lockstep.models.router import Router, RouterLosses
from lockstep.models.sequence import WholeSequence
from lockstep.parallel.experts import GatheringDispatcher, TravellingDispatcher, keep_experts
from lockstep.parallel.mesh import Axis, Mesh
from lockstep.training.optimizer import Optimizer
from lockstep.training.setup import build_parallel_model, build_passes
from lockstep.training.step import TrainStep
from tests.parallel import sweep
from tests.parallel.spawn import on_processes
from tests.parallel.test_gradient_sync import Collectives

_CASE = next(case for case in sweep.CASES if case.name == "EP2 x DP2")
_ALL = next(case for case in sweep.CASES if case.name == "EP4")
_CONTEXT = next(case for case in sweep.CASES if case.name == "CP2 x EP4 by all-gather")
_WHOLE = next(case for case in sweep.CASES if case.name == "EP2 x ETP1 x TP2+SP x sharded DP2")
_SHARDED = next(case for case in sweep.CASES if case.name == "EP2 x FSDP4, recomputation")
_KEPT = next(case for case in sweep.CASES if case.name == "EP2 x FSDP4 of gradients, once a step")
_DROPS = {"model.moe_expert_capacity_factor": 0.75}
_SCALED = {
    "model.moe_router_load_balancing_type": ["sinkhorn"],
    "model.moe_aux_loss_coeff": [0.0],
    "model.moe_router_score_function": "softmax",
    "model.moe_router_enable_expert_bias": False,
}
_CPU = torch.device("cpu")
_POLICIES = ("probs", "position")
_DISPATCHERS = ("alltoall", "allgather")


def _left_out_of_the_norm(model: Any, step: Any, optimizer: Any) -> None:
    """Count the experts of this process alone."""
    optimizer._gradients._mesh.ep.sum_ = lambda sums: sums


def _expert_buckets(optimizer: Any) -> Any:
    mesh = optimizer._gradients._mesh
    return [bucket for bucket in optimizer.weights._gradients.buckets if bucket.axis == mesh.expert_replicas]


def _gradients_over_all_replicas(model: Any, step: Any, optimizer: Any) -> None:
    """Add up the gradients of different experts."""
    for bucket in _expert_buckets(optimizer):
        bucket.axis = optimizer._gradients._mesh.replicas


def _gradients_of_one_process(model: Any, step: Any, optimizer: Any) -> None:
    for bucket in _expert_buckets(optimizer):
        bucket.axis = Axis()


def _others_over_expert_replicas(model: Any, step: Any, optimizer: Any) -> None:
    mesh = optimizer._gradients._mesh
    for bucket in optimizer.weights._gradients.buckets:
        bucket.axis = mesh.expert_replicas


def _auxiliary_loss_by_the_wrong_group(model: Any, step: Any, optimizer: Any) -> None:
    """Count the losses of routers once for every process that shares out experts."""
    train, size = step._passes.train, optimizer._gradients._mesh.ep.size
    step._passes.train = lambda batch, micro, objective, weight: train(batch, micro, objective, weight / size)


def _loads_of_a_part_of_the_sequence(model: Any, step: Any, optimizer: Any) -> None:
    model.sequence.total = lambda counts: counts


def _tokens_of_a_part_of_the_sequence(model: Any, step: Any, optimizer: Any) -> None:
    for module in model.modules():
        if isinstance(module, Router):
            part: Any = WholeSequence()
            part.total = model.sequence.total
            module.sequence = part


def _of_one_tensor_parallel_process(model: Any, step: Any, optimizer: Any) -> None:
    """Leave the experts of the other tensor-parallel processes out of the norm."""
    optimizer._gradients._mesh = dataclasses.replace(optimizer._gradients._mesh, whole_experts=False)


def _tokens_without_those_of_others(model: Any, step: Any, optimizer: Any) -> None:
    """Give the router the gradient of this process's part of the sequence alone."""
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.dispatcher.dispatch = partial(_dispatch_part, module.dispatcher)  # type: ignore[method-assign]


def _dispatch_part(dispatcher: Any, x: Any, assignment: Any) -> Any:
    axis = dispatcher.mesh.tp

    def own(values: Any) -> Any:
        return values.unflatten(0, (x.shape[0], -1)).chunk(axis.size, dim=1)[axis.rank].flatten(0, 1)

    parts = {name: own(getattr(assignment, name)) for name in ("experts", "weights")}
    return dispatcher.inner.dispatch(x, dataclasses.replace(assignment, **parts))


def _sharded_experts(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Experts)]


def _mean_over_expert_replicas(model: Any, step: Any, optimizer: Any) -> None:
    for experts in _sharded_experts(model):
        experts.set_gradient_divide_factor(2.0)


def _experts_in_other_processes_left_out(model: Any, step: Any, optimizer: Any) -> None:
    mesh = optimizer._gradients._mesh
    optimizer._gradients._mesh = dataclasses.replace(mesh, shards=mesh.expert_replicas)


def _experts_without_gradients(model: Any, step: Any, optimizer: Any) -> None:
    """Keep the gradients of experts whole, for a later pass that does not come."""

    def keep(*_: Any) -> None:
        for experts in _sharded_experts(model):
            experts.set_requires_gradient_sync(False)

    model.register_forward_pre_hook(keep)


_SHARDED_FAULTS = {
    "mean of gradients over the replicas of experts": _mean_over_expert_replicas,
    "sharded experts of other processes left out of the norm": _experts_in_other_processes_left_out,
    "gradients of sharded experts kept whole": _experts_without_gradients,
}
_WHOLE_FAULTS = {
    "experts of one tensor-parallel process in the norm": _of_one_tensor_parallel_process,
    "a router's gradient of a part of the sequence": _tokens_without_those_of_others,
}
_CONTEXT_FAULTS = {
    "loads of a part of the sequence": _loads_of_a_part_of_the_sequence,
    "tokens of a part of the sequence": _tokens_of_a_part_of_the_sequence,
}
_SCALED_FAULT = "scores scaled by a part of the sequence"
_FAULTS = {
    "experts left out of the norm": _left_out_of_the_norm,
    "gradients of experts over all replicas": _gradients_over_all_replicas,
    "gradients of experts of one process": _gradients_of_one_process,
    "other gradients over the replicas of experts": _others_over_expert_replicas,
    "auxiliary loss by the wrong group": _auxiliary_loss_by_the_wrong_group,
}


def _everything() -> dict[str, Any]:
    """Run the faults, and jobs that the sweep has not, in one start of the processes."""
    found: dict[str, Any] = {}
    kind = sweep.KINDS["experts"]
    config, mesh = sweep.configure({**kind, **_CASE.changes}, 4), sweep.mesh_of(_CASE)
    expected = sweep.play(sweep.configure(kind, 1), Mesh())
    for name, fault in {"none": None, **_FAULTS}.items():
        apart = dataclasses.replace(mesh, ep=_Open(mesh.ep.size, mesh.ep.rank, mesh.ep.group))
        found[name] = sweep.compare("experts", name, sweep.play(config, apart, sabotage=fault), expected)
    config, mesh = sweep.configure({**kind, **_CONTEXT.changes}, 4), sweep.mesh_of(_CONTEXT)
    for name, fault in _CONTEXT_FAULTS.items():
        found[name] = sweep.compare("experts", name, sweep.play(config, mesh, sabotage=fault), expected)
    config, mesh = sweep.configure({**kind, **_WHOLE.changes}, 4), sweep.mesh_of(_WHOLE)
    for name, fault in _WHOLE_FAULTS.items():
        found[name] = sweep.compare("experts", name, sweep.play(config, mesh, sabotage=fault), expected)
    config, mesh = sweep.configure({**kind, **_SHARDED.changes}, 4), sweep.mesh_of(_SHARDED)
    for name, fault in {"sharded": None, **_SHARDED_FAULTS}.items():
        found[name] = sweep.compare("experts", name, sweep.play(config, mesh, sabotage=fault), expected)
    found["order"] = _order_of_reductions(mesh)
    for policy in _POLICIES:
        job = {**kind, **_DROPS, "model.moe_token_drop_policy": policy}
        one = sweep.play(sweep.configure(job, 1), Mesh())
        outcome = sweep.play(sweep.configure({**job, **_CONTEXT.changes}, 4), sweep.mesh_of(_CONTEXT))
        found[f"drops by {policy}, context parallel"] = sweep.compare("experts", policy, outcome, one)
    job = {**kind, **_SCALED}
    one = sweep.play(sweep.configure(job, 1), Mesh())
    for name, case in {"context parallel": _CONTEXT, "whole experts": _WHOLE}.items():
        outcome = sweep.play(sweep.configure({**job, **case.changes}, 4), sweep.mesh_of(case))
        found[f"scaled scores, {name}"] = sweep.compare("experts", name, outcome, one)
    config, mesh = sweep.configure({**job, **_CONTEXT.changes}, 4), sweep.mesh_of(_CONTEXT)
    outcome = sweep.play(config, mesh, sabotage=_loads_of_a_part_of_the_sequence)
    found[_SCALED_FAULT] = sweep.compare("experts", "loads", outcome, one)
    mesh = sweep.mesh_of(_ALL)
    low = {**kind, "mixed_precision.bf16": True}
    for name, job, dtype in (("drops", {**kind, **_DROPS}, torch.float64), ("bf16", low, torch.bfloat16)):
        one = sweep.play(sweep.configure(job, 1), Mesh(), dtype)
        for dispatcher in _DISPATCHERS:
            changes = {**job, **_ALL.changes, "model.moe_token_dispatcher_type": dispatcher}
            outcome = sweep.play(sweep.configure(changes, 4), mesh, dtype)
            found[f"{name} {dispatcher}"] = sweep.compare("experts", name, outcome, one)
    return found


def _order_of_reductions(mesh: Mesh) -> list[int]:
    """Return the elements of each reduction of gradients in a step with sharded weights, in their order."""
    config = sweep.configure({**sweep.KINDS["experts"], **_KEPT.changes}, 4)
    model, spans, _ = build_parallel_model(config, mesh, _CPU, torch.float64)
    optimizer = Optimizer(model, config, mesh)
    step = TrainStep(build_passes(config, model, spans, mesh, _CPU), optimizer, dp=mesh.dp)
    with Collectives() as collectives:
        step(sweep.share(sweep.global_batch(config, 0), 2, mesh.dp), 2, 1e-2, 0.01)
    return collectives.reduced


class _Open(Axis):
    """An axis of which a fault can replace a method."""

    __setattr__ = object.__setattr__


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_processes(_everything, 4)


@pytest.mark.parametrize(
    "job",
    [
        "none",
        "sharded",
        *(f"drops {dispatcher}" for dispatcher in _DISPATCHERS),
        *(f"drops by {policy}, context parallel" for policy in _POLICIES),
        "scaled scores, context parallel",
        "scaled scores, whole experts",
    ],
)
def test_several_processes_find_what_one_finds(results, job: str) -> None:
    assert [found[job] for found in results if not found[job].passes] == []


@pytest.mark.parametrize("fault", [*_FAULTS, *_CONTEXT_FAULTS, *_WHOLE_FAULTS, *_SHARDED_FAULTS, _SCALED_FAULT])
def test_a_planted_fault_is_seen(results, fault: str) -> None:
    assert any(not found[fault].passes for found in results)


def test_sharded_experts_are_added_up_with_their_layer_and_not_at_the_end(results) -> None:
    for found in results:
        *pairs, _, _ = found["order"]  # of three layers with their experts, a layer without, and what is left
        experts, layers = pairs[::2], pairs[1::2]
        assert len(experts) == len(layers) == 3
        assert (len({*experts}), len({*layers}), len({*pairs})) == (1, 1, 2)


@pytest.mark.parametrize("dispatcher", _DISPATCHERS)
def test_bf16_moves_by_rounding_only(results, dispatcher: str) -> None:
    for found in results:
        row = found[f"bf16 {dispatcher}"]
        assert row.norm < 2e-2
        assert 0 < row.grads < 5e-2


class _Twice(Axis):
    """Two processes that have the same; none waits for another."""

    def stacked(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor] * self.size)

    def split_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.sum(dim=0)


@pytest.mark.parametrize("capacity", [None, 0.75])
def test_no_number_goes_to_the_host_unless_tokens_travel(capacity: float | None, monkeypatch) -> None:
    """Tensors without numbers raise where one is asked for, or where a size depends on them."""
    monkeypatch.setattr(moe, "takes_grouped_products", lambda *_: True)
    changes = {**sweep.KINDS["experts"], "model.moe_expert_capacity_factor": capacity}
    config = sweep.configure(changes, 1).model

    def run(kind: type[Dispatcher]) -> None:
        with FakeTensorMode():
            block = MixtureOfExperts(config, 1, dtype=torch.bfloat16, device=torch.device("cpu"))
            axis = _Twice(size=2, rank=1)
            keep_experts(block.experts, axis)
            block.dispatcher = kind(axis)  # type: ignore[call-arg]
            x = torch.randn(2, 8, config.hidden_size or 0, dtype=torch.bfloat16, requires_grad=True)
            block(x, RouterLosses(1.0))[0].sum().backward()

    run(GatheringDispatcher)
    with pytest.raises(DataDependentOutputException):
        run(TravellingDispatcher)


def test_every_process_keeps_the_numbers_of_its_experts() -> None:
    config = ModelConfig(num_moe_experts=6, hidden_size=4, moe_ffn_hidden_size=4, num_layers=1)
    experts = Experts(config, dtype=torch.float32, device=torch.device("meta"))
    keep_experts(experts, Axis(size=3, rank=1))
    assert [*experts.local_experts] == ["2", "3"]
