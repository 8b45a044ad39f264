"""DeepSeek-V2: multi-latent attention, shared and routed experts, the first layers dense."""

from typing import Any

from lockstep.config.experts import expert_layers
from lockstep.config.model import ModelConfig
from lockstep.errors import UserError
from lockstep.hf.families.decoders import (
    COMMON_FIXED,
    COMMON_KEYS,
    COMMON_ONLY,
    DENSE_MLP,
    EXPERTS_FIXED,
    OURS,
    OUTSIDE_ATTENTION,
    ROUTED_MLPS,
    THEIRS,
    gated_mlp,
)
from lockstep.hf.families.family import Family, Key, Said
from lockstep.hf.families.rotary import LatentRotary
from lockstep.hf.rules import Rule, Same

_LATENTS = tuple(
    Rule(f"{OURS}.self_attention.{ours}.weight", (f"{THEIRS}.self_attn.{theirs}.weight",), Same())
    for ours, theirs in (
        ("linear_q_proj", "q_proj"),
        ("linear_q_down_proj", "q_a_proj"),
        ("q_layernorm", "q_a_layernorm"),
        ("linear_q_up_proj", "q_b_proj"),
        ("linear_kv_down_proj", "kv_a_proj_with_mqa"),
        ("kv_layernorm", "kv_a_layernorm"),
        ("linear_kv_up_proj", "kv_b_proj"),
    )
)


class _QueryLatent:
    """The width of the latent of queries: null says that there is none, no word the width of transformers' class."""

    def read(self, hf: dict[str, Any]) -> list[Said]:
        return [("q_lora_rank", hf.get("q_lora_rank", 1536), "q_lora_rank")]

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"q_lora_rank": model.q_lora_rank}


class _Experts:
    """The experts: dense layers first, shared ones counted in widths of a routed one, the loss of the published code.

    transformers computes no loss for an even load; its keys are those of the model's own code.
    """

    def read(self, hf: dict[str, Any]) -> list[Said]:
        shared, width = hf.get("n_shared_experts", 2), hf.get("moe_intermediate_size")
        if type(shared) is not int or shared < 1 or type(width) is not int:
            raise UserError(
                f"config.json: n_shared_experts = {shared} of moe_intermediate_size = {width} is not supported "
                "(supported: 1 or more)"
            )
        dense, layers = hf.get("first_k_dense_replace", 0), hf["num_hidden_layers"]
        pattern = [int(i >= dense) for i in range(layers)]
        factor = hf.get("routed_scaling_factor", 1.0)
        kind = "seq_aux_loss" if hf.get("seq_aux", True) else "aux_loss"
        return [
            ("moe_shared_expert_intermediate_size", shared * width, "n_shared_experts * moe_intermediate_size"),
            ("moe_layer_freq", 1 if all(pattern) else pattern, "first_k_dense_replace"),
            ("moe_router_topk_scaling_factor", None if factor == 1 else factor, "routed_scaling_factor"),
            ("moe_router_load_balancing_type", [kind], "seq_aux"),
            ("moe_aux_loss_coeff", [hf.get("aux_loss_alpha", 0.001)], "aux_loss_alpha"),
        ]

    def write(self, model: ModelConfig) -> dict[str, Any]:
        sparse = expert_layers(model)
        shared, width = model.moe_shared_expert_intermediate_size or 0, model.moe_ffn_hidden_size or 1
        return {
            "n_shared_experts": shared // width,
            "first_k_dense_replace": sparse.index(True) if any(sparse) else len(sparse),
            "routed_scaling_factor": model.moe_router_topk_scaling_factor or 1.0,
            "seq_aux": model.moe_router_load_balancing_type[0] == "seq_aux_loss",
            "aux_loss_alpha": model.moe_aux_loss_coeff[0],
        }


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    rules=(
        *OUTSIDE_ATTENTION,
        *_LATENTS,
        *DENSE_MLP,
        *ROUTED_MLPS,
        *gated_mlp(f"{OURS}.mlp.shared_experts", f"{THEIRS}.mlp.shared_experts"),
    ),
    keys=(
        *COMMON_KEYS,
        Key("moe_intermediate_size", "moe_ffn_hidden_size"),
        Key("num_key_value_heads", "num_query_groups", like="num_attention_heads"),
        Key("rms_norm_eps", "layernorm_epsilon", 1e-6),
        Key("kv_lora_rank", "kv_lora_rank", 512),
        Key("qk_nope_head_dim", "qk_head_dim", 128),
        Key("qk_rope_head_dim", "qk_pos_emb_head_dim", 64),
        Key("v_head_dim", "v_head_dim", 128),
        Key("n_routed_experts", "num_moe_experts"),
        Key("num_experts_per_tok", "moe_router_topk"),
    ),
    fixed={
        **COMMON_FIXED,
        **EXPERTS_FIXED,
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
    },
    only={
        **COMMON_ONLY,
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rms_norm_eps": (1e-6,),  # transformers has this one in the norms of latents, whatever the others have
        "norm_topk_prob": (False,),
        "topk_method": ("greedy",),
        "scoring_func": ("softmax",),
        "moe_layer_freq": (1,),
    },
    aspects=(LatentRotary(), _QueryLatent(), _Experts()),
)
