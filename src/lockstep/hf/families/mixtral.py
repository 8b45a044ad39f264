"""Mixtral."""

from typing import Any

from lockstep.config.model import ModelConfig
from lockstep.hf.families.decoders import (
    COMMON_FIXED,
    COMMON_KEYS,
    COMMON_ONLY,
    EXPERT,
    EXPERTS_FIXED,
    OURS,
    OUTSIDE_ATTENTION,
    QKV,
    THEIRS,
    gated_mlp,
)
from lockstep.hf.families.family import Family, Key, Said
from lockstep.hf.families.rotary import Rotary
from lockstep.hf.rules import Rule, Same


class BalancingLoss:
    """The coefficient of the loss for an even load."""

    def read(self, hf: dict[str, Any]) -> list[Said]:
        """Return the coefficient."""
        return [("moe_aux_loss_coeff", [hf.get("router_aux_loss_coef", 0.001)], "router_aux_loss_coef")]

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the key."""
        return {"router_aux_loss_coef": model.moe_aux_loss_coeff[0]}


_MLP = f"{THEIRS}.block_sparse_moe"

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    rules=(
        *OUTSIDE_ATTENTION,
        QKV,
        Rule(f"{OURS}.mlp.router.weight", (f"{_MLP}.gate.weight",), Same()),
        *gated_mlp(EXPERT, f"{_MLP}.experts.{{expert}}", "w1", "w3", "w2"),
    ),
    keys=(
        *COMMON_KEYS,
        Key("intermediate_size", "moe_ffn_hidden_size"),
        Key("num_key_value_heads", "num_query_groups"),
        Key("head_dim", "kv_channels"),
        Key("rms_norm_eps", "layernorm_epsilon", 1e-5),
        Key("num_local_experts", "num_moe_experts"),
        Key("num_experts_per_tok", "moe_router_topk"),
    ),
    fixed={**COMMON_FIXED, **EXPERTS_FIXED, "moe_router_pre_softmax": False},
    only={**COMMON_ONLY, "sliding_window": (None,), "router_jitter_noise": (0.0,)},
    aspects=(Rotary(base=1e6), BalancingLoss()),
)
