"""Recipes of the Llama 3 family."""

from lockstep.config import ConfigContainer
from lockstep.recipes.families import GATED_DECODER, PRETRAINING
from lockstep.recipes.registry import from_differences, recipe_for


@recipe_for(2, "llama3_8b_pretrain_2gpu_h100_bf16_config")
def llama3_8b_pretrain_config() -> ConfigContainer:
    """Llama 3 8B from scratch at a sequence length of 8192."""
    return from_differences(
        "llama3_8b_pretrain_config",
        PRETRAINING,
        GATED_DECODER,
        {
            "model.num_layers": 32,
            "model.hidden_size": 4096,
            "model.ffn_hidden_size": 14336,
            "model.num_attention_heads": 32,
            "model.num_query_groups": 8,
            "model.kv_channels": 128,
            "model.vocab_size": 128_256,
            "model.rotary_base": 500_000,
            "model.seq_length": 8192,
            "model.context_parallel_size": 2,
        },
    )


@recipe_for(2, "llama31_8b_pretrain_2gpu_h100_bf16_config")
def llama31_8b_pretrain_config() -> ConfigContainer:
    """Llama 3.1 8B from scratch: Llama 3 8B with scaled rotary frequencies."""
    scaled = {"model.rope_scaling": True, "model.rope_scaling_factor": 8.0}
    return from_differences("llama31_8b_pretrain_config", scaled, parent=llama3_8b_pretrain_config)


@recipe_for(1, "llama32_1b_pretrain_1gpu_h100_bf16_config")
def llama32_1b_pretrain_config() -> ConfigContainer:
    """Llama 3.2 1B from scratch at a sequence length of 8192."""
    return from_differences(
        "llama32_1b_pretrain_config",
        {
            "model.num_layers": 16,
            "model.hidden_size": 2048,
            "model.ffn_hidden_size": 8192,
            "model.kv_channels": 64,
            "model.share_embeddings_and_output_weights": True,
            "model.rope_scaling_factor": 32.0,
            "model.context_parallel_size": 1,
        },
        parent=llama31_8b_pretrain_config,
    )


@recipe_for(1, "llama32_3b_pretrain_1gpu_h100_bf16_config")
def llama32_3b_pretrain_config() -> ConfigContainer:
    """Llama 3.2 3B from scratch at a sequence length of 8192."""
    size = {
        "model.num_layers": 28,
        "model.hidden_size": 3072,
        "model.num_attention_heads": 24,
        "model.kv_channels": 128,
    }
    return from_differences("llama32_3b_pretrain_config", size, parent=llama32_1b_pretrain_config)


@recipe_for(32, "llama3_70b_pretrain_32gpu_h100_bf16_config")
def llama3_70b_pretrain_config() -> ConfigContainer:
    """Llama 3 70B from scratch at a sequence length of 8192."""
    return from_differences(
        "llama3_70b_pretrain_config",
        {
            "model.num_layers": 80,
            "model.hidden_size": 8192,
            "model.ffn_hidden_size": 28672,
            "model.num_attention_heads": 64,
            "model.tensor_model_parallel_size": 8,
            "model.sequence_parallel": True,
            "model.pipeline_model_parallel_size": 2,
        },
        parent=llama3_8b_pretrain_config,
    )


@recipe_for(32, "llama31_70b_pretrain_32gpu_h100_bf16_config")
def llama31_70b_pretrain_config() -> ConfigContainer:
    """Llama 3.1 70B from scratch: Llama 3 70B with scaled rotary frequencies."""
    scaled = {"model.rope_scaling": True, "model.rope_scaling_factor": 8.0}
    return from_differences("llama31_70b_pretrain_config", scaled, parent=llama3_70b_pretrain_config)
