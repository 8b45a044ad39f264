"""Conversion between folders of Hugging Face models and checkpoints of Lockstep, one tensor at a time."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lockstep.config import ConfigContainer, Origin
from lockstep.config.model import ModelConfig
from lockstep.errors import UserError
from lockstep.hf import SHARD_BYTES
from lockstep.hf.checkpoint import CARRIED, Checkpoint, model_problems, write_weights
from lockstep.hf.families import Family, family_for, family_of
from lockstep.hf.folder import CONFIG, Folder, Weights, carried_files, read_json, split_all, write_folder
from lockstep.hf.rules import mapped
from lockstep.hf.settings import check_same, differences, to_config, to_hf, vocabulary
from lockstep.training import checkpoint_files as files
from lockstep.training.checkpoint_args import is_hf_folder


def open_weights(folder: Folder, model: ModelConfig) -> Weights:
    """Return the weights of a Hugging Face folder as parameters of a model, matched strictly.

    Raises:
        UserError: they are not the parameters of that model.
    """
    family, theirs = family_of(folder.config), vocabulary(folder.config)
    if model.vocab_size is not None and model.vocab_size < theirs:
        raise UserError(
            f"model.vocab_size = {model.vocab_size} is below the vocabulary of {theirs} of {folder.path}; raise it to "
            "at least that"
        )
    return Weights.match(folder, mapped(family.rules, model, theirs), family)


def import_model(source: Path, target: Path, *, divisor: int = 1) -> Path:
    """Write the weights of a Hugging Face folder as a checkpoint into ``target``; return the checkpoint's folder.

    The vocabulary is padded to a multiple of ``divisor`` with rows of zeros.

    Raises:
        UserError: the model is not supported, or its files are not what its config.json tells; nothing is written.
    """
    folder = Folder(source)
    config = to_config(folder.config, divisor)
    model_problems(config)
    weights = open_weights(folder, config.model)
    carried = carried_files(source)
    set_tokenizer(config, files.iteration_dir(target, 0) / CARRIED, carried)
    tensors = (
        (name, entry.shape, weights.dtype(name), partial(weights.whole, name))
        for name, entry in weights.mapping.items()
    )
    return write_weights(target, config, tensors, carried, {"imported_from": str(source.absolute())})


def set_tokenizer(config: ConfigContainer, folder: Path, carried: list[Path]) -> None:
    """Name the tokenizer that goes with the weights, if there is one."""
    if any(path.name.startswith("tokenizer") for path in carried):
        config.set("tokenizer.tokenizer_type", "HuggingFaceTokenizer", Origin("hf", "tokenizer"))
        config.set("tokenizer.tokenizer_model", str(folder.absolute()), Origin("hf", "tokenizer"))


@dataclass(frozen=True)
class Target:
    """What a Hugging Face model is written as: family, config.json, the files that go with it."""

    family: Family
    config: dict[str, Any]
    carried: list[Path]


def target_of(model: ModelConfig, reference: Path | None, size: int | None = None) -> Target:
    """Return what a model is written as, after the ``reference`` (folder with config.json) of the model it came from.

    ``size`` is the vocabulary without padding, where there is no reference.

    Raises:
        UserError: no family computes what this model does, or the reference is another model.
    """
    rows = model.vocab_size
    assert rows is not None, "a saved model has a vocabulary"
    if reference is None:
        family = family_for(model)
        if size is not None and not 0 < size <= rows:
            raise UserError(f"--vocab-size {size}: the embedding has {rows} rows")
        return Target(family, to_hf(model, family, size or rows), [])
    theirs = read_json(reference / CONFIG)
    if size is not None and size != vocabulary(theirs):
        raise UserError(f"--vocab-size {size}, but {reference / CONFIG} has vocab_size {vocabulary(theirs)}; drop it")
    if vocabulary(theirs) > rows:
        raise UserError(f"{reference / CONFIG} has vocab_size {vocabulary(theirs)}, the embedding {rows} rows only")
    family = family_of(theirs)
    if differences(model, theirs):
        # The settings were changed since: they lead, and what config.json says besides stays.
        changed = to_hf(model, family, vocabulary(theirs))
        kept = {key: value for key, value in theirs.items() if key not in ("rope_parameters", "rope_scaling")}
        theirs = kept | changed
        check_same(model, theirs, f"{reference / CONFIG} says more than this model can take")
    return Target(family, theirs, [path for path in carried_files(reference) if path.name != CONFIG])


def export_model(
    source: Path,
    target: Path,
    *,
    step: int | None = None,
    reference: Path | None = None,
    size: int | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write a checkpoint of any layout as a Hugging Face folder; return the names of its files.

    Args:
        source: folder of checkpoints, or one checkpoint.
        target: folder that does not exist yet.
        step: iteration instead of the newest.
        reference: Hugging Face folder whose config.json, tokenizer and generation files go along; those that were
            imported with the weights when None.
        size: vocabulary without padding, where no reference tells.
        dtype: of the written weights; kept when None.
        shard_bytes: size of a safetensors file at most.

    Raises:
        UserError: the checkpoint or the reference does not fit; nothing is written.
    """
    if is_hf_folder(source):
        raise UserError(f"{source} is a Hugging Face folder already; give checkpoints of Lockstep")
    checkpoint = Checkpoint.open(source, step)
    wanted = target_of(checkpoint.model, reference or checkpoint.carried, size)
    mapping = mapped(wanted.family.rules, checkpoint.model, vocabulary(wanted.config))
    checkpoint.check(mapping)
    kinds = {name: dtype or checkpoint.tensors[name].dtype for name in mapping}
    sizes = {
        theirs: getattr(torch, kinds[name]).itemsize * torch.Size(shape).numel()
        for name, entry in mapping.items()
        for theirs, shape in entry.theirs.items()
    }
    tensors = split_all(mapping, checkpoint.whole, getattr(torch, dtype) if dtype else None)
    key = "dtype" if "dtype" in wanted.config else "torch_dtype"
    config = wanted.config | {key: next(iter(kinds.values()))}
    return write_folder(target, config, sizes, tensors, shard_bytes, wanted.carried)
