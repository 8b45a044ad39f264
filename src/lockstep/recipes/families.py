"""What the recipes of several families have in common."""

from typing import Any

from lockstep.config import Ref

PRETRAINING: dict[str, Any] = {
    "train.train_iters": 1_168_251,
    "train.micro_batch_size": 1,
    "train.global_batch_size": 512,
    "train.manual_gc": True,
    "train.manual_gc_interval": 100,
    "validation.eval_iters": 32,
    "validation.eval_interval": 2000,
    "optimizer.lr": 3e-4,
    "optimizer.min_lr": 3e-5,
    "optimizer.adam_beta2": 0.95,
    "optimizer.weight_decay": 0.033,
    "scheduler.lr_decay_style": "cosine",
    "scheduler.lr_wsd_decay_style": "minus_sqrt",
    "scheduler.lr_warmup_iters": 2000,
    "ddp.grad_reduce_in_fp32": True,
    "ddp.use_distributed_optimizer": True,
    "ddp.overlap_grad_reduce": True,
    "ddp.overlap_param_gather": True,
    "mixed_precision.bf16": True,
    "mixed_precision.fp8_recipe": "tensorwise",
    "mixed_precision.num_layers_at_start_in_bf16": 0,
    "mixed_precision.num_layers_at_end_in_bf16": 0,
    "dataset.split": "9999,8,2",
    "tokenizer.tokenizer_type": "NullTokenizer",
    "tokenizer.vocab_size": Ref("model.vocab_size"),
    "tokenizer.pad_vocab_size": False,
    "logger.log_interval": 10,
}
"""How Bridge's pre-training recipes of these families train.

They state a weight decay of 0.1 that their schedule replaces by 0.033 in every step; here the one in force is the one
stated. Their tokenizer has 32000 ids whatever the model's vocabulary; here it has as many as the published model.
Their attention kernel computes scores again in the backward pass; recomputing the core of attention does the same here.
"""

GATED_DECODER: dict[str, Any] = {
    "model.hidden_dropout": 0.0,
    "model.attention_dropout": 0.0,
    "model.add_bias_linear": False,
    "model.gated_linear_unit": True,
    "model.activation_func": "silu",
    "model.normalization": "RMSNorm",
    "model.position_embedding_type": "rope",
    "model.share_embeddings_and_output_weights": False,
}
"""What Llama, Qwen3 and DeepSeek-V2 compute alike: RMSNorm, a SiLU-gated MLP, rotary positions, no biases."""
