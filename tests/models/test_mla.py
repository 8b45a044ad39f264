"""Multi-latent attention: DeepSeek-V2's architecture against Hugging Face, initial weights, recomputation, counts."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from lockstep.config.model import ModelConfig
from lockstep.models import DropoutStreams, GPTModel, build_model
from lockstep.models.attention import core_attention
from lockstep.models.flops import flops_per_sequence
from lockstep.models.positions import latent_cos_sin
from tests.models.test_against_hf import CPU, assert_same_logits, randomised, tokens_and_positions
from tests.models.test_recompute import peak_bytes, selective, two_steps

YARN = {"rotary_scaling_factor": 40.0, "mscale": 0.9, "mscale_all_dim": 0.707}


@pytest.fixture
def latent_like(moe_like: Callable[..., ModelConfig]) -> Callable[..., ModelConfig]:
    """Return a maker of resolved configs of a tiny DeepSeek-V2; keyword arguments override."""

    def make(**overrides: object) -> ModelConfig:
        values: dict[str, object] = {
            "num_query_groups": 4,
            "layernorm_epsilon": 1e-6,
            "multi_latent_attention": True,
            "rope_type": "yarn",
            "qk_layernorm": True,
            "kv_lora_rank": 16,
            "qk_head_dim": 12,
            "qk_pos_emb_head_dim": 8,
            "v_head_dim": 10,
            "moe_layer_freq": "[0]+[1]",
            "moe_shared_expert_intermediate_size": 96,
            "moe_router_topk": 3,
            "moe_router_pre_softmax": True,
            "moe_router_dtype": "fp32",
            **YARN,
        }
        return moe_like(**{**values, **overrides})

    return make


def hf_of(config: ModelConfig) -> Any:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if config.rope_type == "yarn":
        rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": config.rotary_scaling_factor}
        rope |= {"mscale": config.mscale, "mscale_all_dim": config.mscale_all_dim}
        rope |= {"beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
    sizes: Any = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": config.q_lora_rank,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": config.qk_pos_emb_head_dim,
        "v_head_dim": 10,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "experts_implementation": "eager",
    }
    return DeepseekV2ForCausalLM(DeepseekV2Config(**sizes)).eval()


def under_hf_names(model: GPTModel, value: Callable[[nn.Parameter], Any]) -> dict[str, Tensor]:
    """Return the value of each parameter under Hugging Face's name; no row of any changes its place."""
    attention = {
        "linear_proj": "o_proj",
        "linear_q_proj": "q_proj",
        "linear_q_down_proj": "q_a_proj",
        "q_layernorm": "q_a_layernorm",
        "linear_q_up_proj": "q_b_proj",
        "linear_kv_down_proj": "kv_a_proj_with_mqa",
        "kv_layernorm": "kv_a_layernorm",
        "linear_kv_up_proj": "kv_b_proj",
    }
    others = {
        "self_attention": "self_attn",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "router": "gate",
        "linear_fc2": "down_proj",
    }
    found: dict[str, Tensor] = {
        "model.embed_tokens.weight": value(model.get_parameter("embedding.word_embeddings.weight")),
        "lm_head.weight": value(model.get_parameter("output_layer.weight")),
        "model.norm.weight": value(model.get_parameter("decoder.final_layernorm.weight")),
    }
    experts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if ".local_experts." in name:
            kind = "gate_up_proj" if "linear_fc1" in name else "down_proj"
            layer = name.split(".")[2]
            experts.setdefault(f"model.layers.{layer}.mlp.experts.{kind}", []).append(value(parameter))
        elif name.startswith("decoder.layers."):
            renamed = "model" + name.removeprefix("decoder")
            for ours, theirs in {**attention, **others}.items():
                renamed = renamed.replace(f".{ours}.", f".{theirs}.")
            if "linear_fc1" in renamed:
                for kind, rows in zip(("gate_proj", "up_proj"), value(parameter).chunk(2), strict=True):
                    found[renamed.replace("linear_fc1", kind)] = rows
            else:
                found[renamed] = value(parameter)
    return found | {name: torch.stack(parts) for name, parts in experts.items()}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"q_lora_rank": 24},
        {"mscale": 0.707},
        {"rope_type": "rope", "rotary_scaling_factor": 1.0},
    ],
    ids=["yarn", "query latent", "the model's own mscale", "plain rope"],
)
def test_logits_and_gradients_are_those_of_hf(overrides, latent_like):
    config = latent_like(**overrides)
    model = randomised(build_model(config, seed=1, params_dtype=torch.float32, device=CPU))
    hf = hf_of(config)
    hf.load_state_dict(under_hf_names(model, lambda parameter: parameter.detach()))
    tokens, positions = tokens_and_positions(512, length=64)
    with torch.no_grad():
        assert_same_logits(model(tokens, positions), hf(tokens).logits)
    model(tokens[:, :-1], positions[:, :-1], tokens[:, 1:]).mean().backward()
    hf(tokens, labels=tokens).loss.backward()
    grads = under_hf_names(model, lambda parameter: parameter.grad)
    theirs = dict(hf.named_parameters())
    assert grads.keys() == theirs.keys()
    for name, grad in grads.items():
        difference = (grad - theirs[name].grad).norm() / theirs[name].grad.norm()
        assert difference < 1e-5, f"{name}: {difference}"


@pytest.mark.parametrize("rope_type", ["yarn", "rope"])
def test_rotations_at_the_real_width_are_those_of_hf(rope_type, latent_like):
    config = latent_like(rope_type=rope_type, qk_pos_emb_head_dim=64)
    positions = torch.arange(0, 160_000, 997)
    cos, sin = latent_cos_sin(config, positions, torch.float32)
    turned = hf_of(config).model.rotary_emb(torch.zeros(1), positions[None])[0]
    torch.testing.assert_close(cos[:, 0, :32], turned.real, rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[:, 0, :32], turned.imag, rtol=0, atol=1e-6)
    assert torch.equal(cos[..., :32], cos[..., 32:])


def test_values_narrower_than_queries_in_rounded_products(use_mode):
    torch.manual_seed(0)
    parts = [torch.randn(6, 16, width).bfloat16().requires_grad_() for width in (20, 20, 10)]
    hidden = torch.ones(16, 16, dtype=torch.bool).triu(1)[None]
    options: Any = {"dropped": None, "dropout_probability": 0.0, "softmax_in_fp32": False, "scale": 0.3}
    found = []
    for mode in ("native", "fp32-rounded"):
        use_mode(mode)
        result = core_attention(parts[0], parts[1], parts[2], hidden, **options)
        found.append([result, *torch.autograd.grad(result, parts, torch.ones_like(result))])
    assert found[0][0].shape == (6, 16, 10)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6)


def test_the_output_projection_is_drawn_after_that_of_plain_attention(latent_like):
    config = latent_like(use_cpu_initialization=True, q_lora_rank=24, num_layers=1, moe_layer_freq="[1]")
    model = build_model(config, seed=5, params_dtype=torch.float32, device=CPU)
    generator = torch.Generator().manual_seed(5)

    def drawn(rows: int, columns: int, std: float) -> Tensor:
        return torch.empty(rows, columns).normal_(0.0, std, generator=generator)

    assert torch.equal(model.get_parameter("embedding.word_embeddings.weight"), drawn(512, 32, 0.02))
    drawn(32, 4 * 8, 1.0)  # kv_channels = 8
    shapes = {"linear_proj": (32, 40), "linear_q_down_proj": (24, 32), "linear_q_up_proj": (80, 24)}
    shapes |= {"linear_kv_down_proj": (24, 32), "linear_kv_up_proj": (88, 16)}
    for name, shape in shapes.items():
        std = 0.02 / math.sqrt(2) if name == "linear_proj" else 0.02
        assert torch.equal(model.get_parameter(f"decoder.layers.0.self_attention.{name}.weight"), drawn(*shape, std)), (
            name
        )


RECOMPUTED = {
    "mla_up_proj": selective("mla_up_proj"),
    "mla_up_proj and core_attn": selective("mla_up_proj", "core_attn"),
    "core_attn, layernorm, moe": selective("core_attn", "layernorm", "moe"),
    "mla_up_proj, layernorm": selective("mla_up_proj", "layernorm"),
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_changes_no_bit(dtype, latent_like, use_mode):
    use_mode("fp32-rounded")
    settings = {"hidden_dropout": 0.1, "attention_dropout": 0.2, "q_lora_rank": 24}
    wanted, states = two_steps(latent_like(**settings), dtype)
    for name, changes in RECOMPUTED.items():
        found, after = two_steps(latent_like(**settings, **changes), dtype)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), name
        assert all(torch.equal(after[stream], states[stream]) for stream in states), name


def test_up_projections_recomputed_take_less_memory_than_core_attention_alone(latent_like):
    tokens, positions = torch.zeros(4, 64, dtype=torch.int64), torch.arange(64).expand(4, 64)

    def peak(**changes: Any) -> int:
        config = latent_like(num_layers=6, num_moe_experts=None, vocab_size=64, **changes)
        model = build_model(config, seed=1, params_dtype=torch.float32, device=CPU)
        streams = DropoutStreams(7, CPU)
        return peak_bytes(lambda: model(tokens, positions, tokens, dropout=streams).mean().backward())

    nothing, core, up = peak(), peak(**selective("core_attn")), peak(**selective("mla_up_proj"))
    assert up < 0.95 * core < 0.9 * nothing


def test_operations_of_a_sequence(latent_like):
    config = latent_like(num_moe_experts=None, q_lora_rank=24, num_layers=1)
    projections = 24 * (32 + 80 + 1) + 16 * (32 + 4 * 22 + 1) + 32 * 8 + 40 * 32
    weights = 64 * (projections + 3 * 32 * 112 + 32 * 512)
    assert flops_per_sequence(config) == 6 * (weights + 64 * 64 * (80 + 40) / 2)
    config.q_lora_rank = None
    assert flops_per_sequence(config) == 6 * (weights + 64 * (32 * 80 - 24 * 113) + 64 * 64 * 60)


def test_deepseek_v2_lite_has_its_15_7_billion_parameters(latent_like):
    sizes = {"num_layers": 27, "hidden_size": 2048, "num_attention_heads": 16, "num_query_groups": 16}
    sizes |= {"ffn_hidden_size": 10944, "kv_channels": 64, "vocab_size": 102400, "kv_lora_rank": 512}
    sizes |= {"qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128}
    sizes |= {"num_moe_experts": 64, "moe_ffn_hidden_size": 1408, "moe_shared_expert_intermediate_size": 2816}
    config = latent_like(**sizes, moe_layer_freq="[0]+[1]*26")
    model = GPTModel(config, dtype=torch.bfloat16, device=torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 15_706_484_224
