"""Fine-tuning recipes of the dense Qwen3 family."""

from typing import Any

from lockstep.config import ConfigContainer
from lockstep.recipes import qwen
from lockstep.recipes.registry import from_differences, recipe_for
from lockstep.recipes.tuning import FINE_TUNING, LORA, SMALL_LORA

_TUNING: dict[str, Any] = {
    **FINE_TUNING,
    "dataset.random_seed": 1234,
    "train.train_iters": 100,
    "train.global_batch_size": 32,
    "train.manual_gc": False,
    "train.manual_gc_interval": 0,
    "model.seq_length": 2048,
    "optimizer.adam_beta2": 0.95,
    "scheduler.lr_warmup_iters": 10,
    "ddp.grad_reduce_in_fp32": True,
}
_LORA: dict[str, Any] = {
    **LORA,
    **SMALL_LORA,
    "peft.target_modules": ["linear_qkv", "linear_proj"],
    "dataset.pad_seq_to_mult": 4,
    "ddp.use_distributed_optimizer": True,
}
_ONE_GPU = {"model.tensor_model_parallel_size": 1, "model.sequence_parallel": False}


@recipe_for(1, "qwen3_600m_sft_1gpu_h100_bf16_config")
def qwen3_600m_sft_config() -> ConfigContainer:
    """Qwen3 0.6B, all weights fine-tuned on packed samples of 2048 tokens."""
    return from_differences("qwen3_600m_sft_config", _TUNING, parent=qwen.qwen3_600m_pretrain_config)


@recipe_for(1, "qwen3_600m_peft_1gpu_h100_bf16_config")
def qwen3_600m_peft_config() -> ConfigContainer:
    """Qwen3 0.6B, adapters trained on packed samples of 2048 tokens."""
    return from_differences("qwen3_600m_peft_config", _TUNING, _LORA, parent=qwen.qwen3_600m_pretrain_config)


@recipe_for(1, "qwen3_1p7b_sft_1gpu_h100_bf16_config")
def qwen3_1p7b_sft_config() -> ConfigContainer:
    """Qwen3 1.7B, all weights fine-tuned on packed samples of 2048 tokens."""
    return from_differences("qwen3_1p7b_sft_config", _TUNING, parent=qwen.qwen3_1p7b_pretrain_config)


@recipe_for(1, "qwen3_1p7b_peft_1gpu_h100_bf16_config")
def qwen3_1p7b_peft_config() -> ConfigContainer:
    """Qwen3 1.7B, adapters trained on packed samples of 2048 tokens."""
    return from_differences("qwen3_1p7b_peft_config", _TUNING, _LORA, parent=qwen.qwen3_1p7b_pretrain_config)


@recipe_for(2, "qwen3_4b_sft_2gpu_h100_bf16_config")
def qwen3_4b_sft_config() -> ConfigContainer:
    """Qwen3 4B, all weights fine-tuned on packed samples of 2048 tokens."""
    return from_differences("qwen3_4b_sft_config", _TUNING, parent=qwen.qwen3_4b_pretrain_config)


@recipe_for(1, "qwen3_4b_peft_1gpu_h100_bf16_config")
def qwen3_4b_peft_config() -> ConfigContainer:
    """Qwen3 4B, adapters trained on packed samples of 2048 tokens."""
    return from_differences("qwen3_4b_peft_config", _TUNING, _LORA, _ONE_GPU, parent=qwen.qwen3_4b_pretrain_config)


@recipe_for(4, "qwen3_8b_sft_4gpu_h100_bf16_config")
def qwen3_8b_sft_config() -> ConfigContainer:
    """Qwen3 8B, all weights fine-tuned on packed samples of 2048 tokens."""
    layout = {"model.tensor_model_parallel_size": 4}
    return from_differences("qwen3_8b_sft_config", _TUNING, layout, parent=qwen.qwen3_8b_pretrain_config)


@recipe_for(8, "qwen3_8b_sft_8gpu_h100_bf16_32k_config")
def qwen3_8b_sft_32k_config() -> ConfigContainer:
    """Qwen3 8B, all weights fine-tuned on packed samples of 32768 tokens."""
    return from_differences(
        "qwen3_8b_sft_32k_config",
        {
            "train.global_batch_size": 8,
            "model.seq_length": 32_768,
            "model.calculate_per_token_loss": True,
            "model.context_parallel_size": 2,
            "model.sequence_parallel": True,
            "dataset.pad_seq_to_mult": 8,
        },
        parent=qwen3_8b_sft_config,
    )


@recipe_for(1, "qwen3_8b_peft_1gpu_h100_bf16_config")
def qwen3_8b_peft_config() -> ConfigContainer:
    """Qwen3 8B, adapters trained on packed samples of 2048 tokens."""
    return from_differences("qwen3_8b_peft_config", _TUNING, _LORA, parent=qwen.qwen3_8b_pretrain_config)


@recipe_for(8, "qwen3_14b_sft_8gpu_h100_bf16_config")
def qwen3_14b_sft_config() -> ConfigContainer:
    """Qwen3 14B, all weights fine-tuned on packed samples of 2048 tokens."""
    return from_differences("qwen3_14b_sft_config", _TUNING, parent=qwen.qwen3_14b_pretrain_config)


@recipe_for(1, "qwen3_14b_peft_1gpu_h100_bf16_config")
def qwen3_14b_peft_config() -> ConfigContainer:
    """Qwen3 14B, adapters trained on packed samples of 2048 tokens."""
    return from_differences("qwen3_14b_peft_config", _TUNING, _LORA, _ONE_GPU, parent=qwen.qwen3_14b_pretrain_config)


@recipe_for(16, "qwen3_32b_sft_16gpu_h100_bf16_config")
def qwen3_32b_sft_config() -> ConfigContainer:
    """Qwen3 32B, all weights fine-tuned on packed samples of 2048 tokens."""
    return from_differences("qwen3_32b_sft_config", _TUNING, parent=qwen.qwen3_32b_pretrain_config)


@recipe_for(1, "qwen3_32b_peft_1gpu_h100_bf16_config")
def qwen3_32b_peft_config() -> ConfigContainer:
    """Qwen3 32B, adapters trained on packed samples of 2048 tokens."""
    recomputed = {
        "model.pipeline_model_parallel_size": 1,
        "model.recompute_granularity": "full",
        "model.recompute_method": "uniform",
        "model.recompute_num_layers": 1,
    }
    return from_differences(
        "qwen3_32b_peft_config", _TUNING, _LORA, _ONE_GPU, recomputed, parent=qwen.qwen3_32b_pretrain_config
    )
