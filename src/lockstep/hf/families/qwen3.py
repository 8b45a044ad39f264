"""Qwen3, dense and with experts."""

from typing import Any

from lockstep.config.experts import expert_layers
from lockstep.config.model import ModelConfig
from lockstep.hf.families.decoders import (
    COMMON_FIXED,
    COMMON_KEYS,
    COMMON_ONLY,
    DENSE_MLP,
    EXPERTS_FIXED,
    OURS,
    OUTSIDE_ATTENTION,
    QKV,
    ROUTED_MLPS,
    THEIRS,
)
from lockstep.hf.families.family import Family, Key, Said
from lockstep.hf.families.mixtral import BalancingLoss
from lockstep.hf.families.rotary import Rotary
from lockstep.hf.rules import Rule, Same

_QK_NORMS = tuple(
    Rule(f"{OURS}.self_attention.{part}_layernorm.weight", (f"{THEIRS}.self_attn.{part}_norm.weight",), Same())
    for part in ("q", "k")
)
_FIXED = {**COMMON_FIXED, "qk_layernorm": True}
_ONLY = {**COMMON_ONLY, "attention_bias": (False,), "use_sliding_window": (False,)}


class _Layers:
    """Which layers have experts, and whether the weights of a token's experts add up to one."""

    def read(self, hf: dict[str, Any]) -> list[Said]:
        step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
        pattern = [int(i not in dense and (i + 1) % step == 0) for i in range(hf["num_hidden_layers"])]
        return [
            ("moe_layer_freq", 1 if all(pattern) else pattern, "mlp_only_layers, decoder_sparse_step"),
            ("moe_router_pre_softmax", not hf.get("norm_topk_prob", False), "norm_topk_prob"),
        ]

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {
            "norm_topk_prob": not model.moe_router_pre_softmax,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, sparse in enumerate(expert_layers(model)) if not sparse],
        }


QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    rules=(*OUTSIDE_ATTENTION, QKV, *_QK_NORMS, *DENSE_MLP),
    keys=(
        *COMMON_KEYS,
        Key("num_key_value_heads", "num_query_groups"),
        Key("head_dim", "kv_channels", 128),
        Key("rms_norm_eps", "layernorm_epsilon", 1e-6),
    ),
    fixed=_FIXED,
    only=_ONLY,
    aspects=(Rotary(),),
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rules=(*OUTSIDE_ATTENTION, QKV, *_QK_NORMS, *DENSE_MLP, *ROUTED_MLPS),
    keys=(
        *COMMON_KEYS,
        Key("moe_intermediate_size", "moe_ffn_hidden_size"),
        Key("num_key_value_heads", "num_query_groups"),
        Key("head_dim", "kv_channels"),
        Key("rms_norm_eps", "layernorm_epsilon", 1e-6),
        Key("num_experts", "num_moe_experts", like="num_local_experts"),
        Key("num_experts_per_tok", "moe_router_topk"),
    ),
    fixed={**_FIXED, **EXPERTS_FIXED},
    only=_ONLY,
    aspects=(Rotary(), BalancingLoss(), _Layers()),
)
