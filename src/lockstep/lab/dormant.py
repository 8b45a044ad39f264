"""Which settings do nothing under which other settings, and which part of a run a setting can change.

A setting that is dormant in either run cannot be the cause of a difference: where it is awake in one run only, the
setting that woke it (``governed_by``) differs too, and is the cause.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
"""The resolved tree by dotted path."""


@dataclass(frozen=True)
class Dormant:
    """``paths`` do nothing in a run whose config ``when`` holds for, because of ``reason``."""

    paths: tuple[str, ...]
    when: Callable[[Config], bool]
    reason: str
    governed_by: tuple[str, ...]


def _no_warmup(c: Config) -> bool:
    return not (
        c.get("scheduler.lr_warmup_iters")
        or c.get("scheduler.lr_warmup_samples")
        or c.get("scheduler.lr_warmup_fraction")
    )


def _is(path: str, *values: Any) -> Callable[[Config], bool]:
    return lambda c: c.get(path) in values


def _is_not(path: str, *values: Any) -> Callable[[Config], bool]:
    return lambda c: c.get(path) not in values


def _full_precision(c: Config) -> bool:
    return not (c.get("mixed_precision.bf16") or c.get("mixed_precision.fp16"))


def _per_split(c: Config) -> bool:
    paths = ("train_data_path", "valid_data_path", "test_data_path", "per_split_data_args_path")
    return any(c.get(f"dataset.{name}") for name in paths)


_DATA_PATHS = tuple(
    f"dataset.{name}"
    for name in (
        "data_path",
        "train_data_path",
        "valid_data_path",
        "test_data_path",
        "data_args_path",
        "per_split_data_args_path",
    )
)
_ROTARY = tuple(
    f"model.{name}"
    for name in (
        "rotary_interleaved",
        "rotary_base",
        "rotary_percent",
        "seq_len_interpolation_factor",
        "rope_scaling",
        "rope_scaling_factor",
        "apply_rope_fusion",
    )
)
_EVALUATION = tuple(
    f"validation.{name}"
    for name in ("eval_interval", "start_eval_at_iter", "eval_global_batch_size", "eval_micro_batch_size")
)
_WARMUP = ("scheduler.lr_warmup_iters", "scheduler.lr_warmup_samples", "scheduler.lr_warmup_fraction")
_PRECISION = ("mixed_precision.bf16", "mixed_precision.fp16")
_DYNAMIC_SCALE = tuple(
    f"mixed_precision.{name}" for name in ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
)

DORMANT: tuple[Dormant, ...] = (
    Dormant(("scheduler.lr_warmup_init",), _no_warmup, "there is no warm-up", _WARMUP),
    Dormant(
        ("scheduler.lr_warmup_iters", "scheduler.lr_warmup_samples"),
        lambda c: bool(c.get("scheduler.lr_warmup_fraction")),
        "scheduler.lr_warmup_fraction takes its place",
        ("scheduler.lr_warmup_fraction",),
    ),
    Dormant(
        ("scheduler.lr_wsd_decay_style", "scheduler.lr_wsd_decay_iters", "scheduler.lr_wsd_decay_samples"),
        _is_not("scheduler.lr_decay_style", "WSD"),
        "the decay style is not WSD",
        ("scheduler.lr_decay_style",),
    ),
    Dormant(
        ("optimizer.min_lr",),
        _is("scheduler.lr_decay_style", "constant"),
        "the learning rate does not decay",
        ("scheduler.lr_decay_style",),
    ),
    Dormant(
        ("scheduler.lr_decay_iters", "scheduler.lr_decay_samples"),
        lambda c: c.get("scheduler.lr_decay_style") == "constant" and not c.get("scheduler.lr_warmup_fraction"),
        "the learning rate does not decay",
        ("scheduler.lr_decay_style", "scheduler.lr_warmup_fraction"),
    ),
    Dormant(
        ("scheduler.start_weight_decay", "scheduler.end_weight_decay"),
        _is("scheduler.weight_decay_incr_style", "constant"),
        "weight decay is constant",
        ("scheduler.weight_decay_incr_style",),
    ),
    Dormant(
        ("optimizer.weight_decay",),
        _is_not("scheduler.weight_decay_incr_style", "constant", None),
        "scheduler.start_weight_decay and end_weight_decay take its place",
        ("scheduler.weight_decay_incr_style",),
    ),
    Dormant(
        ("optimizer.adam_beta1", "optimizer.adam_beta2", "optimizer.adam_eps"),
        _is_not("optimizer.optimizer", "adam"),
        "the optimizer is not Adam",
        ("optimizer.optimizer",),
    ),
    Dormant(
        ("optimizer.sgd_momentum",),
        _is_not("optimizer.optimizer", "sgd"),
        "the optimizer is not SGD",
        ("optimizer.optimizer",),
    ),
    Dormant(
        ("optimizer.apply_wd_to_qk_layernorm",),
        lambda c: not c.get("model.qk_layernorm"),
        "queries and keys are not normalised",
        ("model.qk_layernorm",),
    ),
    Dormant(
        _ROTARY,
        _is_not("model.position_embedding_type", "rope", "yarn", "mrope"),
        "positions are not rotary",
        ("model.position_embedding_type",),
    ),
    Dormant(
        ("model.rope_scaling_factor",),
        lambda c: not c.get("model.rope_scaling"),
        "rope scaling is off",
        ("model.rope_scaling",),
    ),
    Dormant(
        ("model.max_position_embeddings", "model.add_position_embedding"),
        _is_not("model.position_embedding_type", "learned_absolute"),
        "positions are not learned",
        ("model.position_embedding_type",),
    ),
    Dormant(
        ("model.add_qkv_bias",),
        _is("model.add_bias_linear", True),
        "all linear layers have biases",
        ("model.add_bias_linear",),
    ),
    Dormant(
        ("model.bias_activation_fusion",),
        lambda c: c.get("model.activation_func") != "gelu" or not c.get("model.add_bias_linear"),
        "it chooses the form of GeLU only with linear biases",
        ("model.activation_func", "model.add_bias_linear"),
    ),
    Dormant(
        ("model.make_vocab_size_divisible_by", "tokenizer.pad_vocab_size"),
        lambda c: c.get("model.vocab_size") is not None,
        "model.vocab_size holds the padded size",
        ("model.vocab_size",),
    ),
    Dormant(
        ("model.attention_softmax_in_fp32", "ddp.grad_reduce_in_fp32"),
        _full_precision,
        "everything is FP32",
        _PRECISION,
    ),
    Dormant(
        ("model.moe_router_pre_softmax",),
        _is_not("model.moe_router_score_function", "softmax"),
        "other score functions than softmax score all experts before the choice",
        ("model.moe_router_score_function",),
    ),
    Dormant(
        ("model.disable_bf16_reduced_precision_matmul",),
        lambda c: not c.get("mixed_precision.bf16"),
        "the run is not BF16",
        ("mixed_precision.bf16",),
    ),
    Dormant(
        ("mixed_precision.loss_scale", *_DYNAMIC_SCALE),
        lambda c: not c.get("mixed_precision.fp16"),
        "only FP16 scales the loss",
        ("mixed_precision.fp16",),
    ),
    Dormant(
        _DYNAMIC_SCALE,
        lambda c: c.get("mixed_precision.loss_scale") is not None,
        "the loss scale is static",
        ("mixed_precision.loss_scale",),
    ),
    Dormant((*_DATA_PATHS, "dataset.split"), _is("dataset.mock", True), "the data is generated", ("dataset.mock",)),
    Dormant(("dataset.split",), _per_split, "each split has its own data", _DATA_PATHS[1:]),
    Dormant(
        ("dataset.mid_level_dataset_surplus",),
        lambda c: bool(c.get("dataset.mock")) or (len(c.get("dataset.data_path") or []) < 2 and not _per_split(c)),
        "there is no blend",
        ("dataset.mock", *_DATA_PATHS),
    ),
    Dormant(
        ("tokenizer.vocab_file", "tokenizer.merge_file"),
        _is_not("tokenizer.tokenizer_type", "GPT2BPETokenizer"),
        "the tokenizer does not read it",
        ("tokenizer.tokenizer_type",),
    ),
    Dormant(
        ("tokenizer.tokenizer_model",),
        _is("tokenizer.tokenizer_type", "NullTokenizer", "GPT2BPETokenizer"),
        "the tokenizer does not read it",
        ("tokenizer.tokenizer_type",),
    ),
    Dormant(
        ("tokenizer.null_tokenizer_eod_id", "tokenizer.null_tokenizer_pad_id"),
        _is_not("tokenizer.tokenizer_type", "NullTokenizer"),
        "the tokenizer does not read it",
        ("tokenizer.tokenizer_type",),
    ),
    Dormant(
        ("tokenizer.tokenizer_hf_no_include_special_tokens",),
        _is_not("tokenizer.tokenizer_type", "HuggingFaceTokenizer"),
        "the tokenizer does not read it",
        ("tokenizer.tokenizer_type",),
    ),
    Dormant(_EVALUATION, _is("validation.eval_iters", 0), "nothing is evaluated", ("validation.eval_iters",)),
)


def why_dormant(path: str, config: Config) -> str | None:
    """Return why the setting does nothing in a run with this config, or None where it acts."""
    return next((rule.reason for rule in DORMANT if path in rule.paths and rule.when(config)), None)


DATA, INIT, SCHEDULE, COMPUTE, UPDATE, EVALUATION, LENGTH = (
    "data",
    "init",
    "schedule",
    "compute",
    "update",
    "evaluation",
    "length",
)
"""Parts of a run: its batches, initial weights, learning-rate and weight-decay schedule, forward and backward pass,
optimizer update, evaluations, and number of iterations."""

_EVERYTHING = frozenset({DATA, INIT, SCHEDULE, COMPUTE, EVALUATION})

_REACH: tuple[tuple[str, frozenset[str]], ...] = (
    ("validation.skip_train", frozenset({LENGTH, EVALUATION})),
    ("validation.", frozenset({EVALUATION})),
    ("scheduler.", frozenset({SCHEDULE})),
    ("optimizer.lr", frozenset({SCHEDULE})),
    ("optimizer.min_lr", frozenset({SCHEDULE})),
    ("optimizer.weight_decay", frozenset({SCHEDULE})),
    ("optimizer.", frozenset({UPDATE})),
    ("train.micro_batch_size", frozenset({COMPUTE, EVALUATION})),
    ("train.train_", frozenset({DATA, SCHEDULE, LENGTH})),
    ("train.exit_", frozenset({LENGTH})),
    ("train.", frozenset({DATA, SCHEDULE, COMPUTE, LENGTH, EVALUATION})),
    ("dataset.reset_", frozenset({COMPUTE, EVALUATION})),
    ("dataset.eod_mask_loss", frozenset({COMPUTE, EVALUATION, DATA})),
    ("dataset.", frozenset({DATA})),
    ("rng.seed", frozenset({DATA, INIT, COMPUTE})),
    ("model.seq_length", _EVERYTHING),
    ("model.init_method_std", frozenset({INIT})),
    ("model.embedding_init_method_std", frozenset({INIT})),
    ("model.use_cpu_initialization", frozenset({INIT})),
    ("model.hidden_dropout", frozenset({COMPUTE})),
    ("model.attention_dropout", frozenset({COMPUTE})),
    ("model.", frozenset({INIT, COMPUTE, EVALUATION})),
    ("mixed_precision.", frozenset({INIT, SCHEDULE, COMPUTE, EVALUATION})),
    ("ddp.", frozenset({COMPUTE})),
)


def reach(path: str) -> frozenset[str]:
    """Return the parts of a run that a setting can change directly; all of them for a setting not in the table."""
    return next((parts for prefix, parts in _REACH if path.startswith(prefix)), _EVERYTHING | {UPDATE, LENGTH})
