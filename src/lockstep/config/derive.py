"""The one step that computes values a user left unset from those that were given."""

from collections.abc import Callable
from typing import Any

from lockstep.config.container import ConfigContainer
from lockstep.config.section import Origin, Ref
from lockstep.config.stages import layout_stages
from lockstep.errors import ConfigError

DEFAULT_SPLIT = "969, 30, 1"
MOCK_SPLIT = "1,1,1"


def interpolate(config: ConfigContainer) -> None:
    """Replace every ``Ref`` of the tree by the value it points at, in place.

    Raises:
        ConfigError: a reference points at a reference.
    """
    for info, value, origin in list(config.items()):
        if isinstance(value, Ref):
            target = config.get(value.path)
            if isinstance(target, Ref):
                raise ConfigError(f"{info.path} refers to {value.path}, which is itself a reference; give a value")
            config.set(info.path, target, Origin(origin.kind, f"{origin.detail} = {value.path}".strip()))


def derive(config: ConfigContainer, world_size: int = 1) -> None:
    """Fill in, in place, every unset value that follows from others; the origin names the rule.

    A rule whose inputs are missing or impossible leaves its value unset: validation reports the input.
    """
    for path, rule, describe in _RULES:
        if config.get(path) is None:
            value = rule(config, world_size)
            if value is not None:
                config.set(path, value, Origin("derived", describe))
    if config.model.add_bias_linear and not config.model.add_qkv_bias:
        config.set("model.add_qkv_bias", True, Origin("derived", "model.add_bias_linear"))
    if config.dataset.mock and config.dataset.split != MOCK_SPLIT:
        config.set("dataset.split", MOCK_SPLIT, Origin("derived", "mock data is always split so"))
    # A recipe's layout may be overridden in part; what the user asks for is not turned off in silence.
    inherited = config.origin("model.sequence_parallel").kind in ("recipe", "checkpoint")
    if inherited and config.model.sequence_parallel and config.model.tensor_model_parallel_size == 1:
        config.set("model.sequence_parallel", False, Origin("derived", "one tensor-parallel process"))
    if config.dist.use_megatron_fsdp and not config.ddp.use_distributed_optimizer:
        config.set("ddp.use_distributed_optimizer", True, Origin("derived", "dist.use_megatron_fsdp"))
    if config.model.apply_query_key_layer_scaling and not config.model.attention_softmax_in_fp32:
        why = Origin("derived", "model.apply_query_key_layer_scaling")
        config.set("model.attention_softmax_in_fp32", True, why)
    if config.mixed_precision.fp16 and config.mixed_precision.loss_scale is None:
        config.set("rerun_state_machine.check_for_nan_in_loss", False, Origin("derived", "dynamic loss scale"))


def model_processes(config: ConfigContainer) -> int:
    """Return how many processes work on one micro-batch: the others are data parallel."""
    m = config.model
    return m.tensor_model_parallel_size * m.pipeline_model_parallel_size * m.context_parallel_size


def has_data(config: ConfigContainer) -> bool:
    """Tell whether the configuration names any data set on disk."""
    d = config.dataset
    return any(
        (
            d.data_path,
            d.train_data_path,
            d.valid_data_path,
            d.test_data_path,
            d.data_args_path,
            d.per_split_data_args_path,
            d.dataset_root,
            d.hf_dataset_path,
        )
    )


def _ffn_hidden_size(c: ConfigContainer, _: int) -> int | None:
    hidden = c.model.hidden_size
    if not hidden:
        return None
    return (
        int(4 * hidden * 2 / 3 / 64) * 64
        if c.model.gated_linear_unit and c.model.activation_func == "silu"
        else 4 * hidden
    )


def _kv_channels(c: ConfigContainer, _: int) -> int | None:
    hidden, heads = c.model.hidden_size, c.model.num_attention_heads
    return hidden // heads if hidden and heads and hidden % heads == 0 else None


def _global_batch_size(c: ConfigContainer, world_size: int) -> int | None:
    if c.train.step_batch_size_schedule is not None:
        return None
    copies = max(1, world_size // max(1, model_processes(c)))
    return c.train.micro_batch_size * copies if c.train.micro_batch_size else None


def _virtual_stages(c: ConfigContainer, _: int) -> int | None:
    layout, processes = c.model.pipeline_model_parallel_layout, c.model.pipeline_model_parallel_size
    if layout is None or processes < 1:
        return None
    try:
        return layout_stages(layout) // processes or None
    except ValueError:  # which validation reports
        return None


def _train_iters(c: ConfigContainer, _: int) -> int | None:
    samples, batch = c.train.train_samples, c.train.global_batch_size
    if samples is None or not batch or c.train.rampup_batch_size is not None:
        return None
    return samples // batch


def _mock(c: ConfigContainer, _: int) -> bool:
    return not has_data(c) and not c.dataset.sft  # nobody means to fine-tune on generated data by saying nothing


def _split(c: ConfigContainer, _: int) -> str | None:
    if c.dataset.sft and c.dataset.hf_validation_proportion is not None:
        return None
    return DEFAULT_SPLIT if c.dataset.data_path or c.dataset.data_args_path else None


def _weight_decay(c: ConfigContainer, _: int) -> float | None:
    return c.optimizer.weight_decay if c.scheduler.weight_decay_incr_style == "constant" else None


_Rule = Callable[[ConfigContainer, int], Any]
_RULES: tuple[tuple[str, _Rule, str], ...] = (
    ("model.num_query_groups", lambda c, _: c.model.num_attention_heads, "model.num_attention_heads"),
    ("model.ffn_hidden_size", _ffn_hidden_size, "model.hidden_size"),
    (
        "model.moe_ffn_hidden_size",
        lambda c, _: None if c.model.num_moe_experts is None else c.model.ffn_hidden_size,
        "model.ffn_hidden_size",
    ),
    ("model.kv_channels", _kv_channels, "model.hidden_size // model.num_attention_heads"),
    (
        "model.rope_type",
        lambda c, _: "yarn" if c.model.multi_latent_attention else None,
        "default of multi-latent attention",
    ),
    ("model.max_position_embeddings", lambda c, _: c.model.seq_length, "model.seq_length"),
    (
        "model.recompute_modules",
        lambda c, _: ["core_attn"] if c.model.recompute_granularity == "selective" else None,
        "default of selective recomputation",
    ),
    ("model.embedding_init_method_std", lambda c, _: c.model.init_method_std, "model.init_method_std"),
    ("model.virtual_pipeline_model_parallel_size", _virtual_stages, "model.pipeline_model_parallel_layout"),
    ("train.global_batch_size", _global_batch_size, "train.micro_batch_size * data-parallel size"),
    ("train.train_iters", _train_iters, "train.train_samples // train.global_batch_size"),
    (
        "scheduler.lr_decay_iters",
        lambda c, _: None if c.train.train_samples or c.scheduler.lr_decay_samples else c.train.train_iters,
        "train.train_iters",
    ),
    ("scheduler.lr_decay_samples", lambda c, _: c.train.train_samples, "train.train_samples"),
    ("scheduler.start_weight_decay", _weight_decay, "optimizer.weight_decay"),
    ("scheduler.end_weight_decay", _weight_decay, "optimizer.weight_decay"),
    ("validation.eval_global_batch_size", lambda c, _: c.train.global_batch_size, "train.global_batch_size"),
    ("validation.eval_micro_batch_size", lambda c, _: c.train.micro_batch_size, "train.micro_batch_size"),
    ("dataset.random_seed", lambda c, _: c.rng.seed, "rng.seed"),
    ("dataset.dataloader_type", lambda c, _: "single", "consecutive samples"),
    ("dataset.mock", _mock, "no data set is named"),
    ("dataset.split", _split, "default for real data"),
    ("tokenizer.tokenizer_type", lambda c, _: "GPT2BPETokenizer", "default of pretrain_gpt.py"),
    ("ddp.grad_reduce_in_fp32", lambda c, _: not c.mixed_precision.fp16, "FP32 unless FP16 is trained"),
)
