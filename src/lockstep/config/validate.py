"""Checks of a resolved tree. They collect every problem, change nothing, and need neither a GPU nor torch."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from lockstep.config.container import ConfigContainer
from lockstep.config.derive import has_data, model_processes
from lockstep.config.experts import expert_problems, sharing_problems
from lockstep.config.fields import FieldInfo
from lockstep.config.finetuning_checks import finetuning_problems
from lockstep.config.float8 import float8_problems
from lockstep.config.latents import latent_problems
from lockstep.config.peft import peft_problems
from lockstep.config.section import Origin
from lockstep.config.sharding import sharding_problems
from lockstep.config.stages import stage_layers


def problems(config: ConfigContainer, world_size: int = 1) -> list[str]:
    """Return one sentence with its remedy for everything wrong with a resolved tree; empty when it can run."""
    found: list[str] = []
    for check in (
        _refused,
        _required,
        _ranges,
        _model,
        _experts,
        _latents,
        _recomputation,
        _batches,
        _length,
        _schedule,
        _precision,
        _data,
        _checkpoint,
        _adapters,
        _communication,
    ):
        found.extend(check(config))
    found.extend(float8_problems(config, partial(_name, config)))
    found.extend(finetuning_problems(config, partial(_name, config)))
    found.extend(_profiling(config, world_size))
    found.extend(_layout(config, world_size))
    return found


_AXES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


def _layout(c: ConfigContainer, world_size: int) -> Iterator[str]:
    m = c.model
    sizes = {_name(c, f"model.{path}"): getattr(m, path) for path in _AXES}
    wrong = [f"{name} = {size}: give 1 or more" for name, size in sizes.items() if size < 1]
    yield from wrong
    if wrong:
        return
    processes = model_processes(c)
    if world_size % processes:
        named = " times ".join(f"{name} = {size}" for name, size in sizes.items() if size > 1)
        yield f"{world_size} processes are not a multiple of {named}; start {processes} or a multiple of it"
    yield from _tensor_parallel(c)
    yield from _context_parallel(c)
    yield from _pipeline(c)
    if world_size % processes == 0:
        yield from _shares(c, world_size // processes)
        replicas = world_size // processes * m.context_parallel_size
        yield from sharding_problems(c, replicas, partial(_name, c))
        yield from sharing_problems(c, replicas, partial(_name, c))


def _tensor_parallel(c: ConfigContainer) -> Iterator[str]:
    m, size = c.model, c.model.tensor_model_parallel_size
    name = _name(c, "model.tensor_model_parallel_size")
    for path in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        value = getattr(m, path)
        # What follows from the heads is no second problem.
        if value and value % size and not (path == "num_query_groups" and value == m.num_attention_heads):
            yield f"{_name(c, f'model.{path}')} = {value} is not divisible by {name} = {size}; change one of them"
    if m.vocab_size and m.vocab_size < size:
        yield f"{_name(c, 'model.vocab_size')} = {m.vocab_size} is below {name} = {size}; lower that"
    if m.sequence_parallel and size == 1:
        yield (
            f"{_name(c, 'model.sequence_parallel')} splits the sequence between tensor-parallel processes, and "
            f"{name} = 1; raise that or drop it"
        )
    length, share = m.seq_length, size * m.context_parallel_size
    if m.sequence_parallel and length and length % share:
        context = f" times {_name(c, 'model.context_parallel_size')} = {m.context_parallel_size}"
        yield (
            f"{_name(c, 'model.seq_length')} = {length} is not divisible by {name} = {size}"
            f"{context if share > size else ''}, as --sequence-parallel needs; change one of them"
        )


def _context_parallel(c: ConfigContainer) -> Iterator[str]:
    m, size = c.model, c.model.context_parallel_size
    name, sizes = _name(c, "model.context_parallel_size"), m.hierarchical_context_parallel_sizes
    if size > 1 and m.seq_length and m.seq_length % (2 * size):
        yield (
            f"{_name(c, 'model.seq_length')} = {m.seq_length} is not divisible by 2 times {name} = {size}; every "
            f"process has two chunks of the sequence, so use a multiple of {2 * size}"
        )
    if sizes is not None and math.prod(sizes) != size:
        yield (
            f"the product of {_name(c, 'model.hierarchical_context_parallel_sizes')} = {sizes} is not {name} = {size}; "
            "change one of them"
        )
    if len(m.cp_comm_type) not in (1, m.num_layers):
        yield f"{_name(c, 'model.cp_comm_type')} names {len(m.cp_comm_type)} types; give one, or one for each layer"


_OF_PIPELINES = (
    "model.virtual_pipeline_model_parallel_size",
    "model.num_layers_in_first_pipeline_stage",
    "model.num_layers_in_last_pipeline_stage",
    "model.account_for_embedding_in_pipeline_split",
    "model.account_for_loss_in_pipeline_split",
    "model.pipeline_model_parallel_layout",
)


def _pipeline(c: ConfigContainer) -> Iterator[str]:
    m, name = c.model, _name(c, "model.pipeline_model_parallel_size")
    if m.pipeline_model_parallel_size == 1:
        for path in _OF_PIPELINES:
            value = c.get(path)
            # One virtual stage is what there is, whether said or found from a layout.
            if value is not None and value is not False and (path, value) != (_OF_PIPELINES[0], 1):
                yield f"{_name(c, path)} has no effect with {name} = 1; give 2 or more, or drop it"
        return
    virtual = m.virtual_pipeline_model_parallel_size
    if virtual is not None and virtual < 1:
        yield f"{_name(c, 'model.virtual_pipeline_model_parallel_size')} = {virtual}: give 1 or more"
        return
    if m.num_layers:
        try:
            stage_layers(m)
        except ValueError as error:
            yield f"{_name(c, 'model.num_layers')} = {m.num_layers}, {name} = {m.pipeline_model_parallel_size}: {error}"


def _communication(c: ConfigContainer) -> Iterator[str]:
    d, gather = c.ddp, _name(c, "ddp.overlap_param_gather")
    needed = ("ddp.use_distributed_optimizer", "ddp.overlap_grad_reduce")
    missing = " and ".join(_name(c, path) for path in needed if not c.get(path))
    if d.overlap_param_gather and missing:
        yield f"{gather} needs {missing}; add that or drop it"
    if d.num_buckets is not None and d.bucket_size is not None:
        yield "ddp.num_buckets (--ddp-num-buckets) and ddp.bucket_size (--ddp-bucket-size) exclude each other; drop one"
    group, stages = c.model.microbatch_group_size_per_vp_stage, c.model.pipeline_model_parallel_size
    if group is not None and group != stages:
        yield (
            f"{_name(c, 'model.microbatch_group_size_per_vp_stage')} = {group}: a virtual stage takes as many "
            f"micro-batches in a row as there are pipeline stages; give {stages}, or drop it"
        )


def _shares(c: ConfigContainer, dp: int) -> Iterator[str]:
    """Check that the data-parallel processes get whole micro-batches."""
    t, v = c.train, c.validation
    pairs = [("train.global_batch_size", t.global_batch_size, t.micro_batch_size)]
    if (v.eval_global_batch_size, v.eval_micro_batch_size) != (t.global_batch_size, t.micro_batch_size):
        pairs.append(("validation.eval_global_batch_size", v.eval_global_batch_size, v.eval_micro_batch_size))
    for path, whole, micro in pairs:
        if dp > 1 and whole and micro and whole % micro == 0 and whole % (micro * dp):
            yield (
                f"{_name(c, path)} = {whole} is not divisible by the micro-batch size {micro} times {dp} "
                f"data-parallel processes; use a multiple of {micro * dp}"
            )
    stages, interleaved = c.model.pipeline_model_parallel_size, (c.model.virtual_pipeline_model_parallel_size or 1) > 1
    size, micro = t.global_batch_size, (t.micro_batch_size or 0) * dp * stages
    if interleaved and size and micro and size % micro:
        yield (
            f"{_name(c, 'train.global_batch_size')} = {size} does not give an interleaved pipeline of {stages} stages "
            f"a multiple of {stages} micro-batches; use a multiple of {micro}"
        )


def spelled(info: FieldInfo, origin: Origin) -> str:
    """Name a field as the user gave it: the flag or key of its origin, or its path."""
    return origin.detail if origin.kind == "command line" and origin.detail else info.path


def _refused(c: ConfigContainer) -> Iterator[str]:
    for info, value, origin in c.items():
        if info.spec.refused and value not in info.accepted:
            allowed = " or ".join("unset" if v is None else _show(v) for v in info.accepted)
            yield f"{spelled(info, origin)} = {_show(value)}: {info.spec.refused} (accepted: {allowed})"


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _name(c: ConfigContainer, path: str) -> str:
    origin = c.origin(path)
    if origin.kind == "command line" and origin.detail:
        return origin.detail
    section, _, name = path.partition(".")
    flags = c.section(section).fields()[name].spec.flags
    return f"{path} ({flags[0]})" if flags else path


def _required(c: ConfigContainer) -> Iterator[str]:
    needed = ["model.num_layers", "model.hidden_size", "model.num_attention_heads", "model.seq_length"]
    needed += ["train.micro_batch_size"]
    if not c.validation.skip_train:
        needed.append("optimizer.lr")
    for path in needed:
        if c.get(path) is None:
            yield f"{_name(c, path)} is not set; give it a value"
    if c.train.train_iters is None and c.train.train_samples is None:
        yield "the length of the run is not set; give train.train_iters (--train-iters) or train.train_samples"


_POSITIVE = (
    "model.num_layers",
    "model.hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.ffn_hidden_size",
    "model.kv_channels",
    "model.seq_length",
    "model.max_position_embeddings",
    "model.vocab_size",
    "model.make_vocab_size_divisible_by",
    "model.recompute_num_layers",
    "model.rotary_base",
    "train.micro_batch_size",
    "train.global_batch_size",
    "train.train_iters",
    "train.train_samples",
    "train.exit_interval",
    "train.check_weight_hash_across_dp_replicas_interval",
    "ddp.bucket_size",
    "ddp.num_buckets",
    "dist.distributed_timeout_minutes",
    "dist.distributed_timeout_seconds_after_init",
    "checkpoint.save_interval",
    "checkpoint.save_retain_interval",
    "checkpoint.ckpt_step",
    "train.exit_duration_in_mins",
    "validation.eval_interval",
    "validation.eval_global_batch_size",
    "validation.eval_micro_batch_size",
    "tokenizer.vocab_size",
    "logger.log_interval",
    "logger.tensorboard_log_interval",
    "rng.seed",
    "scheduler.lr_decay_iters",
    "scheduler.lr_decay_samples",
)
_NOT_NEGATIVE = (
    "optimizer.lr",
    "optimizer.min_lr",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "optimizer.adam_eps",
    "validation.eval_iters",
    "scheduler.lr_warmup_iters",
    "scheduler.lr_warmup_samples",
    "scheduler.lr_warmup_init",
    "model.init_method_std",
    "model.embedding_init_method_std",
    "dataset.mid_level_dataset_surplus",
    "train.manual_gc_interval",
)
_SIZES = (*(path for path in _POSITIVE if path.startswith("model.")), "train.micro_batch_size", "tokenizer.vocab_size")
_LARGEST = {**dict.fromkeys(_SIZES, 2**31 - 1), "model.num_layers": 2**16}
_SHARES = ("model.hidden_dropout", "model.attention_dropout", "optimizer.adam_beta1", "optimizer.adam_beta2")


def _ranges(c: ConfigContainer) -> Iterator[str]:
    for path in _POSITIVE:
        value = c.get(path)
        if value is not None and not value > 0:
            yield f"{_name(c, path)} = {value}: give a value above 0"
        elif isinstance(value, int) and value > (largest := _LARGEST.get(path, 2**63 - 1)):
            yield f"{_name(c, path)} = {value}: give at most {largest}"
    for path in _NOT_NEGATIVE:
        value = c.get(path)
        if value is not None and not value >= 0:
            yield f"{_name(c, path)} = {value}: give 0 or more"
    for path in _SHARES:
        if not 0 <= c.get(path) < 1:
            yield f"{_name(c, path)} = {c.get(path)}: give a value from 0 up to, but not including, 1"
    if not 0 < c.model.rotary_percent <= 1:
        yield f"{_name(c, 'model.rotary_percent')} = {c.model.rotary_percent}: give a value above 0 and at most 1"


_YARN_OF_LATENTS = ", with which multi-latent attention has the positions of model.rope_type (--rope-type)"


def _model(c: ConfigContainer) -> Iterator[str]:
    m = c.model
    if m.hidden_size and m.num_attention_heads and m.kv_channels is None and m.hidden_size % m.num_attention_heads:
        yield (
            f"{_name(c, 'model.hidden_size')} = {m.hidden_size} is not divisible by "
            f"{_name(c, 'model.num_attention_heads')} = {m.num_attention_heads}; "
            "change one of them or set model.kv_channels (--kv-channels)"
        )
    if m.num_attention_heads and m.num_query_groups and m.num_attention_heads % m.num_query_groups:
        yield (
            f"{_name(c, 'model.num_attention_heads')} = {m.num_attention_heads} is not divisible by "
            f"{_name(c, 'model.num_query_groups')} = {m.num_query_groups}; change one of them"
        )
    if m.max_position_embeddings and m.seq_length and m.max_position_embeddings < m.seq_length:
        yield (
            f"{_name(c, 'model.max_position_embeddings')} = {m.max_position_embeddings} is below "
            f"{_name(c, 'model.seq_length')} = {m.seq_length}; raise it to at least that"
        )
    if m.position_embedding_type not in ("learned_absolute", "rope", "none"):
        yield (
            f"{_name(c, 'model.position_embedding_type')} = {m.position_embedding_type} is not supported yet; "
            f"use learned_absolute, rope or none{_YARN_OF_LATENTS if m.multi_latent_attention else ''}"
        )
    if not m.add_position_embedding and m.position_embedding_type == "learned_absolute":
        yield "--no-position-embedding needs --position-embedding-type rope or none"
    if m.rope_scaling and m.position_embedding_type != "rope":
        yield f"{_name(c, 'model.rope_scaling')} needs model.position_embedding_type=rope"
    plain_rope = m.position_embedding_type == "rope" and not m.multi_latent_attention
    if plain_rope and m.kv_channels and int(m.kv_channels * m.rotary_percent) % 2:
        yield (
            f"model.kv_channels * model.rotary_percent = {m.kv_channels * m.rotary_percent:g} is not even, so its "
            "channels cannot be rotated in pairs; change one of them"
        )
    if m.attention_backend in ("flash", "fused"):
        yield from _fused_attention(c)
    if m.flash_attention_version == 3:
        yield f"{_name(c, 'model.flash_attention_version')} = 3 is not supported; use 2 or 4"
    if m.transformer_impl == "inference_optimized":
        yield f"{_name(c, 'model.transformer_impl')} = inference_optimized: Lockstep trains; use local"


def _fused_attention(c: ConfigContainer) -> Iterator[str]:
    said = f"{_name(c, 'model.attention_backend')} = {c.model.attention_backend}"
    if c.model.attention_dropout > 0:
        yield f"{said} has no attention dropout; use --attention-dropout 0, or auto"
    if c.model.attention_backend == "flash":
        return
    if c.model.context_parallel_size > 1:
        yield f"{said} (cuDNN) does not work with context parallelism; use flash or auto"
    if c.dataset.reset_attention_mask:
        yield f"{said} (cuDNN) does not keep documents apart (--reset-attention-mask); use flash or auto"
    if c.model.deterministic_mode:
        yield f"{said} (cuDNN) is not deterministic; use flash or auto with --deterministic-mode"


def _experts(c: ConfigContainer) -> Iterator[str]:
    yield from expert_problems(c, partial(_name, c))


def _latents(c: ConfigContainer) -> Iterator[str]:
    yield from latent_problems(c, partial(_name, c))


def _adapters(c: ConfigContainer) -> Iterator[str]:
    yield from peft_problems(c, partial(_name, c))


_RECOMPUTED_MODULES = ("core_attn", "mlp", "layernorm")
_OF_EXPERTS = ("moe", "moe_act", "shared_experts")
_OF_LATENTS = ("mla_up_proj",)
# Megatron-LM has these too, for kinds of layers that Lockstep does not have.
_FOREIGN_MODULES = ("gdn_norm_out", "gdp_in_proj", "gdp_qkv", "mhc")


def _recomputation(c: ConfigContainer) -> Iterator[str]:
    m = c.model
    granularity, modules = _name(c, "model.recompute_granularity"), _name(c, "model.recompute_modules")
    if m.recompute_granularity == "full":
        if m.recompute_method is None:
            yield f"{granularity} = full needs {_name(c, 'model.recompute_method')}: uniform or block"
        if m.recompute_num_layers is None:
            yield (
                f"{granularity} = full needs {_name(c, 'model.recompute_num_layers')}: from 1 to the number of layers"
            )
    else:
        for path in ("model.recompute_method", "model.recompute_num_layers"):
            if c.get(path) is not None:
                yield f"{_name(c, path)} = {c.get(path)} is for model.recompute_granularity = full; drop it"
    if m.recompute_granularity == "selective":
        yield from _recomputed_modules(c, m.recompute_modules or [], modules)
    # Megatron-LM fills in core_attn even where nothing is recomputed, and its saved settings say so.
    elif m.recompute_modules not in (None, ["core_attn"]):
        yield f"{modules} has no effect without model.recompute_granularity = selective; add that or drop this"


def _recomputed_modules(c: ConfigContainer, given: list[str], name: str) -> Iterator[str]:
    experts = c.model.num_moe_experts is not None
    latents = c.model.multi_latent_attention
    modules = _RECOMPUTED_MODULES + (_OF_EXPERTS if experts else ()) + (_OF_LATENTS if latents else ())
    known = ", ".join(modules)
    if "shared_experts" in given and experts and c.model.moe_shared_expert_intermediate_size is None:
        yield f"{name}: the model has no shared_experts; use some of {known}"
    if not given:
        yield f"{name} is empty, so nothing would be recomputed; name some of {known}"
    for module in given:
        if module in _FOREIGN_MODULES:
            yield f"{name}: {module} is part of a kind of model that is not supported yet; use some of {known}"
        elif module in _OF_EXPERTS and not experts:
            yield f"{name}: {module} is part of models with experts; use some of {known}"
        elif module in _OF_LATENTS and not latents:
            yield f"{name}: {module} is part of multi-latent attention; use some of {known}"
        elif module not in modules:
            yield f"{name}: there is no module {module}; use some of {known}"


def _batches(c: ConfigContainer) -> Iterator[str]:
    t, v = c.train, c.validation
    yield from _divisible(c, "train.global_batch_size", t.global_batch_size, t.micro_batch_size)
    if v.eval_global_batch_size != t.global_batch_size or v.eval_micro_batch_size != t.micro_batch_size:
        yield from _divisible(c, "validation.eval_global_batch_size", v.eval_global_batch_size, v.eval_micro_batch_size)
    if t.rampup_batch_size is not None and t.step_batch_size_schedule is not None:
        yield "train.rampup_batch_size and train.step_batch_size_schedule exclude each other; drop one"
    if t.rampup_batch_size is not None and len(t.rampup_batch_size) != 3:
        yield f"{_name(c, 'train.rampup_batch_size')} takes three numbers: start, increment and samples"
    if t.step_batch_size_schedule is not None and t.global_batch_size is not None:
        yield "train.step_batch_size_schedule sets the global batch size; drop train.global_batch_size"


def _divisible(c: ConfigContainer, path: str, whole: int | None, part: int | None) -> Iterator[str]:
    if whole and part and whole % part:
        lower = whole - whole % part
        choices = f"{lower} or {lower + part}" if lower else str(part)
        yield f"{_name(c, path)} = {whole} is not divisible by the micro-batch size {part}; use {choices}"


def _length(c: ConfigContainer) -> Iterator[str]:
    t, s = c.train, c.scheduler
    given_iters = t.train_iters is not None and c.origin("train.train_iters").kind != "derived"
    if t.train_samples is not None and given_iters:
        yield "train.train_iters and train.train_samples exclude each other; drop one"
    if t.train_samples is not None and s.lr_decay_iters is not None:
        yield f"{_name(c, 'scheduler.lr_decay_iters')} counts iterations, the run samples; use lr_decay_samples"
    if t.train_samples is not None and s.lr_warmup_iters:
        yield f"{_name(c, 'scheduler.lr_warmup_iters')} counts iterations, the run samples; use lr_warmup_samples"
    if given_iters and (s.lr_decay_samples is not None or s.lr_warmup_samples):
        yield "the run counts iterations; use scheduler.lr_decay_iters and scheduler.lr_warmup_iters, not samples"
    if s.lr_warmup_fraction is not None and (s.lr_warmup_iters or s.lr_warmup_samples):
        yield "scheduler.lr_warmup_fraction excludes lr_warmup_iters and lr_warmup_samples; drop one"
    if s.lr_warmup_fraction is not None and not 0 <= s.lr_warmup_fraction < 1:
        yield f"scheduler.lr_warmup_fraction = {s.lr_warmup_fraction}: give a value from 0 up to, but not including, 1"


def _schedule(c: ConfigContainer) -> Iterator[str]:
    s, o = c.scheduler, c.optimizer
    unit = "samples" if c.train.train_samples is not None else "iters"
    decay = s.lr_decay_samples if unit == "samples" else s.lr_decay_iters
    warmup = s.lr_warmup_samples if unit == "samples" else s.lr_warmup_iters
    wsd = s.lr_wsd_decay_samples if unit == "samples" else s.lr_wsd_decay_iters
    if decay and warmup >= decay > 0:
        tenth = decay // 10
        yield (
            f"{_name(c, f'scheduler.lr_warmup_{unit}')} = {warmup} does not fit the {decay} {unit} over which the "
            f"learning rate decays; set scheduler.lr_warmup_{unit}={tenth}, "
            f"or scheduler.lr_decay_{unit}={warmup + 1} or more"
        )
    if o.lr is not None and o.min_lr > o.lr:
        yield f"{_name(c, 'optimizer.min_lr')} = {o.min_lr} is above {_name(c, 'optimizer.lr')} = {o.lr}; lower it"
    if o.lr is not None and s.lr_warmup_init > o.lr:
        yield f"{_name(c, 'scheduler.lr_warmup_init')} = {s.lr_warmup_init} is above the peak {o.lr}; lower it"
    if s.lr_decay_style == "WSD":
        if wsd is None:
            yield f"the WSD schedule needs scheduler.lr_wsd_decay_{unit} (--lr-wsd-decay-{unit})"
        elif decay and wsd > decay:
            yield f"scheduler.lr_wsd_decay_{unit} = {wsd} is longer than the whole decay of {decay}; lower it"
    yield from _weight_decay(c)


def _weight_decay(c: ConfigContainer) -> Iterator[str]:
    s = c.scheduler
    given = [p for p in ("start_weight_decay", "end_weight_decay") if c.origin(f"scheduler.{p}").kind != "derived"]
    if s.weight_decay_incr_style == "constant":
        differing = [p for p in given if getattr(s, p) is not None and getattr(s, p) != c.optimizer.weight_decay]
        if differing:
            yield (
                f"scheduler.{differing[0]} = {getattr(s, differing[0])} contradicts a constant weight decay of "
                f"{c.optimizer.weight_decay}; set optimizer.weight_decay, or another weight_decay_incr_style"
            )
    elif s.start_weight_decay is None or s.end_weight_decay is None:
        yield f"weight_decay_incr_style {s.weight_decay_incr_style} needs start_weight_decay and end_weight_decay"
    elif not 0 <= s.start_weight_decay <= s.end_weight_decay:
        yield (
            f"scheduler.start_weight_decay = {s.start_weight_decay} must lie between 0 and "
            f"end_weight_decay = {s.end_weight_decay}"
        )


def _precision(c: ConfigContainer) -> Iterator[str]:
    p = c.mixed_precision
    if p.fp16 and p.bf16:
        yield "mixed_precision.fp16 (--fp16) and mixed_precision.bf16 (--bf16) exclude each other; drop one"
    if c.optimizer.optimizer not in ("adam", "sgd"):
        yield f"{_name(c, 'optimizer.optimizer')} = {c.optimizer.optimizer} is not supported yet; use adam or sgd"
    if p.loss_scale is not None and not p.fp16:
        yield f"{_name(c, 'mixed_precision.loss_scale')} = {p.loss_scale} has no effect without --fp16; drop it"


def _data(c: ConfigContainer) -> Iterator[str]:
    d = c.dataset
    per_split = any((d.train_data_path, d.valid_data_path, d.test_data_path, d.per_split_data_args_path))
    if d.mock and has_data(c):
        yield "dataset.mock (--mock-data) and a data path exclude each other; drop one"
    if d.data_path and d.data_args_path:
        yield "dataset.data_path and dataset.data_args_path exclude each other; drop one"
    if (d.data_path or d.data_args_path) and per_split:
        yield "dataset.data_path and per-split data paths exclude each other; drop one"
    if per_split and d.split is not None:
        yield "dataset.split has no effect with per-split data paths; drop it"
    if d.mock is False and not has_data(c) and not d.sft:
        yield "no data set is named; give dataset.data_path (--data-path) or dataset.mock (--mock-data)"
    if d.dataloader_type == "external":
        yield "dataset.dataloader_type = external is not supported; use single or cyclic"
    if c.tokenizer.tokenizer_type == "NullTokenizer" and c.tokenizer.vocab_size is None:
        yield "NullTokenizer needs tokenizer.vocab_size (--vocab-size)"


_TRACE_OPTIONS = (
    "profiling.profile_step_start",
    "profiling.profile_step_end",
    "profiling.pytorch_profiler_collect_shapes",
    "profiling.pytorch_profiler_collect_callstack",
)


def _profiling(c: ConfigContainer, world_size: int) -> Iterator[str]:
    p, switch = c.profiling, "profiling.use_pytorch_profiler (--use-pytorch-profiler)"
    if not p.use_pytorch_profiler:
        if p.use_nsys_profiler:
            yield f"{_name(c, 'profiling.use_nsys_profiler')}: Nsight Systems is not supported; add {switch}"
        for path in _TRACE_OPTIONS:
            section, _, name = path.partition(".")
            if not p.use_nsys_profiler and c.get(path) != c.section(section).fields()[name].default:
                yield f"{_name(c, path)} has no effect without {switch}; add that or drop this one"
        # Megatron Bridge's default is [0], and its saved settings say so.
        if not p.use_nsys_profiler and p.profile_ranks not in ([], [0]):
            yield f"{_name(c, 'profiling.profile_ranks')} has no effect without {switch}; add that or drop this one"
        return
    start, end = _name(c, "profiling.profile_step_start"), _name(c, "profiling.profile_step_end")
    if p.profile_step_start < 0:
        yield f"{start} = {p.profile_step_start}: give 0 or more"
    least = max(p.profile_step_start, 1) + 1
    if p.profile_step_end < least:
        yield f"{end} = {p.profile_step_end} leaves no iteration to trace; give {least} or more"
    if c.train.train_iters is not None and p.profile_step_start > c.train.train_iters:
        yield f"{start} = {p.profile_step_start}: the run ends with iteration {c.train.train_iters}; start earlier"
    if c.validation.skip_train:
        yield f"{_name(c, 'profiling.use_pytorch_profiler')} traces training iterations, and this run only evaluates"
    for rank in p.profile_ranks:
        if not 0 <= rank < world_size:
            yield f"{_name(c, 'profiling.profile_ranks')}: there is no rank {rank}; ranks are 0 to {world_size - 1}"


def _checkpoint(c: ConfigContainer) -> Iterator[str]:
    k, s = c.checkpoint, c.scheduler
    if k.save is not None and k.save_interval is None:
        yield f"{_name(c, 'checkpoint.save')} needs checkpoint.save_interval (--save-interval)"
    saving = {
        "checkpoint.save_interval": k.save_interval is not None,
        "checkpoint.save_retain_interval": k.save_retain_interval is not None,
        "checkpoint.most_recent_k": k.most_recent_k >= 0,
        "checkpoint.async_save": k.async_save,
        "checkpoint.save_optim": not k.save_optim,
        "checkpoint.save_rng": not k.save_rng,
    }
    loading = {
        "checkpoint.ckpt_step": k.ckpt_step is not None,
        "checkpoint.finetune": k.finetune and k.pretrained_checkpoint is None,
        "checkpoint.load_optim": not k.load_optim,
        "checkpoint.load_rng": not k.load_rng,
        "checkpoint.use_checkpoint_args": k.use_checkpoint_args and k.pretrained_checkpoint is None,
        "scheduler.override_opt_param_scheduler": s.override_opt_param_scheduler,
        "scheduler.use_checkpoint_opt_param_scheduler": s.use_checkpoint_opt_param_scheduler,
    }
    for needed, given in (("save", saving), ("load", loading)):
        if getattr(k, needed) is None:
            for path in (path for path, asked in given.items() if asked):
                yield f"{_name(c, path)} has no effect without checkpoint.{needed} (--{needed}); give it or drop this"
    taking = {
        "checkpoint.use_mp_args_from_checkpoint_args": k.use_mp_args_from_checkpoint_args,
        "checkpoint.use_tokenizer_model_from_checkpoint_args": not k.use_tokenizer_model_from_checkpoint_args,
    }
    if not k.use_checkpoint_args:
        for path in (path for path, asked in taking.items() if asked):
            yield f"{_name(c, path)} has no effect without checkpoint.use_checkpoint_args (--use-checkpoint-args)"
    if k.save_interval and k.save_retain_interval and k.save_retain_interval % k.save_interval:
        yield (
            f"{_name(c, 'checkpoint.save_retain_interval')} = {k.save_retain_interval} is not a multiple of "
            f"checkpoint.save_interval = {k.save_interval}; use one, so that such iterations are saved"
        )
    if k.most_recent_k < -1 or k.most_recent_k == 0:
        yield f"{_name(c, 'checkpoint.most_recent_k')} = {k.most_recent_k}: give 1 or more, or -1 to keep all"
    if s.override_opt_param_scheduler and s.use_checkpoint_opt_param_scheduler:
        yield "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler exclude each other; drop one"
