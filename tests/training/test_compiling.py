"""Compilation: when it is chosen or refused, and that compiled layers compute what the others do."""

from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from lockstep.config import ConfigContainer, Origin
from lockstep.errors import UserError
from lockstep.models import GPTModel, build_model
from lockstep.training.attention import Choice, use_attention
from lockstep.training.compiling import PAYING_OPERATIONS, choose_compilation, compile_blocks
from tests.training.test_attention import configured

CPU, GPU = torch.device("cpu"), torch.device("meta")
LAYERS = 2
LONG, SHORT = PAYING_OPERATIONS, PAYING_OPERATIONS / 2
LLAMA = {
    "model__normalization": "RMSNorm",
    "model__gated_linear_unit": True,
    "model__activation_func": "silu",
    "model__add_bias_linear": False,
    "model__num_query_groups": 2,
    "model__position_embedding_type": "rope",
}
WHOLE_LAYERS = {
    "model__recompute_granularity": "full",
    "model__recompute_method": "uniform",
    "model__recompute_num_layers": 1,
}
PARTS_OF_LAYERS = {
    "model__recompute_granularity": "selective",
    "model__recompute_modules": ["core_attn", "layernorm", "mlp"],
}


@pytest.mark.parametrize(
    ("device", "operations", "changes", "blocks", "reason"),
    [
        (GPU, LONG, {}, True, "auto, pays"),
        (GPU, SHORT, {}, False, "auto, does not pay"),
        (CPU, LONG, {}, False, "auto, on a CPU"),
        (GPU, SHORT, {"run__compile": "blocks"}, True, "run.compile=blocks"),
        (GPU, LONG, {"run__compile": "none"}, False, "run.compile=none"),
        (GPU, LONG, {"model__hidden_dropout": 0.1}, False, "auto, with dropout"),
        (GPU, LONG, {"model__context_parallel_size": 2}, True, "auto, pays"),
        (GPU, LONG, {"model__pipeline_model_parallel_size": 2}, True, "auto, pays"),
        (GPU, LONG, {"dist__use_torch_fsdp2": True}, True, "auto, pays"),
        (GPU, LONG, {"model__attention_backend": "unfused"}, False, "auto, with explicit scores"),
        (GPU, LONG, {"dataset__reset_attention_mask": True}, False, "auto, with documents apart"),
        (
            GPU,
            LONG,
            {"peft__scheme": "lora", "checkpoint__pretrained_checkpoint": "base"},
            False,
            "auto, with adapters",
        ),
        (GPU, LONG, WHOLE_LAYERS, True, "auto, pays"),
    ],
)
def test_choice(device, operations, changes, blocks, reason) -> None:
    chosen = choose_compilation(configured(**changes), device, operations)
    assert chosen.on is blocks
    assert chosen.reason.startswith(reason)


@pytest.mark.parametrize(
    ("device", "changes", "obstacle"),
    [(CPU, {}, "on a CPU"), (GPU, {"model__hidden_dropout": 0.1}, "with dropout")],
)
def test_what_is_asked_for_and_does_not_work_is_an_error(device, changes, obstacle) -> None:
    with pytest.raises(UserError, match=f"run.compile=blocks does not work {obstacle}"):
        choose_compilation(configured(run__compile="blocks", **changes), device, LONG)


def loss_and_gradients(model: GPTModel) -> list[torch.Tensor]:
    """Return the loss of two sequences of 32 tokens below 64, and its gradients."""
    tokens = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(1))
    loss = model(tokens[:, :-1], torch.arange(32).expand(2, -1), tokens[:, 1:].contiguous()).mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def gradients(config: ConfigContainer, backend: Any) -> list[torch.Tensor]:
    """Return the loss and gradients of a model, its layers compiled where a backend is given."""
    config.set("model.vocab_size", 64, Origin("python"))
    model = build_model(config.model, seed=1, params_dtype=torch.float64, device=CPU).train()
    use_attention(model, Choice("sdpa", "test"))
    if backend is not None:
        compile_blocks(model, backend)
    return loss_and_gradients(model)


def saved_numbers(config: ConfigContainer) -> int:
    """Return how many numbers compiled layers keep for their backward pass, on 2 sequences of 32 tokens."""
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():  # and no state of random streams
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor

    torch._dynamo.reset()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        gradients(config, "aot_eager")
    return sum(kept.values())


@pytest.mark.parametrize(
    "changes",
    [{}, LLAMA, WHOLE_LAYERS, {**LLAMA, **PARTS_OF_LAYERS}],
    ids=["gpt", "llama", "recomputed", "partly recomputed"],
)
def test_compiled_layers_compute_the_same_with_one_graph(changes) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    wanted = gradients(configured(**changes), None)
    found = gradients(configured(**changes), backend)
    assert len(graphs) == 1  # all layers share it, and nothing breaks it
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("modules", "parts_of_hidden"),
    [(["mlp"], 4), (["core_attn"], 1), (["layernorm"], 2), (["core_attn", "layernorm", "mlp"], 7)],
)
def test_compiled_layers_do_not_keep_what_is_recomputed(modules, parts_of_hidden) -> None:
    changes = {**LLAMA, "model__recompute_granularity": "selective", "model__recompute_modules": modules}
    spared = saved_numbers(configured(**LLAMA)) - saved_numbers(configured(**changes))
    assert spared >= parts_of_hidden * LAYERS * 2 * 32 * 32


EXPERTS = {
    **LLAMA,
    "model__num_layers": 3,
    "model__moe_layer_freq": "[0]+[1]*2",
    "model__num_moe_experts": 4,
    "model__moe_router_topk": 3,
    "model__moe_ffn_hidden_size": 24,
    "model__moe_shared_expert_intermediate_size": 24,
    "model__moe_aux_loss_coeff": [0.1],
}
_OF_EXPERTS = ("moe_act", "shared_experts", "moe")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        WHOLE_LAYERS,
        {"model__moe_expert_capacity_factor": 0.75},
        {"model__recompute_granularity": "selective", "model__recompute_modules": list(_OF_EXPERTS)},
    ],
    ids=["kept", "recomputed", "drops", "partly recomputed"],
)
def test_compiled_parts_of_layers_with_experts_compute_the_same(changes) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    wanted = gradients(configured(**EXPERTS, **changes), None)
    found = gradients(configured(**EXPERTS, **changes), backend)
    # One for the layer without experts, one for attention, one for shared experts; those of sums over copies and of
    # activations differ between passes, and between numbers of rows that are known and not. None is of one layer only.
    assert 4 < len(graphs) <= 10
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
