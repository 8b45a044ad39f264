"""The config tree that both doors fill."""

from lockstep.config.container import ALIASES, SECTIONS, ConfigContainer, all_fields, canonical
from lockstep.config.data import DatasetConfig, TokenizerConfig
from lockstep.config.fields import FieldInfo, Spec
from lockstep.config.model import ModelConfig
from lockstep.config.resolve import resolve
from lockstep.config.section import Origin, Ref, Section
from lockstep.config.training import OptimizerConfig, SchedulerConfig, TrainConfig, ValidationConfig

__all__ = [
    "ALIASES",
    "SECTIONS",
    "ConfigContainer",
    "DatasetConfig",
    "FieldInfo",
    "ModelConfig",
    "OptimizerConfig",
    "Origin",
    "Ref",
    "SchedulerConfig",
    "Section",
    "Spec",
    "TokenizerConfig",
    "TrainConfig",
    "ValidationConfig",
    "all_fields",
    "canonical",
    "resolve",
]
