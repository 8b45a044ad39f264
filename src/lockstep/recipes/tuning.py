"""What the fine-tuning recipes of several families have in common."""

from typing import Any

FINE_TUNING: dict[str, Any] = {
    "rng.seed": 5678,
    "train.train_iters": 1000,
    "train.global_batch_size": 8,
    "model.seq_length": 4096,
    "model.context_parallel_size": 1,
    "validation.eval_interval": 30,
    "optimizer.lr": 5e-6,
    "optimizer.min_lr": 0.0,
    "optimizer.adam_beta2": 0.98,
    "scheduler.lr_warmup_iters": 50,
    "ddp.overlap_grad_reduce": False,
    "ddp.overlap_param_gather": False,
    "dataset.split": None,
    "dataset.sft": True,
    "dataset.dataloader_type": "batch",
    "dataset.enable_offline_packing": True,
    "dataset.hf_validation_proportion": 0.1,
    "dataset.do_test": False,
    "tokenizer.tokenizer_type": "HuggingFaceTokenizer",
    "tokenizer.vocab_size": None,
    "logger.log_interval": 1,
}
"""How Bridge's recipes fine-tune all weights of Llama, after its recipes of pre-training.

The tokenizer and the weights are those of ``checkpoint.pretrained_checkpoint``, the samples those of a folder that is
named: nothing is fetched.
"""

LORA: dict[str, Any] = {
    "peft.scheme": "lora",
    "optimizer.lr": 1e-4,
    "ddp.use_distributed_optimizer": False,
}
"""The difference from it where low-rank adapters of rank 32 are trained on all linear layers."""

SMALL_LORA: dict[str, Any] = {"peft.dim": 8, "peft.alpha": 16}
"""The difference of Bridge's recipes of larger models: adapters of rank 8."""
