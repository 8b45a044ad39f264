"""Recipes of the DeepSeek-V2 family."""

from lockstep.config import ConfigContainer
from lockstep.recipes.families import GATED_DECODER, PRETRAINING
from lockstep.recipes.registry import from_differences, recipe_for
from lockstep.recipes.tuning import FINE_TUNING, LORA


@recipe_for(8, "deepseek_v2_lite_pretrain_8gpu_h100_bf16_config")
def deepseek_v2_lite_pretrain_config() -> ConfigContainer:
    """DeepSeek-V2-Lite (16B, 2.4B active) from scratch at a sequence length of 4096."""
    return from_differences(
        "deepseek_v2_lite_pretrain_config",
        PRETRAINING,
        GATED_DECODER,
        {
            "train.train_iters": 1_000_000,
            "model.num_layers": 27,
            "model.hidden_size": 2048,
            "model.ffn_hidden_size": 10944,
            "model.num_attention_heads": 16,
            "model.qk_layernorm": True,
            "model.layernorm_epsilon": 1e-6,
            "model.vocab_size": 102_400,
            "model.seq_length": 4096,
            "model.expert_model_parallel_size": 8,
            "model.recompute_granularity": "full",
            "model.recompute_method": "uniform",
            "model.recompute_num_layers": 1,
        },
        _LATENTS,
        _EXPERTS,
    )


@recipe_for(8)
def deepseek_v2_lite_sft_config() -> ConfigContainer:
    """DeepSeek-V2-Lite, all weights fine-tuned on packed samples of 4096 tokens."""
    return from_differences("deepseek_v2_lite_sft_config", FINE_TUNING, parent=deepseek_v2_lite_pretrain_config)


@recipe_for(1)
def deepseek_v2_lite_peft_config() -> ConfigContainer:
    """DeepSeek-V2-Lite, adapters trained on packed samples of 4096 tokens."""
    latents = ["linear_q_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj", "linear_fc1", "linear_fc2"]
    own = {"model.expert_model_parallel_size": 1, "peft.target_modules": latents}
    return from_differences(
        "deepseek_v2_lite_peft_config", FINE_TUNING, LORA, own, parent=deepseek_v2_lite_pretrain_config
    )


_LATENTS = {
    "model.multi_latent_attention": True,
    "model.kv_lora_rank": 512,
    "model.rope_type": "yarn",
    "model.rotary_scaling_factor": 40.0,
    "model.mscale": 0.707,
    "model.mscale_all_dim": 0.707,
}
_EXPERTS = {
    "model.num_moe_experts": 64,
    "model.moe_layer_freq": "[0]+[1]*26",
    "model.moe_ffn_hidden_size": 1408,
    "model.moe_shared_expert_intermediate_size": 2816,
    "model.moe_router_topk": 6,
    "model.moe_router_pre_softmax": True,
    "model.moe_router_dtype": "fp32",
    "model.moe_router_load_balancing_type": ["seq_aux_loss"],
    "model.moe_aux_loss_coeff": [0.001],
    "model.moe_token_dispatcher_type": "alltoall",
}
