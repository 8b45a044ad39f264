import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from lockstep.config import ConfigContainer, resolve
from lockstep.models import build_model, expert_weights
from lockstep.plan.gpus import Gpu
from lockstep.plan.measure import Memory, measure
from lockstep.plan.planner import Planner
from lockstep.plan.tracker import OverLimit, block_bytes
from lockstep.recipes.catalog import get_recipe
from lockstep.training.precision import params_dtype

GPU = Gpu("small", 1 << 34, 1 << 20)

_SIZE: dict[str, Any] = {
    "model.num_layers": 4,
    "model.hidden_size": 128,
    "model.num_attention_heads": 4,
    "model.seq_length": 256,
    "model.vocab_size": 1024,
    "train.global_batch_size": 32,
    "optimizer.lr": 1e-3,
}
_LLAMA: dict[str, Any] = {
    "model.normalization": "RMSNorm",
    "model.gated_linear_unit": True,
    "model.activation_func": "silu",
    "model.add_bias_linear": False,
    "model.position_embedding_type": "rope",
    "model.num_query_groups": 2,
    "model.share_embeddings_and_output_weights": False,
}
_EXPERTS: dict[str, Any] = {**_LLAMA, "model.num_moe_experts": 8, "model.moe_ffn_hidden_size": 256}
_TP: dict[str, Any] = {"model.tensor_model_parallel_size": 2}
_SP = {**_TP, "model.sequence_parallel": True}
_PP: dict[str, Any] = {"model.pipeline_model_parallel_size": 2}
_SHARDED: dict[str, Any] = {"ddp.use_distributed_optimizer": True}
_FULL: dict[str, Any] = {
    "model.recompute_granularity": "full",
    "model.recompute_method": "uniform",
    "model.recompute_num_layers": 1,
}


def config_of(changes: dict[str, Any]) -> ConfigContainer:
    config = get_recipe("vanilla_gpt_pretrain_config")
    for path, value in {**_SIZE, **changes}.items():
        setattr(config.section(path.split(".")[0]), path.split(".")[1], value)
    return config


def memory_of(changes: dict[str, Any], processes: int = 1) -> Memory:
    return Planner(config_of(changes), GPU).ask(processes).memory


def total(changes: dict[str, Any], processes: int = 1) -> int:
    return memory_of(changes, processes).peak_bytes


@pytest.mark.parametrize("kind", [{}, _LLAMA])
def test_parameters_and_what_they_cost(kind: dict[str, Any]) -> None:
    config = resolve(config_of(kind))
    model = build_model(config.model, seed=1, params_dtype=params_dtype(config), device=torch.device("cpu"))
    found = memory_of(kind)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    sizes = [p.numel() for p in model.parameters()]
    assert found.parts["weights"] == sum(block_bytes(2 * size) for size in sizes)
    assert found.parts["optimizer"] == pytest.approx(12 * sum(sizes), rel=0.02)  # main weights and two moments
    # FP32 buffers, and at the peak perhaps the gradient of the weight that the backward pass is at
    assert 0 <= found.parts["gradients"] - sum(block_bytes(4 * size) for size in sizes) <= 2 * max(sizes)
    assert found.parts["workspace"] >= 2 * GPU.workspace_bytes
    assert found.parts["experts"] == 0
    assert found.peak_bytes == sum(found.parts.values())
    static = sum(found.parts[part] for part in ("weights", "optimizer")) + sum(block_bytes(4 * size) for size in sizes)
    assert found.resident_bytes == pytest.approx(static + 2 * GPU.workspace_bytes, rel=0.01)


def test_an_fp32_model_is_its_own_main_weights() -> None:
    found = memory_of({"mixed_precision.bf16": False})
    assert found.parts["optimizer"] == pytest.approx(2 * found.parts["weights"], rel=0.02)
    assert found.parts["gradients"] == pytest.approx(found.parts["weights"], rel=0.1)


def test_a_sharded_optimizer_has_its_share() -> None:
    whole, shared = memory_of({}, 4), memory_of(_SHARDED, 4)
    assert shared.parts["optimizer"] == pytest.approx(whole.parts["optimizer"] / 4, rel=0.02)
    assert shared.parts["weights"] == pytest.approx(whole.parts["weights"], rel=0.01)


def test_activations_follow_the_layout() -> None:
    one, tensor, sequence = memory_of({}), memory_of(_TP, 2), memory_of(_SP, 2)
    assert tensor.parts["weights"] == pytest.approx(one.parts["weights"] / 2, rel=0.05)
    assert sequence.highest["activations"] < tensor.highest["activations"] < one.highest["activations"]
    assert tensor.highest["logits"] < 0.6 * one.highest["logits"]


def test_context_parallelism_halves_the_sequence() -> None:
    one, two = memory_of({}), memory_of({"model.context_parallel_size": 2, **_SHARDED}, 2)
    assert two.highest["logits"] == pytest.approx(one.highest["logits"] / 2, rel=0.2)
    assert two.highest["activations"] < 0.6 * one.highest["activations"]
    assert two.parts["weights"] == pytest.approx(one.parts["weights"], rel=0.01)
    assert two.parts["optimizer"] == pytest.approx(one.parts["optimizer"] / 2, rel=0.02)


def test_norms_keep_what_the_kernels_of_a_gpu_keep() -> None:
    """Taken apart into single operations, RMSNorm would keep several FP32 copies of its input."""
    rms, layer = (memory_of({"model.normalization": kind}).highest["activations"] for kind in ("RMSNorm", "LayerNorm"))
    assert rms == pytest.approx(layer, rel=0.02)


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_expert_parallelism_halves_the_experts(dispatcher: str) -> None:
    sharing = {"model.expert_model_parallel_size": 2, "model.moe_token_dispatcher_type": dispatcher}
    one, two = memory_of(_EXPERTS, 2), memory_of({**_EXPERTS, **sharing}, 2)
    assert two.parts["experts"] == pytest.approx(one.parts["experts"] / 2, rel=0.01)
    assert two.parts["weights"] == one.parts["weights"]
    four = memory_of({**_EXPERTS, **sharing, **_SHARDED}, 4)
    held = 2 * 2 + 2 * 4 + 12 / 2  # bytes: weight and gradient, in full and in part; main weight and moments
    assert four.parts["experts"] < two.parts["experts"] * held / 18
    assert str(Planner(config_of({**_EXPERTS, **sharing}), GPU).ask(2).layout) == "EP2 x DP2"


def test_recomputation_keeps_less() -> None:
    selective = {"model.recompute_granularity": "selective"}
    highest = [memory_of(changes).highest["activations"] for changes in ({}, selective, _FULL)]
    assert highest[0] > highest[1] > highest[2]


def test_dropout_keeps_its_masks() -> None:
    assert total({"model.attention_dropout": 0.0, "model.hidden_dropout": 0.0}) < total({})


def test_the_first_stage_of_a_pipeline_needs_most_unless_the_last_has_large_logits() -> None:
    found = memory_of({**_PP, "train.micro_batch_size": 1}, 2)
    assert found.rank == 0
    assert found.parts["logits"] == 0
    last = memory_of({**_PP, "train.micro_batch_size": 1, "model.vocab_size": 65536}, 2)
    assert last.rank == 1
    assert last.highest["logits"] > 0


def test_in_flight_micro_batches_do_not_grow_with_the_batch() -> None:
    few, many = (total({**_PP, "train.micro_batch_size": 1, "train.global_batch_size": size}, 2) for size in (4, 16))
    assert many == pytest.approx(few, rel=0.01)


def test_stages_with_more_layers_are_looked_at() -> None:
    uneven = {**_PP, "model.pipeline_model_parallel_size": 4, "model.num_layers": 8}
    uneven["model.pipeline_model_parallel_layout"] = "Et|tttt|tt|tL"
    assert memory_of({**uneven, "train.micro_batch_size": 1}, 4).rank == 1


def test_a_larger_evaluation_can_be_the_peak() -> None:
    changes = {"validation.eval_micro_batch_size": 32, **_FULL}
    assert memory_of(changes).moment == "evaluation"
    assert memory_of({**changes, "validation.eval_iters": 0}).moment != "evaluation"


def test_everything_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = F.rms_norm, sys.excepthook, dist.batch_isend_irecv
    config = resolve(config_of({**_LLAMA, **_PP}), 2)
    peak = measure(config, 2, GPU).peak_bytes
    with pytest.raises(OverLimit):
        measure(config, 2, GPU, limit=peak - 1)
    assert before == (F.rms_norm, sys.excepthook, dist.batch_isend_irecv)
    assert not dist.is_initialized()


class _Copies(TorchDispatchMode):
    """Notes the operations that copy numbers into a tensor of the size of all experts of a linear."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self._shape = sorted(shape)
        self.found: list[str] = []
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.products += "grouped_mm" in name
        if isinstance(result, torch.Tensor) and sorted(result.shape) == self._shape and name in _COPYING:
            self.found.append(name)
        return result


_COPYING = ("stack", "cat", "clone", "copy_", "_to_copy", "contiguous", "index_select", "add", "mul")
_EP: dict[str, Any] = {"model.expert_model_parallel_size": 2, "model.moe_token_dispatcher_type": "allgather"}
_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "one, recomputed": (1, _FULL),
    "EP2 x sharded DP2": (2, {**_EP, **_SHARDED}),
    "EP2 x sharded DP2, recomputed": (2, {**_EP, **_SHARDED, **_FULL}),
    "EP2 x sharded DP2, overlap": (2, {**_EP, **_SHARDED, "ddp.bucket_size": 1000, "ddp.overlap_grad_reduce": True}),
}


@pytest.mark.parametrize("name", _LAYOUTS)
def test_a_step_copies_no_weights_of_experts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    processes, changes = _LAYOUTS[name]
    experts = 8 // processes
    config = resolve(config_of({**_EXPERTS, "mixed_precision.bf16": True, **changes}), processes)
    found: dict[bool, tuple[int, list[str]]] = {}
    for stacks in (False, True):
        if stacks:
            monkeypatch.setattr(expert_weights, "lie_end_to_end", lambda _: False)
        copies = [_Copies((experts, 128, width)) for width in (256, 512)]
        with copies[0], copies[1]:
            peak = measure(config, processes, GPU).peak_bytes
        assert all(each.products for each in copies)
        found[stacks] = peak, copies[0].found + copies[1].found
    assert found[False][1] == []
    assert {*found[True][1]} == {"stack"}
    if "recomputed" not in name:  # Four layers keep theirs, in BF16; without them the peak may be at another moment.
        layer = 2 * experts * 128 * (256 + 512)
        assert 3 * layer < found[True][0] - found[False][0] <= 4 * layer
