"""What Llama, Qwen3, Mixtral and DeepSeek-V2 have in common: names of weights, keys, settings."""

from typing import Any

from lockstep.hf.families.family import Key
from lockstep.hf.rules import Gated, Grouped, Rule, Same, Vocabulary

OURS, THEIRS = "decoder.layers.{layer}", "model.layers.{layer}"
EXPERT = f"{OURS}.mlp.experts.local_experts.{{expert}}"

OUTSIDE_ATTENTION = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary()),
    Rule(f"{OURS}.input_layernorm.weight", (f"{THEIRS}.input_layernorm.weight",), Same()),
    Rule(f"{OURS}.self_attention.linear_proj.weight", (f"{THEIRS}.self_attn.o_proj.weight",), Same()),
    Rule(f"{OURS}.pre_mlp_layernorm.weight", (f"{THEIRS}.post_attention_layernorm.weight",), Same()),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Same()),
    Rule("output_layer.weight", ("lm_head.weight",), Vocabulary()),
)
QKV = Rule(
    f"{OURS}.self_attention.linear_qkv.weight",
    tuple(f"{THEIRS}.self_attn.{part}_proj.weight" for part in ("q", "k", "v")),
    Grouped(),
)


def gated_mlp(
    ours: str, theirs: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Rule, ...]:
    """Return the rules of an MLP."""
    return (
        Rule(f"{ours}.linear_fc1.weight", (f"{theirs}.{gate}.weight", f"{theirs}.{up}.weight"), Gated()),
        Rule(f"{ours}.linear_fc2.weight", (f"{theirs}.{down}.weight",), Same()),
    )


DENSE_MLP = gated_mlp(f"{OURS}.mlp", f"{THEIRS}.mlp")
ROUTED_MLPS = (
    Rule(f"{OURS}.mlp.router.weight", (f"{THEIRS}.mlp.gate.weight",), Same()),
    *gated_mlp(EXPERT, f"{THEIRS}.mlp.experts.{{expert}}"),
)

COMMON_KEYS = (
    Key("num_hidden_layers", "num_layers"),
    Key("hidden_size", "hidden_size"),
    Key("num_attention_heads", "num_attention_heads"),
    Key("max_position_embeddings", "max_position_embeddings"),
    Key("initializer_range", "init_method_std", 0.02),
    Key("attention_dropout", "attention_dropout", 0.0),
    Key("intermediate_size", "ffn_hidden_size"),
)
COMMON_FIXED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "silu",
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "hidden_dropout": 0.0,
}
COMMON_ONLY: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "quantization_config": (None,)}
EXPERTS_FIXED = {"moe_router_score_function": "softmax", "moe_router_load_balancing_type": ["aux_loss"]}
