"""Megatron Bridge as a side of a translation: its keys by version, and what its recipes do where nothing is said."""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from lockstep.config import all_fields
from lockstep.config.experts import layer_pattern
from lockstep.config.finetuning import BRIDGE_KEYS, FORMER_BRIDGE_KEYS
from lockstep.errors import ConfigError, nearest
from lockstep.words import is_number

NAME = "Megatron Bridge"
VERSIONS = ("0.2", "0.3", "0.4", "0.5", "0.6")
NEWEST = VERSIONS[-1]

_KEYS: dict[str, tuple[str, ...]] = {
    "model.seq_length": ("dataset.seq_length", "model.seq_length"),
    "mixed_precision.bf16": ("mixed_precision",),
    "mixed_precision.fp16": ("mixed_precision",),
    "comm_overlap.tp_comm_overlap": ("model.tp_comm_overlap",),
    "comm_overlap.overlap_moe_expert_parallel_comm": ("model.overlap_moe_expert_parallel_comm",),
    "comm_overlap.delay_wgrad_compute": ("model.delay_wgrad_compute",),
    "comm_overlap.defer_embedding_wgrad_compute": ("model.defer_embedding_wgrad_compute",),
    "comm_overlap.wgrad_deferral_limit": ("model.wgrad_deferral_limit",),
    "rerun_state_machine.check_for_nan_in_loss": (
        "rerun_state_machine.check_for_nan_in_loss",
        "ddp.check_for_nan_in_grad",
    ),
    "rng.te_rng_tracker": ("rng.te_rng_tracker", "model.use_te_rng_tracker"),
    "dist.use_megatron_fsdp": ("dist.use_megatron_fsdp", "ddp.use_megatron_fsdp"),
    "ddp.use_distributed_optimizer": ("ddp.use_distributed_optimizer", "optimizer.use_distributed_optimizer"),
    "validation.full_validation": ("validation.full_validation", "dataset.full_validation"),
    "validation.multiple_validation_sets": (
        "validation.multiple_validation_sets",
        "dataset.multiple_validation_sets",
    ),
    "dataset.train_data_path": ("dataset.blend_per_split",),
    "dataset.valid_data_path": ("dataset.blend_per_split",),
    "dataset.test_data_path": ("dataset.blend_per_split",),
    "dataset.create_attention_mask": ("dataset.skip_getting_attention_mask_from_dataset",),
    **{path: (key,) for key, path in BRIDGE_KEYS.items() if path != "dataset.random_seed"},
}
"""Where a path of the tree has another name in Bridge, or several."""

_NONE = {
    "model.add_position_embedding",
    "model.max_position_embeddings",
    "model.init_method_xavier_uniform",
    "model.transformer_impl",
    "model.use_mcore_models",
    "rerun_state_machine.result_rejected_tracker_filename",
    "checkpoint.override_ckpt_iteration",
    "checkpoint.ckpt_drop_redundant_extra_state",
    "dist.use_layer_wise_param_layout",
    "dist.fake_process_group",
    "ddp.create_all_gather_group",
    "ddp.enable_full_sharding_in_hsdp",
    "ddp.torch_fsdp2_reshard_after_forward",
    "dataset.data_args_path",
    "dataset.per_split_data_args_path",
    "dataset.sft",
    "dataset.sft_format",
    "dataset.messages_column",
    "dataset.packing_algorithm",
    "mixed_precision.te_precision_config_file",
    "ft.ft_num_warmup_iters",
    "run.dir",
    "run.device",
    "run.compile",
    "run.cuda_graphs",
    "run.gradient_sync",
}
"""Paths of the tree that have no key in Bridge; fault_injector is a section that it has not."""

VALUES_WITHOUT_KEY: tuple[tuple[str, Any], ...] = (
    ("model.activation_func", "openai_gelu"),
    ("mixed_precision.fp8_recipe", "rowwise"),
)
"""Paths with values of theirs that Bridge does not take."""

FORMER: tuple[tuple[str, str, str], ...] = (
    ("dataset.seq_length", "dataset.sequence_length", "0.3"),
    ("validation.eval_iters", "train.eval_iters", "0.4"),
    ("validation.eval_interval", "train.eval_interval", "0.4"),
    ("validation.skip_train", "train.skip_train", "0.4"),
    ("dist.lazy_mpu_init", "dist.lazy_init", "0.4"),
    ("tokenizer.special_tokens", "tokenizer.tiktoken_special_tokens", "0.5"),
    *(
        (new, old, "0.6")
        for new, path in BRIDGE_KEYS.items()
        for old, same in FORMER_BRIDGE_KEYS.items()
        if same == path and new not in FORMER_BRIDGE_KEYS
    ),
)
"""Present name, former name, and the version since which the present one is there."""

_UNSET_SECTIONS = ("comm_overlap", "ft", "straggler", "inprocess_restart")
"""Sections that a recipe of Bridge leaves out, so that an override has nothing to set."""


@cache
def _data() -> dict[str, Any]:
    text = resources.files("lockstep.translation").joinpath("bridge.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def recipe_names() -> list[str]:
    """Return the recipes whose values are known, short names."""
    return list(_data()["recipes"])


def _recipe(name: str) -> dict[str, Any]:
    for short, recipe in _data()["recipes"].items():
        if name in (short, recipe["name"]):
            return dict(recipe)
    raise ConfigError(f"the values of Bridge's recipe {name} are not known here.{nearest(name, recipe_names())}")


def recipe_model(name: str) -> str:
    """Return the class of a recipe's model."""
    return str(_recipe(name)["model"])


def long_name(name: str, version: str) -> str:
    """Return a recipe's name as that version of Bridge has it."""
    recipe = _recipe(name)
    short = next(s for s, r in _data()["recipes"].items() if r["name"] == recipe["name"])
    return str(recipe["name"]) if version >= "0.6" else short


def recipe_values(name: str) -> dict[str, Any]:
    """Return what Bridge does with a recipe where nothing is overridden, by path of the tree.

    Raises:
        ConfigError: a recipe whose values are not known.
    """
    recipe = _recipe(name)
    values = {path: info.default for path, info in all_fields().items()}
    values.update(_data()["defaults"])
    values.update(_data()["models"][recipe["model"]])
    values.update(recipe["values"])
    return values


def keys(path: str, version: str = NEWEST) -> tuple[str, ...]:
    """Return the keys that set a path of the tree; empty where Bridge has none."""
    if path in _NONE or path.startswith("fault_injector."):
        return ()
    return tuple(_of_version(key, version) for key in _KEYS.get(path, (path,)))


def _of_version(key: str, version: str) -> str:
    return next((old for new, old, since in FORMER if key == new and version < since), key)


def paths_of(key: str) -> list[str]:
    """Return the paths of the tree that one of Bridge's keys sets, present or former; empty for an unknown key."""
    current = next((new for new, old, _ in FORMER if key == old), key)
    return [path for path in all_fields() if current in keys(path)]


def assignments(values: Mapping[str, Any], version: str = NEWEST) -> dict[str, Any]:
    """Return Bridge's keys with the values that stand for paths of the tree; paths without a key are left out."""
    result: dict[str, Any] = {}
    for path, value in values.items():
        if path in ("mixed_precision.bf16", "mixed_precision.fp16"):
            result.update(_precision(values))
        elif path.endswith("_data_path") and path.startswith("dataset."):
            result["dataset.blend_per_split"] = _blend_per_split(values)
        elif path == "dataset.create_attention_mask":
            result[keys(path)[0]] = not value
        else:
            result.update(dict.fromkeys(keys(path, version), _value(path, value)))
    return result


def _precision(values: Mapping[str, Any]) -> dict[str, Any]:
    if values.get("mixed_precision.bf16"):
        return {"mixed_precision": "bf16_mixed"}
    if values.get("mixed_precision.fp16"):
        return {"mixed_precision": "fp16_mixed"}
    return {"mixed_precision": None, "optimizer.bf16": False}


def _blend_per_split(values: Mapping[str, Any]) -> list[Any]:
    splits = []
    for name in ("train", "valid", "test"):
        words = values.get(f"dataset.{name}_data_path")
        splits.append(_blend([str(word) for word in words]) if words else None)
    return splits


def _blend(words: list[str]) -> list[Any]:
    weighted = len(words) > 1 and len(words) % 2 == 0 and all(is_number(word) for word in words[::2])
    return [words[1::2], [float(word) for word in words[::2]]] if weighted else [words, None]


PATTERNS = (
    "model.moe_layer_freq",
    "model.linear_attention_freq",
    "model.no_rope_freq",
    "model.window_attn_skip_freq",
)
"""Paths that Megatron-LM also takes as an expression over lists of layers, and Bridge as the list."""


def layer_list(text: str) -> list[int] | None:
    """Return the list that an expression such as ``([0]*3+[1]*2)`` stands for; None when it is no such expression."""
    try:
        value = layer_pattern(text)
    except ValueError:
        return None
    return value if isinstance(value, list) else None


_SINGLE = ("model.cp_comm_type", "model.moe_router_load_balancing_type", "model.moe_aux_loss_coeff")


def _value(path: str, value: Any) -> Any:
    if path == "dataset.data_path" and isinstance(value, list):
        return " ".join(value)
    if path in PATTERNS and isinstance(value, str):
        return layer_list(value) or value
    if path in _SINGLE and isinstance(value, list) and len(value) == 1:
        return value[0]
    return value


NOT_OF_FINE_TUNING = (
    "dataset.data_path",
    "dataset.train_data_path",
    "dataset.valid_data_path",
    "dataset.test_data_path",
    "dataset.split",
)
"""Paths whose keys Bridge's data for fine-tuning does not have: it has dataset.dataset_root and dataset.hf_dataset."""


def needs_recipe(values: Mapping[str, Any], recipe: str) -> list[str]:
    """Return, one sentence each, why overrides alone cannot carry some of these values in Bridge."""
    found = []
    if any(path.startswith("model.") and _is_hybrid(path) for path in values):
        found.append("model.hybrid_layer_pattern and its like need a recipe whose model is a HybridModelProvider")
    if values.get("model.multi_latent_attention") and recipe_model(recipe) != "MLAModelProvider":
        found.append("model.multi_latent_attention needs a recipe whose model is an MLAModelProvider")
    if values.get("dataset.sft"):
        found.append("dataset.sft needs a recipe whose data is a GPTSFTDatasetConfig, such as llama32_1b_sft_config")
    details = [p for p in values if p.startswith("mixed_precision.") and not p.endswith((".bf16", ".fp16"))]
    if details:
        found.append(f"mixed_precision names a preset; a recipe with a MixedPrecisionConfig has to set {details[0]}")
    if values.get("ddp.grad_reduce_in_fp32") is False and values.get("mixed_precision.bf16", True):
        found.append("the preset bf16_mixed sets grad_reduce_in_fp32; a recipe has to change it after the preset")
    found += [
        f"a recipe has to create the section {section}, which Bridge leaves out"
        for section in _UNSET_SECTIONS
        if any(keys(path)[:1] and keys(path)[0].startswith(f"{section}.") for path in values)
    ]
    return found


def _is_hybrid(path: str) -> bool:
    return path.startswith(("model.hybrid_", "model.mamba_", "model.gdp_"))
