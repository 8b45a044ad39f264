"""Models with experts against Hugging Face models of the same weights, in float32: logits and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lockstep.hf.families import QWEN3_MOE
from lockstep.models import GPTModel, build_model
from tests.models.test_against_hf import CPU, assert_same_logits, hf_weights, randomised, tokens_and_positions

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "experts_implementation": "eager",
}


def weights_of(model: GPTModel) -> dict[str, Tensor]:
    """Return the weights under transformers' own names; experts of a layer are one tensor there."""
    get = model.get_parameter
    in_files = hf_weights(model, QWEN3_MOE)
    weights = {name: value for name, value in in_files.items() if ".mlp.experts." not in name}
    for i in range(2):
        ours, theirs = f"decoder.layers.{i}.mlp", f"model.layers.{i}.mlp"
        for name, hf in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
            parts: list[Tensor] = [get(f"{ours}.experts.local_experts.{e}.{name}.weight") for e in range(8)]
            weights[f"{theirs}.experts.{hf}"] = torch.stack(parts)
    return weights


def mixtral(moe_like: Any) -> tuple[GPTModel, Any]:
    config = MixtralConfig(intermediate_size=48, num_local_experts=8, **SIZES)
    model = build_model(moe_like(), seed=1, params_dtype=torch.float32, device=CPU)
    return model, MixtralForCausalLM(config)


def qwen3_moe(moe_like: Any) -> tuple[GPTModel, Any]:
    sizes: Any = {"moe_intermediate_size": 48, "num_experts": 8, "norm_topk_prob": True, "head_dim": 8}
    config = Qwen3MoeConfig(**sizes, **SIZES)
    model = build_model(moe_like(qk_layernorm=True), seed=1, params_dtype=torch.float32, device=CPU)
    return model, Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize("family", [mixtral, qwen3_moe])
def test_logits_and_gradients(family, moe_like):
    model, hf = family(moe_like)
    randomised(model)
    hf.load_state_dict(weights_of(model))
    hf.eval()
    tokens, positions = tokens_and_positions(512)
    with torch.no_grad():
        assert_same_logits(model(tokens, positions), hf(tokens).logits)
    model(tokens[:, :-1], positions[:, :-1], tokens[:, 1:]).mean().backward()
    hf(tokens, labels=tokens).loss.backward()
    layer: Any = model.decoder.layers["0"]
    theirs = hf.model.layers[0].mlp
    torch.testing.assert_close(layer.mlp.router.weight.grad, theirs.gate.weight.grad, rtol=1e-4, atol=1e-6)
    for name, hf_name in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
        ours = torch.stack([getattr(expert, name).weight.grad for expert in layer.mlp.experts.local_experts.values()])
        torch.testing.assert_close(ours, getattr(theirs.experts, hf_name).grad, rtol=1e-4, atol=1e-6)
    words = model.get_parameter("embedding.word_embeddings.weight").grad
    torch.testing.assert_close(words, hf.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-6)
