"""Fine-tuning recipes of the Llama 3 family."""

from lockstep.config import ConfigContainer
from lockstep.recipes import llama
from lockstep.recipes.registry import from_differences, recipe_for
from lockstep.recipes.tuning import FINE_TUNING, LORA, SMALL_LORA


@recipe_for(1, "llama32_1b_sft_1gpu_h100_bf16_config")
def llama32_1b_sft_config() -> ConfigContainer:
    """Llama 3.2 1B, all weights fine-tuned on packed samples of 4096 tokens."""
    return from_differences("llama32_1b_sft_config", FINE_TUNING, parent=llama.llama32_1b_pretrain_config)


@recipe_for(1, "llama32_1b_peft_1gpu_h100_bf16_config")
def llama32_1b_peft_config() -> ConfigContainer:
    """Llama 3.2 1B, adapters trained on packed samples of 4096 tokens."""
    return from_differences("llama32_1b_peft_config", FINE_TUNING, LORA, parent=llama.llama32_1b_pretrain_config)


@recipe_for(1, "llama32_3b_sft_1gpu_h100_bf16_config")
def llama32_3b_sft_config() -> ConfigContainer:
    """Llama 3.2 3B, all weights fine-tuned on packed samples of 4096 tokens."""
    return from_differences("llama32_3b_sft_config", FINE_TUNING, parent=llama.llama32_3b_pretrain_config)


@recipe_for(1, "llama32_3b_peft_1gpu_h100_bf16_config")
def llama32_3b_peft_config() -> ConfigContainer:
    """Llama 3.2 3B, adapters trained on packed samples of 4096 tokens."""
    return from_differences("llama32_3b_peft_config", FINE_TUNING, LORA, parent=llama.llama32_3b_pretrain_config)


@recipe_for(2, "llama3_8b_sft_2gpu_h100_bf16_config")
def llama3_8b_sft_config() -> ConfigContainer:
    """Llama 3 8B, all weights fine-tuned on packed samples of 4096 tokens."""
    layout = {"model.tensor_model_parallel_size": 2}
    return from_differences("llama3_8b_sft_config", FINE_TUNING, layout, parent=llama.llama3_8b_pretrain_config)


@recipe_for(1, "llama3_8b_peft_1gpu_h100_bf16_config")
def llama3_8b_peft_config() -> ConfigContainer:
    """Llama 3 8B, adapters trained on packed samples of 4096 tokens."""
    return from_differences(
        "llama3_8b_peft_config", FINE_TUNING, LORA, SMALL_LORA, parent=llama.llama3_8b_pretrain_config
    )


@recipe_for(2, "llama31_8b_sft_2gpu_h100_bf16_config")
def llama31_8b_sft_config() -> ConfigContainer:
    """Llama 3.1 8B, all weights fine-tuned on packed samples of 4096 tokens."""
    layout = {"model.tensor_model_parallel_size": 2}
    return from_differences("llama31_8b_sft_config", FINE_TUNING, layout, parent=llama.llama31_8b_pretrain_config)


@recipe_for(1, "llama31_8b_peft_1gpu_h100_bf16_config")
def llama31_8b_peft_config() -> ConfigContainer:
    """Llama 3.1 8B, adapters trained on packed samples of 4096 tokens."""
    return from_differences(
        "llama31_8b_peft_config", FINE_TUNING, LORA, SMALL_LORA, parent=llama.llama31_8b_pretrain_config
    )


@recipe_for(32, "llama3_70b_sft_32gpu_h100_bf16_config")
def llama3_70b_sft_config() -> ConfigContainer:
    """Llama 3 70B, all weights fine-tuned on packed samples of 4096 tokens."""
    return from_differences("llama3_70b_sft_config", FINE_TUNING, parent=llama.llama3_70b_pretrain_config)


@recipe_for(8, "llama3_70b_peft_8gpu_h100_bf16_config")
def llama3_70b_peft_config() -> ConfigContainer:
    """Llama 3 70B, adapters trained on packed samples of 4096 tokens."""
    layout = {"model.pipeline_model_parallel_size": 1}
    return from_differences(
        "llama3_70b_peft_config", FINE_TUNING, LORA, SMALL_LORA, layout, parent=llama.llama3_70b_pretrain_config
    )


@recipe_for(32, "llama31_70b_sft_32gpu_h100_bf16_config")
def llama31_70b_sft_config() -> ConfigContainer:
    """Llama 3.1 70B, all weights fine-tuned on packed samples of 4096 tokens."""
    return from_differences("llama31_70b_sft_config", FINE_TUNING, parent=llama.llama31_70b_pretrain_config)


@recipe_for(8, "llama31_70b_peft_8gpu_h100_bf16_config")
def llama31_70b_peft_config() -> ConfigContainer:
    """Llama 3.1 70B, adapters trained on packed samples of 4096 tokens."""
    layout = {"model.pipeline_model_parallel_size": 1}
    return from_differences(
        "llama31_70b_peft_config", FINE_TUNING, LORA, SMALL_LORA, layout, parent=llama.llama31_70b_pretrain_config
    )
