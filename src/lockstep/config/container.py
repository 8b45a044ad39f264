"""The config tree: every section in one container, addressed by dotted path."""

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

from lockstep.config.data import DatasetConfig, TokenizerConfig
from lockstep.config.distributed import CommOverlapConfig, DDPConfig, DistributedConfig
from lockstep.config.fields import FieldInfo
from lockstep.config.finetuning import BRIDGE_KEYS, FORMER_BRIDGE_KEYS
from lockstep.config.model import ModelConfig
from lockstep.config.output import CheckpointConfig, LoggerConfig, ProfilingConfig, RunConfig, StragglerConfig
from lockstep.config.peft import PEFTConfig
from lockstep.config.resilience import FaultInjectorConfig, FaultToleranceConfig, InProcessRestartConfig
from lockstep.config.section import Origin, Section
from lockstep.config.training import (
    MixedPrecisionConfig,
    OptimizerConfig,
    RerunStateMachineConfig,
    RNGConfig,
    SchedulerConfig,
    TrainConfig,
    ValidationConfig,
)
from lockstep.errors import ConfigError, nearest

ALIASES: dict[str, str] = {
    "dataset.sequence_length": "model.seq_length",
    "dataset.seq_length": "model.seq_length",
    "train.eval_iters": "validation.eval_iters",
    "train.eval_interval": "validation.eval_interval",
    "train.skip_train": "validation.skip_train",
    "dataset.full_validation": "validation.full_validation",
    "dataset.multiple_validation_sets": "validation.multiple_validation_sets",
    "model.fp16": "mixed_precision.fp16",
    "model.bf16": "mixed_precision.bf16",
    "optimizer.fp16": "mixed_precision.fp16",
    "optimizer.bf16": "mixed_precision.bf16",
    "optimizer.loss_scale": "mixed_precision.loss_scale",
    "optimizer.initial_loss_scale": "mixed_precision.initial_loss_scale",
    "optimizer.min_loss_scale": "mixed_precision.min_loss_scale",
    "optimizer.loss_scale_window": "mixed_precision.loss_scale_window",
    "optimizer.hysteresis": "mixed_precision.hysteresis",
    "mixed_precision.grad_reduce_in_fp32": "ddp.grad_reduce_in_fp32",
    "optimizer.use_distributed_optimizer": "ddp.use_distributed_optimizer",
    "optimizer.overlap_param_gather": "ddp.overlap_param_gather",
    "comm_overlap.overlap_grad_reduce": "ddp.overlap_grad_reduce",
    "comm_overlap.overlap_param_gather": "ddp.overlap_param_gather",
    "ddp.check_for_nan_in_grad": "rerun_state_machine.check_for_nan_in_loss",
    "ddp.use_megatron_fsdp": "dist.use_megatron_fsdp",
    "model.tp_comm_overlap": "comm_overlap.tp_comm_overlap",
    "model.use_te_rng_tracker": "rng.te_rng_tracker",
    "tokenizer.padded_vocab_size": "model.vocab_size",
    "tokenizer.make_vocab_size_divisible_by": "model.make_vocab_size_divisible_by",
    "dist.lazy_init": "dist.lazy_mpu_init",
    **FORMER_BRIDGE_KEYS,
    **BRIDGE_KEYS,
}
"""Other spellings of a key: Bridge versions name some fields twice, the tree has each once."""

SECTIONS: tuple[type[Section], ...] = (
    ModelConfig,
    TrainConfig,
    ValidationConfig,
    OptimizerConfig,
    SchedulerConfig,
    MixedPrecisionConfig,
    DatasetConfig,
    TokenizerConfig,
    RNGConfig,
    RunConfig,
    CheckpointConfig,
    PEFTConfig,
    LoggerConfig,
    DDPConfig,
    DistributedConfig,
    CommOverlapConfig,
    RerunStateMachineConfig,
    ProfilingConfig,
    StragglerConfig,
    InProcessRestartConfig,
    FaultToleranceConfig,
    FaultInjectorConfig,
)


@cache
def all_fields() -> dict[str, FieldInfo]:
    """Return every field of the tree by dotted path, in order."""
    return {info.path: info for cls in SECTIONS for info in cls.fields().values()}


def canonical(path: str) -> str:
    """Return the one dotted path of a key or of another spelling of it.

    Raises:
        ConfigError: the tree has no such key; names the nearest ones.
    """
    path = ALIASES.get(path, path)
    if path not in all_fields():
        known = [*all_fields(), *ALIASES]
        section = path.partition(".")[0]
        sections = [cls.section_name for cls in SECTIONS]
        if "." not in path and section in sections:
            raise ConfigError(f"{path} is a section; set one of its keys, such as {path}.{_first_field(path)}")
        if is_group(path):
            inside = next(key for key in ALIASES if key.startswith(f"{path}."))
            raise ConfigError(f"{path} is a group of keys; set one of them, such as {inside}")
        raise ConfigError(f"unknown key {path}.{nearest(path, known)}")
    return path


@cache
def _groups() -> frozenset[str]:
    return frozenset(key.rpartition(".")[0] for key in ALIASES if key.count(".") > 1)


def is_group(path: str) -> bool:
    """Tell whether other spellings of keys lie below this dotted path, as in ``dataset.preprocessing``."""
    return path in _groups()


def _first_field(section: str) -> str:
    return next(info.name for info in all_fields().values() if info.section == section)


class ConfigContainer:
    """The config tree of one run.

    Sections are attributes (``config.model.num_layers``); ``get`` and ``set`` take dotted paths. Assigning anything
    but a known section raises ``ConfigError``.
    """

    model: ModelConfig
    train: TrainConfig
    validation: ValidationConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    mixed_precision: MixedPrecisionConfig
    dataset: DatasetConfig
    tokenizer: TokenizerConfig
    rng: RNGConfig
    run: RunConfig
    checkpoint: CheckpointConfig
    peft: PEFTConfig
    logger: LoggerConfig
    ddp: DDPConfig
    dist: DistributedConfig
    comm_overlap: CommOverlapConfig
    rerun_state_machine: RerunStateMachineConfig
    profiling: ProfilingConfig
    straggler: StragglerConfig
    inprocess_restart: InProcessRestartConfig
    ft: FaultToleranceConfig
    fault_injector: FaultInjectorConfig

    def __init__(self) -> None:
        for cls in SECTIONS:
            object.__setattr__(self, cls.section_name, cls())

    def __setattr__(self, name: str, value: Any) -> None:
        kinds = {cls.section_name: cls for cls in SECTIONS}
        if name not in kinds:
            raise ConfigError(f"unknown section {name}.{nearest(name, kinds)}")
        if not isinstance(value, kinds[name]):
            raise ConfigError(f"{name}: expected {kinds[name].__name__}, got {value!r}")
        object.__setattr__(self, name, value)

    def section(self, name: str) -> Section:
        """Return a section by name."""
        return getattr(self, name)

    def get(self, path: str) -> Any:
        """Return the value at a dotted path."""
        section, _, name = canonical(path).partition(".")
        return getattr(self.section(section), name)

    def origin(self, path: str) -> Origin:
        """Return where the value at a dotted path came from."""
        section, _, name = canonical(path).partition(".")
        return self.section(section).origin(name)

    def set(self, path: str, value: Any, origin: Origin) -> None:
        """Set the value at a dotted path.

        Raises:
            ConfigError: unknown key or a value of another type.
        """
        section, _, name = canonical(path).partition(".")
        self.section(section).assign(name, value, origin)

    def items(self) -> Iterator[tuple[FieldInfo, Any, Origin]]:
        """Yield every field of the tree with its value and origin."""
        for cls in SECTIONS:
            yield from self.section(cls.section_name).items()

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return the tree as nested plain values."""
        return {cls.section_name: self.section(cls.section_name).as_dict() for cls in SECTIONS}

    def copy(self) -> "ConfigContainer":
        """Return an independent copy, origins included."""
        return copy.deepcopy(self)
