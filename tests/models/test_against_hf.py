"""Logits against Hugging Face models of the same weights, in float32."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lockstep.hf.families import GPT2, LLAMA, Family
from lockstep.hf.rules import mapped
from lockstep.models import GPTModel, build_model
from lockstep.models.layers import required

CPU = torch.device("cpu")


def tokens_and_positions(vocab: int, length: int = 24) -> tuple[Tensor, Tensor]:
    return torch.randint(0, vocab, (2, length)), torch.arange(length).expand(2, length)


def randomised(model: GPTModel) -> GPTModel:
    """Give every parameter, norms and biases too, values that a mistake would show in."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def hf_weights(model: GPTModel, family: Family) -> dict[str, Tensor]:
    """Return the weights as files of the family have them."""
    entries = mapped(family.rules, model.config, required(model.config.vocab_size)).values()
    return {name: part for entry in entries for name, part in entry.split(model.get_parameter(entry.name)).items()}


def assert_same_logits(ours: Tensor, theirs: Tensor) -> None:
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5


def hf_gpt2(model: GPTModel) -> Any:
    config = GPT2Config(
        vocab_size=512, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=112, bos_token_id=0, eos_token_id=0
    )
    hf: Any = GPT2LMHeadModel(config).eval()
    weights = hf_weights(model, GPT2)
    hf.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    return hf


def test_gpt2(tiny):
    model = randomised(build_model(tiny(), seed=1, params_dtype=torch.float32, device=CPU))
    tokens, positions = tokens_and_positions(512)
    with torch.no_grad():
        assert_same_logits(model(tokens, positions), hf_gpt2(model)(tokens).logits)


def test_loss_and_gradients_are_those_of_hf_gpt2(tiny):
    model = randomised(build_model(tiny(), seed=1, params_dtype=torch.float32, device=CPU))
    tokens, positions = tokens_and_positions(512)
    hf = hf_gpt2(model)
    loss = model(tokens[:, :-1], positions[:, :-1], tokens[:, 1:])
    assert loss.shape == (2, 23)
    loss.mean().backward()
    hf_loss = hf(tokens, labels=tokens).loss
    hf_loss.backward()
    assert loss.mean().item() == pytest.approx(hf_loss.item(), rel=1e-6)
    for name, theirs in (
        ("embedding.word_embeddings.weight", hf.transformer.wte.weight.grad),
        ("decoder.layers.0.mlp.linear_fc1.weight", hf.transformer.h[0].mlp.c_fc.weight.grad.t()),
        ("decoder.layers.0.mlp.linear_fc1.bias", hf.transformer.h[0].mlp.c_fc.bias.grad),
        ("decoder.layers.0.self_attention.linear_proj.bias", hf.transformer.h[0].attn.c_proj.bias.grad),
        ("decoder.layers.1.input_layernorm.weight", hf.transformer.h[1].ln_1.weight.grad),
    ):
        torch.testing.assert_close(model.get_parameter(name).grad, theirs, rtol=1e-4, atol=1e-6)


def test_another_qkv_layout_is_noticed(tiny):
    model = randomised(build_model(tiny(), seed=1, params_dtype=torch.float32, device=CPU))
    tokens, positions = tokens_and_positions(512)
    hf = hf_gpt2(model)
    with torch.no_grad():
        for layer in range(2):
            weight = model.get_parameter(f"decoder.layers.{layer}.self_attention.linear_qkv.weight")
            weight.copy_(weight.unflatten(0, (4, 3, 8)).transpose(0, 1).flatten(0, 2))
        with pytest.raises(AssertionError):
            assert_same_logits(model(tokens, positions), hf(tokens).logits)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain-rope", "llama3-rope"])
def test_llama(llama_like, scaled):
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    if scaled:
        factors = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"rope_type": "llama3", **factors, "original_max_position_embeddings": 8192}
    overrides = {"rotary_base": 500000, "rope_scaling": scaled, "rope_scaling_factor": 32.0}
    model = randomised(build_model(llama_like(**overrides), seed=1, params_dtype=torch.float32, device=CPU))
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=False,
    )
    hf = LlamaForCausalLM(config).eval()
    hf.load_state_dict(hf_weights(model, LLAMA))
    tokens, positions = tokens_and_positions(512, length=64)
    with torch.no_grad():
        assert_same_logits(model(tokens, positions), hf(tokens).logits)
