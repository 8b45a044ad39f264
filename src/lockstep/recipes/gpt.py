"""Recipes of the plain GPT family."""

from lockstep.config import ConfigContainer, Ref
from lockstep.recipes.families import PRETRAINING
from lockstep.recipes.registry import from_differences, recipe_for
from lockstep.recipes.tuning import FINE_TUNING, LORA


@recipe_for(1, "vanilla_gpt_pretrain_1gpu_h100_bf16_config")
def vanilla_gpt_pretrain_config() -> ConfigContainer:
    """A GPT to be given its size: everything else is what ``pretrain_gpt.py`` does with its defaults.

    Bridge's recipe of this name decays by cosine with beta2 0.95 and weight decay 0.033 in force; this one keeps
    Megatron-LM's linear decay, 0.999 and 0.01, so that the two doors train the same run. Warm-up starts at the peak,
    so that a warm-up of one iteration does not turn the first update into a no-op.
    """
    return from_differences(
        "vanilla_gpt_pretrain_config",
        {
            "model.seq_length": 1024,
            "train.train_iters": 300_000,
            "train.micro_batch_size": 2,
            "train.global_batch_size": 32,
            "validation.eval_iters": 32,
            "validation.eval_interval": 500,
            "optimizer.lr": 3e-4,
            "optimizer.min_lr": 3e-5,
            "scheduler.lr_warmup_init": Ref("optimizer.lr"),
            "mixed_precision.bf16": True,
            "tokenizer.tokenizer_type": "NullTokenizer",
            "tokenizer.vocab_size": 32_000,
            "logger.log_interval": 10,
        },
    )


@recipe_for(1)
def vanilla_gpt_sft_config() -> ConfigContainer:
    """The model of ``checkpoint.pretrained_checkpoint``, whatever its family, all weights fine-tuned."""
    its_model = {"checkpoint.use_checkpoint_args": True}
    return from_differences("vanilla_gpt_sft_config", PRETRAINING, FINE_TUNING, its_model)


@recipe_for(1)
def vanilla_gpt_peft_config() -> ConfigContainer:
    """The model of ``checkpoint.pretrained_checkpoint``, whatever its family, with adapters trained."""
    return from_differences("vanilla_gpt_peft_config", LORA, parent=vanilla_gpt_sft_config)
