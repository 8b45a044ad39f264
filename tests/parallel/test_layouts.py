"""Every layout against one process, and faults that the comparison must see."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lockstep.config.model import ModelConfig
from lockstep.parallel.exchange import joined, whole
from lockstep.parallel.gradients import Gradients
from lockstep.parallel.mesh import Axis, Mesh
from lockstep.parallel.plan import Shard, has_partial_gradient, shard_of
from lockstep.training.feed import Batch
from tests.parallel import sweep
from tests.parallel.spawn import on_processes

_CASE = next(case for case in sweep.CASES if case.name == "TP2+SP x DP2")
_CONTEXT = next(case for case in sweep.CASES if case.name == "CP2 x DP2")
_PIPELINE = next(case for case in sweep.CASES if case.name == "PP2 x DP2")


class _NoPartial(Gradients):
    """Forgets that gradients of norms are partial under sequence parallelism."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._partial = [False] * len(self._partial)


class _CountedTwice(Gradients):
    """Adds up the squares of whole parameters over the tensor-parallel processes too."""

    def norms(self, tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self._split = [True] * len(self._split)
        return super().norms(tensors)


def _replaced(kind: type[Gradients]) -> Callable[..., None]:
    def sabotage(model: Any, step: Any, optimizer: Any) -> None:
        good = optimizer._gradients
        optimizer._gradients = kind(optimizer.weights.names, model.config, good._mesh)

    return sabotage


def _divided_by_the_wrong_group(model: Any, step: Any, optimizer: Any) -> None:
    """Divide by all processes where it should by the data-parallel ones."""
    weights, mesh = optimizer.weights, optimizer._gradients._mesh
    good = weights.hand_over
    weights.hand_over = lambda: [grad.mul_(mesh.dp.size / mesh.world.size) for grad in good()]


def _no_data_parallel_sum(model: Any, step: Any, optimizer: Any) -> None:
    for bucket in optimizer.weights._gradients.buckets:
        bucket.axis = Axis()


def _no_context_parallel_sum(model: Any, step: Any, optimizer: Any) -> None:
    for bucket in optimizer.weights._gradients.buckets:
        bucket.axis = optimizer._gradients._mesh.dp


def _no_sum_of_tied_embeddings(model: Any, step: Any, optimizer: Any) -> None:
    optimizer._gradients._mesh = dataclasses.replace(optimizer._gradients._mesh, ends=Axis())


def _tied_embeddings_counted_twice(model: Any, step: Any, optimizer: Any) -> None:
    optimizer._gradients._elsewhere = [False] * len(optimizer._gradients._elsewhere)


def _stages_initialised_alike(model: Any, step: Any, optimizer: Any) -> None:
    """Give the layers of every stage the weights of the first ones."""
    with torch.no_grad():
        for tensor in model.decoder.layers.parameters():
            dist.broadcast(tensor, group=optimizer._gradients._mesh.pp.group, group_src=0)


def _local_tokens_as_divisor(model: Any, step: Any, optimizer: Any) -> None:
    passes = step._passes
    good = passes._part
    passes._part = lambda batch: dataclasses.replace(good(batch), valid_tokens=None)


def _keys_in_order_of_processes(model: Any, step: Any, optimizer: Any) -> None:
    model.sequence.joined = lambda x: joined(x, step._passes._cp)


def _positions_from_the_start(model: Any, step: Any, optimizer: Any) -> None:
    model.sequence.positions = lambda length, device: torch.arange(length // model.sequence.parts, device=device)


def _router_losses_by_the_wrong_group(model: Any, step: Any, optimizer: Any) -> None:
    """Count the losses of routers as if every data-parallel process had the whole global batch."""
    train = step._passes.train
    step._passes.train = lambda batch, micro, objective, weight: train(batch, micro, objective, weight * step._dp.size)


def _loads_of_one_process(model: Any, step: Any, optimizer: Any) -> None:
    step._passes.routing._replicas = Axis()


def _routers_see_a_part(model: Any, step: Any, optimizer: Any) -> None:
    """Add up what all processes find for a router, although each finds all of it."""
    for module in model.modules():
        if hasattr(module, "dispatcher"):
            module.dispatcher.seen = lambda x, mesh=optimizer._gradients._mesh: joined(x, mesh.tp)


def _shared_key_sees_a_part(model: Any, step: Any, optimizer: Any) -> None:
    """Leave out the sum of the gradients that the heads of all processes have for the key they share."""
    for module in model.modules():
        if hasattr(module, "shared_key"):
            module.shared_key.forward = lambda x, mesh=optimizer._gradients._mesh: whole(x, mesh.tp)


def _own_gradients_of_down_projections(model: Any, step: Any, optimizer: Any) -> None:
    gradients, names = optimizer._gradients, optimizer.weights.names
    both = zip(gradients._partial, names, strict=True)
    gradients._partial = [partial and "down_proj" not in name for partial, name in both]


def _twice(batch: Batch, micro: int, dp: Axis) -> Batch:
    """Hand every process the micro-batches of the first."""
    return sweep.share(batch, micro, dataclasses.replace(dp, rank=0))


_FAULTS: dict[str, dict[str, Any]] = {
    "missing all-reduce over tensor parallel": {"sabotage": _replaced(_NoPartial)},
    "missing all-reduce over data parallel": {"sabotage": _no_data_parallel_sum},
    "divisor by the wrong group": {"sabotage": _divided_by_the_wrong_group},
    "counted twice in the norm": {"sabotage": _replaced(_CountedTwice)},
    "duplicated micro-batch": {"feed": _twice},
}
_CONTEXT_FAULTS: dict[str, dict[str, Any]] = {
    "divisor of the tokens of a part of the sequence": {"sabotage": _local_tokens_as_divisor},
    "keys in the order of processes": {"sabotage": _keys_in_order_of_processes},
    "every part counts its positions from the start": {"sabotage": _positions_from_the_start},
    "missing all-reduce over context parallel": {"sabotage": _no_context_parallel_sum},
}
_PIPELINE_FAULTS: dict[str, dict[str, Any]] = {
    "tied embeddings not added up": {"sabotage": _no_sum_of_tied_embeddings},
    "tied embeddings counted twice in the norm": {"sabotage": _tied_embeddings_counted_twice},
    "stages initialised alike": {"sabotage": _stages_initialised_alike},
    "missing all-reduce in a pipeline": {"sabotage": _no_data_parallel_sum},
}
_EXPERT_FAULTS: dict[str, dict[str, Any]] = {
    "router losses by the wrong group": {"sabotage": _router_losses_by_the_wrong_group},
    "loads of experts not added up": {"sabotage": _loads_of_one_process},
    "gradient of routers counted twice": {"sabotage": _routers_see_a_part},
}
_LATENT_FAULTS: dict[str, dict[str, Any]] = {
    "shared key sees a part": {"sabotage": _shared_key_sees_a_part},
    "down projections not added up": {"sabotage": _own_gradients_of_down_projections},
}


def _everything() -> dict[str, Any]:
    """Run the cases of four processes and the faults, in one start of the processes."""
    found: dict[str, Any] = {"rows": sweep.run_cases(sweep.CASES), "faults": {}}
    jobs = (
        (_CASE, "GPT", _FAULTS),
        (_CONTEXT, "GPT", _CONTEXT_FAULTS),
        (_PIPELINE, "GPT", _PIPELINE_FAULTS),
        (_CASE, "experts", _EXPERT_FAULTS),
        (_CASE, "latents", _LATENT_FAULTS),
    )
    for case, kind, faults in jobs:
        config, mesh = sweep.configure({**sweep.KINDS[kind], **case.changes}, 4), sweep.mesh_of(case)
        expected = sweep.play(sweep.configure(sweep.KINDS[kind], 1), Mesh())
        for name, fault in faults.items():
            found["faults"][name] = sweep.compare("GPT", name, sweep.play(config, mesh, **fault), expected)
    low = {"mixed_precision.bf16": True}
    one = sweep.play(sweep.configure(low, 1), Mesh(), torch.bfloat16)
    config = sweep.configure({**low, **_CASE.changes}, 4)
    found["bf16"] = sweep.compare("GPT", "bf16", sweep.play(config, sweep.mesh_of(_CASE), torch.bfloat16), one)
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_processes(_everything, 4)


def test_every_layout_equals_one_process(results) -> None:
    rows = [row for found in results for row in found["rows"]]
    cases = [(kind, case) for kind in sweep.KINDS for case in sweep.CASES if case.processes == 4]
    assert len(rows) == 4 * sum(sweep.takes_part(*each) for each in cases)
    assert [row for row in rows if not row.passes] == []


@pytest.mark.parametrize("fault", [*_FAULTS, *_CONTEXT_FAULTS, *_PIPELINE_FAULTS, *_EXPERT_FAULTS, *_LATENT_FAULTS])
def test_a_planted_fault_is_seen(results, fault: str) -> None:
    assert any(not found["faults"][fault].passes for found in results)


def test_bf16_moves_by_rounding_only(results) -> None:
    for found in results:
        assert found["bf16"].norm < 2e-2
        assert 0 < found["bf16"].grads < 5e-2


def test_parts_make_the_whole_again() -> None:
    whole = torch.arange(14 * 3).view(14, 3)
    for shard in (Shard(0), Shard(1), Shard(0, blocks=2)):
        parts = [shard.part(whole, 3, rank) for rank in range(3)]
        assert torch.equal(shard.whole(parts), whole)
    first = Shard(0, blocks=2).part(torch.arange(8), 2, 0)
    assert first.tolist() == [0, 1, 4, 5]  # half of the gate, then half of the rest


def test_the_plan_names_what_is_split() -> None:
    config = ModelConfig(gated_linear_unit=True)
    layer = "decoder.layers.0."
    assert shard_of(layer + "mlp.linear_fc1.weight", config) == Shard(0, blocks=2)
    assert shard_of(layer + "self_attention.linear_proj.weight", config) == Shard(1)
    assert shard_of(layer + "self_attention.linear_proj.bias", config) is None
    assert shard_of("embedding.position_embeddings.weight", config) is None
    assert has_partial_gradient(layer + "self_attention.q_layernorm.weight", config, sequence_parallel=False)
    assert not has_partial_gradient(layer + "input_layernorm.weight", config, sequence_parallel=False)
    assert has_partial_gradient(layer + "input_layernorm.weight", config, sequence_parallel=True)


def test_the_plan_of_latents_keeps_them_whole() -> None:
    config, prefix = ModelConfig(multi_latent_attention=True), "decoder.layers.0.self_attention."
    for name in ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj"):
        assert shard_of(f"{prefix}{name}.weight", config) == Shard(0)
    for name in ("linear_q_down_proj", "linear_kv_down_proj", "q_layernorm", "kv_layernorm"):
        assert shard_of(f"{prefix}{name}.weight", config) is None
        assert has_partial_gradient(f"{prefix}{name}.weight", config, sequence_parallel=True)
        assert not has_partial_gradient(f"{prefix}{name}.weight", config, sequence_parallel=False)
