"""Settings that a run takes from the checkpoint it loads: ``--use-checkpoint-args``."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from lockstep.config.container import ConfigContainer
from lockstep.config.fields import FieldInfo
from lockstep.config.model_parallel import ModelParallel
from lockstep.config.output import CheckpointConfig
from lockstep.config.section import Origin, OriginKind
from lockstep.config.validate import spelled
from lockstep.errors import ConfigError, UserError
from lockstep.record.schema import decode_number, encode
from lockstep.training import checkpoint_files as files

_DROPOUT = ("hidden_dropout", "attention_dropout")
_FREE = {
    *_DROPOUT,
    "init_method_std",
    "embedding_init_method_std",
    "use_cpu_initialization",
    "deterministic_mode",
    "make_vocab_size_divisible_by",
    *(field.name for field in fields(ModelParallel)),
}
"""Settings of the model that do not say what the weights are weights of."""

_LAYOUT = {
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "model.expert_model_parallel_size",
}

# As in Megatron-LM, sizes that the user gives are the user's, and all else is the checkpoint's.
_GIVEN_COUNTS = {
    "model.num_layers",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.seq_length",
    "model.num_attention_heads",
    "model.kv_channels",
    "model.max_position_embeddings",
    "model.vocab_size",
}
# How conversations are written belongs to the data of a run.
_GIVEN_TEMPLATES = {"tokenizer.chat_template", "tokenizer.tokenizer_prompt_format"}
_GIVEN: tuple[OriginKind, ...] = ("command line", "file", "python")
_REPLACES = "replaces"
_HUGGING_FACE = "HuggingFaceTokenizer"


def names_weights(info: FieldInfo) -> bool:
    """Tell whether a setting says what the weights are weights of: a resumed run cannot change it."""
    return info.section == "model" and info.spec.effect == "run" and info.name not in _FREE


def take_settings(config: ConfigContainer) -> None:
    """Set, in place, what a configuration asks to take from the checkpoint that it loads; the origin says so.

    Raises:
        ConfigError: there is no such checkpoint, or its settings are not known here.
    """
    settings = config.checkpoint
    if not settings.use_checkpoint_args or (settings.load is None and settings.pretrained_checkpoint is None):
        return
    try:
        folder, saved = _saved_settings(settings)
    except UserError as error:
        raise ConfigError(str(error)) from None
    of_adapters = saved.get("peft", {}).get("scheme") is not None
    for info, ours, origin in list(config.items()):
        taken = of_adapters if info.section == "peft" else _is_taken(info, settings)
        if not taken or info.name not in saved.get(info.section, {}):
            continue
        theirs = saved[info.section][info.name]
        given = origin.kind in _GIVEN and ours is not None
        # Adapters that are asked for otherwise are an error, which the loading of them words.
        if theirs == encode(ours) or (
            given and (info.path in _GIVEN_COUNTS | _GIVEN_TEMPLATES or info.section == "peft")
        ):
            continue
        detail = f"{folder.name}, {_REPLACES} {spelled(info, origin)} = {ours}" if given else folder.name
        config.set(info.path, decode_number(theirs), Origin("checkpoint", detail))


def lacks_tokenizer(config: ConfigContainer) -> bool:
    """Tell whether a run needs the tokenizer of the model it starts from: of Hugging Face, and none is named."""
    return (
        config.tokenizer.tokenizer_type == _HUGGING_FACE
        and config.tokenizer.tokenizer_model is None
        and config.checkpoint.pretrained_checkpoint is not None
    )


def take_tokenizer(config: ConfigContainer) -> None:
    """Name, in place, the tokenizer that a pretrained model has, where there is one; the origin says so.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    try:
        folder, saved = _saved_settings(config.checkpoint)
    except UserError as error:
        raise ConfigError(str(error)) from None
    theirs = saved.get("tokenizer", {})
    if theirs.get("tokenizer_type") == _HUGGING_FACE:
        config.set("tokenizer.tokenizer_model", theirs.get("tokenizer_model"), Origin("checkpoint", folder.name))


def named_source(settings: CheckpointConfig) -> tuple[Path, bool]:
    """Return the folder whose state or weights a run begins with, and whether it takes its weights as pretrained ones.

    As in Megatron-LM, that is the pretrained checkpoint until the run has saved one of its own.
    """
    load, pretrained = settings.load, settings.pretrained_checkpoint
    if pretrained is not None and (load is None or not files.holds_checkpoints(Path(load))):
        return Path(pretrained), True
    assert load is not None, "a checkpoint is named"
    return Path(load), False


def is_hf_folder(folder: Path) -> bool:
    """Tell whether a folder is a Hugging Face model rather than checkpoints of Lockstep."""
    path = folder / files.CONFIG
    return path.is_file() and "model_type" in files.read_json(path)


def _saved_settings(settings: CheckpointConfig) -> tuple[Path, dict[str, dict[str, Any]]]:
    root, pretrained = named_source(settings)
    if pretrained and is_hf_folder(root):
        # Imported here only: few runs need the conversion.
        from lockstep.hf.source import hf_settings

        return root, hf_settings(root)
    folder = files.find(root, None if pretrained else settings.ckpt_step)
    files.read_manifest(folder)
    return folder, files.read_config(folder)


def _is_taken(info: FieldInfo, settings: CheckpointConfig) -> bool:
    if info.section == "tokenizer":
        return settings.use_tokenizer_model_from_checkpoint_args and info.spec.effect == "run"
    if info.path in _LAYOUT:
        return settings.use_mp_args_from_checkpoint_args
    return names_weights(info) or (info.section == "model" and info.name in _DROPOUT)


def taken_lines(config: ConfigContainer) -> list[str]:
    """Return lines on the settings that were taken from a checkpoint, those in place of given ones each on its own."""
    taken: list[tuple[str, Any, str]] = [
        (info.path, value, origin.detail) for info, value, origin in config.items() if origin.kind == "checkpoint"
    ]
    quiet = [f"{path} = {value}" for path, value, detail in taken if _REPLACES not in detail]
    lines = [f"settings of the checkpoint: {', '.join(quiet)}"] if quiet else []
    loud = ((path, value, detail.partition(f"{_REPLACES} ")[2]) for path, value, detail in taken if _REPLACES in detail)
    return lines + [f"{path} = {value} of the checkpoint {_REPLACES} {given}" for path, value, given in loud]
