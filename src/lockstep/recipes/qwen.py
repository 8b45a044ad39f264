"""Recipes of the dense Qwen3 family."""

from lockstep.config import ConfigContainer
from lockstep.recipes.families import GATED_DECODER, PRETRAINING
from lockstep.recipes.registry import from_differences, recipe_for


@recipe_for(16, "qwen3_8b_pretrain_16gpu_h100_bf16_config")
def qwen3_8b_pretrain_config() -> ConfigContainer:
    """Qwen3 8B from scratch at a sequence length of 4096, for 100 iterations."""
    return from_differences(
        "qwen3_8b_pretrain_config",
        PRETRAINING,
        GATED_DECODER,
        {
            "model.num_layers": 36,
            "model.hidden_size": 4096,
            "model.ffn_hidden_size": 12288,
            "model.num_attention_heads": 32,
            "model.num_query_groups": 8,
            "model.kv_channels": 128,
            "model.qk_layernorm": True,
            "model.layernorm_epsilon": 1e-6,
            "model.vocab_size": 151_936,
            "model.rotary_base": 1_000_000,
            "model.seq_length": 4096,
            "train.train_iters": 100,
            "train.global_batch_size": 1024,
            "validation.eval_interval": 500,
            "scheduler.lr_warmup_iters": 40,
            "ddp.grad_reduce_in_fp32": False,
        },
    )


@recipe_for(1, "qwen3_600m_pretrain_1gpu_h100_bf16_config")
def qwen3_600m_pretrain_config() -> ConfigContainer:
    """Qwen3 0.6B from scratch at a sequence length of 4096, for 100 iterations."""
    return from_differences(
        "qwen3_600m_pretrain_config",
        {
            "model.num_layers": 28,
            "model.hidden_size": 1024,
            "model.ffn_hidden_size": 3072,
            "model.num_attention_heads": 16,
            "model.share_embeddings_and_output_weights": True,
        },
        parent=qwen3_8b_pretrain_config,
    )


@recipe_for(1, "qwen3_1p7b_pretrain_1gpu_h100_bf16_config")
def qwen3_1p7b_pretrain_config() -> ConfigContainer:
    """Qwen3 1.7B from scratch at a sequence length of 4096, for 100 iterations."""
    size = {"model.hidden_size": 2048, "model.ffn_hidden_size": 6144}
    return from_differences("qwen3_1p7b_pretrain_config", size, parent=qwen3_600m_pretrain_config)


@recipe_for(2, "qwen3_4b_pretrain_2gpu_h100_bf16_config")
def qwen3_4b_pretrain_config() -> ConfigContainer:
    """Qwen3 4B from scratch at a sequence length of 4096, for 100 iterations."""
    return from_differences(
        "qwen3_4b_pretrain_config",
        {
            "model.hidden_size": 2560,
            "model.ffn_hidden_size": 9728,
            "model.share_embeddings_and_output_weights": True,
            "model.tensor_model_parallel_size": 2,
            "model.sequence_parallel": True,
        },
        parent=qwen3_8b_pretrain_config,
    )


@recipe_for(8, "qwen3_14b_pretrain_8gpu_h100_bf16_config")
def qwen3_14b_pretrain_config() -> ConfigContainer:
    """Qwen3 14B from scratch at a sequence length of 4096, for 100 iterations."""
    return from_differences(
        "qwen3_14b_pretrain_config",
        {
            "model.num_layers": 40,
            "model.hidden_size": 5120,
            "model.ffn_hidden_size": 17408,
            "model.num_attention_heads": 40,
            "model.tensor_model_parallel_size": 8,
            "model.sequence_parallel": True,
        },
        parent=qwen3_8b_pretrain_config,
    )


@recipe_for(16, "qwen3_32b_pretrain_16gpu_h100_bf16_config")
def qwen3_32b_pretrain_config() -> ConfigContainer:
    """Qwen3 32B from scratch at a sequence length of 4096, for 100 iterations."""
    return from_differences(
        "qwen3_32b_pretrain_config",
        {
            "model.num_layers": 64,
            "model.ffn_hidden_size": 25600,
            "model.num_attention_heads": 64,
            "model.pipeline_model_parallel_size": 2,
        },
        parent=qwen3_14b_pretrain_config,
    )
