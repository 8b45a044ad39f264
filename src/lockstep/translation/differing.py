"""Options that nobody set and that the two systems answer differently, with the reason why that matters."""

from collections.abc import Callable
from typing import Any

from lockstep.config import ConfigContainer

REASONS: dict[str, str] = {
    "model.hidden_dropout": "dropout draws other activations to zero",
    "model.attention_dropout": "dropout draws other attention weights to zero",
    "model.bias_activation_fusion": "decides the GeLU: its tanh approximation when fused, erf when not",
    "model.share_embeddings_and_output_weights": "decides whether embedding and output layer are one matrix",
    "model.attention_softmax_in_fp32": "changes the rounding of the attention weights",
    "model.add_bias_linear": "decides whether linear layers have biases",
    "model.add_qkv_bias": "decides whether the attention projections have biases",
    "model.gated_linear_unit": "decides the form of the MLP",
    "model.activation_func": "decides the activation of the MLP",
    "model.normalization": "decides the kind of norm",
    "model.layernorm_epsilon": "changes every norm",
    "model.position_embedding_type": "decides how positions enter the model",
    "model.rotary_base": "changes the rotary frequencies",
    "model.rotary_percent": "changes how many channels are rotated",
    "model.rope_scaling": "changes the rotary frequencies",
    "model.rope_scaling_factor": "changes the rotary frequencies",
    "model.seq_length": "changes the length of samples",
    "model.num_query_groups": "decides the number of key and value heads",
    "model.kv_channels": "decides the size of heads",
    "model.ffn_hidden_size": "decides the size of the MLP",
    "model.make_vocab_size_divisible_by": "changes the padded vocabulary, so the shape and the draw of the embedding",
    "model.vocab_size": "changes the padded vocabulary, so the shape and the draw of the embedding",
    "model.moe_aux_loss_coeff": "adds another amount of load-balancing loss",
    "model.moe_router_load_balancing_type": "balances the experts otherwise",
    "model.moe_z_loss_coeff": "adds another amount of router z-loss",
    "optimizer.adam_beta2": "changes every update of Adam",
    "optimizer.adam_beta1": "changes every update of Adam",
    "optimizer.adam_eps": "changes every update of Adam",
    "optimizer.weight_decay": "decides how much weights shrink each step",
    "optimizer.lr": "changes every update",
    "optimizer.min_lr": "changes where the learning rate ends",
    "optimizer.clip_grad": "changes which gradients are clipped",
    "scheduler.lr_decay_style": "changes the learning rate of every iteration",
    "scheduler.lr_wsd_decay_style": "changes the learning rate of the decay phase",
    "scheduler.lr_warmup_iters": "changes the learning rate of the first iterations",
    "scheduler.lr_warmup_init": "changes the learning rate that warm-up starts from",
    "scheduler.lr_decay_iters": "changes how fast the learning rate decays",
    "scheduler.start_weight_decay": "is the weight decay in force: it replaces optimizer.weight_decay at every step",
    "scheduler.end_weight_decay": "is the weight decay in force: it replaces optimizer.weight_decay at every step",
    "scheduler.override_opt_param_scheduler": "decides whether a checkpoint's schedule or this one counts on resuming",
    "train.global_batch_size": "changes the number of samples of a step",
    "train.micro_batch_size": "changes the order in which gradients are added up",
    "train.train_iters": "changes the length of the run, and with it the schedule",
    "validation.eval_iters": "changes how many validation samples are taken, and with it how the data is split",
    "validation.eval_interval": "changes how many validation samples are taken, and with it how the data is split",
    "dataset.random_seed": "seeds the order of the samples; Megatron-LM takes --seed for it",
    "dataset.split": "changes which documents are trained on",
    "dataset.mock": "decides whether data is generated",
    "dataset.full_validation": "changes the order and number of validation samples",
    "dataset.dataloader_type": "changes the order of the samples",
    "tokenizer.pad_vocab_size": "decides whether the vocabulary is padded, so the shape and the draw of the embedding",
    "tokenizer.vocab_size": "changes the size of the vocabulary",
    "tokenizer.tokenizer_type": "changes the tokens",
    "mixed_precision.bf16": "changes the precision of everything",
    "mixed_precision.fp16": "changes the precision of everything",
    "mixed_precision.fp8_recipe": "changes how FP8 operands are scaled",
    "mixed_precision.num_layers_at_start_in_bf16": "changes which layers stay out of FP8",
    "mixed_precision.num_layers_at_end_in_bf16": "changes which layers stay out of FP8",
    "ddp.grad_reduce_in_fp32": "changes the precision in which gradients are added up",
    "ddp.use_distributed_optimizer": "shards the optimizer, which adds up gradients in another order",
    "run.gradient_sync": "adds up gradients in another order",
    "ddp.average_in_collective": "changes where gradients are averaged",
    "rerun_state_machine.rerun_mode": "decides whether a suspicious result is computed again",
    "rng.seed": "seeds weights, dropout and data",
}

_EFFECTS = {
    "run": "changes the run",
    "speed": "changes speed only",
    "log": "changes logging only",
    "path": "changes where things are kept only",
}


def reason(path: str, effect: str) -> str:
    """Return why another value of a path matters."""
    return REASONS.get(path, _EFFECTS[effect])


def effect_reason(effect: str) -> str:
    """Return what an option of this effect changes."""
    return _EFFECTS[effect]


_WHERE: tuple[tuple[str, Callable[[ConfigContainer], Any]], ...] = (
    ("optimizer.muon_", lambda c: "muon" in c.optimizer.optimizer),
    ("optimizer.optimizer_offload", lambda c: c.optimizer.optimizer_cpu_offload),
    ("scheduler.lr_wsd_", lambda c: c.scheduler.lr_decay_style == "WSD"),
    ("scheduler.override_opt", lambda c: c.checkpoint.load),
    ("model.rope_scaling_factor", lambda c: c.model.rope_scaling),
    ("model.rotary_", lambda c: c.model.position_embedding_type in ("rope", "yarn", "mrope")),
    ("model.rope_type", lambda c: c.model.multi_latent_attention),
    ("model.bias_activation_fusion", lambda c: c.model.add_bias_linear and c.model.activation_func == "gelu"),
    ("mixed_precision.fp8_recipe", lambda c: c.mixed_precision.fp8),
    ("mixed_precision.num_layers_at", lambda c: c.mixed_precision.first_last_layers_bf16),
    ("model.moe_", lambda c: c.model.num_moe_experts),
    ("model.q_lora", lambda c: c.model.multi_latent_attention),
    ("model.kv_lora", lambda c: c.model.multi_latent_attention),
)


def matters(path: str, config: ConfigContainer) -> bool:
    """Tell whether a path is read at all in such a run."""
    return all(bool(holds(config)) for prefix, holds in _WHERE if path.startswith(prefix))
