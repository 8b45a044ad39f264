"""A model to generate with, from a checkpoint of Lockstep or a Hugging Face folder."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.config import Origin
from lockstep.config.data import TokenizerConfig
from lockstep.config.model import ModelConfig
from lockstep.data.tokenizers import HuggingFaceTokenizer, NullTokenizer, Tokenizer, build_tokenizer
from lockstep.errors import UserError
from lockstep.hf.checkpoint import Checkpoint
from lockstep.hf.convert import open_weights
from lockstep.hf.folder import CONFIG, Folder, read_json
from lockstep.hf.logits import build
from lockstep.hf.settings import to_config
from lockstep.models import GPTModel
from lockstep.peft.files import AdapterCheckpoint, base_of
from lockstep.peft.merge import merged
from lockstep.record.schema import decode_number
from lockstep.training import checkpoint_files as files
from lockstep.training.checkpoint_args import is_hf_folder

GENERATION = "generation_config.json"
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Loaded:
    """A model and what belongs to it.

    Attributes:
        model: of one process, in evaluation mode.
        tokenizer: its own, or the one that was asked for.
        stop: tokens that end a text.
    """

    model: GPTModel
    tokenizer: Tokenizer
    stop: frozenset[int]


@dataclass(frozen=True)
class _Stored:
    """A model on disk: settings, parameters by name, and the folder with files of a Hugging Face model, if any."""

    settings: ModelConfig
    whole: Callable[[str], Tensor]
    dtype: str
    folder: Path | None
    saved: dict[str, dict[str, Any]]


def load(
    path: Path,
    *,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    tokenizer: Path | None = None,
    token_ids: bool = False,
    base: Path | None = None,
) -> Loaded:
    """Return the model of a checkpoint in whatever layout it was saved, or of a Hugging Face folder.

    Adapters are added to the weights that they are for, as merging them does.
    Experts take every token that is sent to them: neither capacity nor forced balance belongs to a finished model.

    Args:
        path: folder of checkpoints, one checkpoint, or a Hugging Face folder.
        step: iteration instead of the newest.
        dtype: to compute in; when None float32 on a CPU, and as stored elsewhere.
        device: the CPU when None.
        tokenizer: folder or file in the place of the model's own tokenizer.
        token_ids: texts are numbers, and there is no other tokenizer.
        base: where the weights of adapters are now; where the adapters say when None.

    Raises:
        UserError: there is no model, it is damaged, or it has no tokenizer.
    """
    device = device or torch.device("cpu")
    stored = _open(path, step, base)
    words = _tokenizer(stored, path, tokenizer, token_ids)
    settings = stored.settings
    settings.moe_expert_capacity_factor, settings.moe_router_force_load_balancing = None, False
    kind = dtype or (torch.float32 if device.type == "cpu" else getattr(torch, stored.dtype))
    model = build(settings, lambda name: stored.whole(name).to(device), kind)
    for name, buffer in model.named_buffers():
        buffer.copy_(stored.whole(name))
    return Loaded(model, words, _stop_tokens([stored.folder, _folder_of(stored.saved), tokenizer], words))


def _open(path: Path, step: int | None, base: Path | None) -> _Stored:
    if not is_hf_folder(path) and files.ADAPTERS in files.read_manifest(files.find_one(path, step)):
        return _from_adapters(path, step, base)
    if base is not None:
        raise UserError(f"--base {base}: {path} holds whole weights and no adapters; drop it")
    return _from_hf(path, step) if is_hf_folder(path) else _from_checkpoint(path, step)


def _from_adapters(path: Path, step: int | None, base: Path | None) -> _Stored:
    adapters = AdapterCheckpoint.open(path, step)
    weights = base_of(adapters, base)
    saved = files.read_config(adapters.folder)
    return _Stored(
        adapters.config.model, partial(merged, adapters, weights), weights.dtype(_EMBEDDING), weights.reference, saved
    )


def _from_hf(path: Path, step: int | None) -> _Stored:
    if step is not None:
        raise UserError(f"--ckpt-step {step}: {path} is a Hugging Face folder, which has no iterations; drop it")
    folder = Folder(path)
    settings = to_config(folder.config).model
    weights = open_weights(folder, settings)
    return _Stored(settings, weights.whole, weights.dtype(next(iter(weights.mapping))), path, {})


def _from_checkpoint(path: Path, step: int | None) -> _Stored:
    checkpoint = Checkpoint.open(path, step)
    kind = next(iter(checkpoint.tensors.values())).dtype
    saved = files.read_config(checkpoint.folder)
    return _Stored(checkpoint.model, checkpoint.whole, kind, checkpoint.carried, saved)


def _tokenizer(stored: _Stored, path: Path, given: Path | None, token_ids: bool) -> Tokenizer:
    if token_ids:
        assert stored.settings.vocab_size is not None, "a saved model has a vocabulary"
        return NullTokenizer(stored.settings.vocab_size)
    if given is not None:
        return HuggingFaceTokenizer(str(given))
    settings = _tokenizer_settings(stored, path)
    if settings.tokenizer_type is not None:
        return build_tokenizer(settings)
    raise UserError(
        f"{path} has no tokenizer; give one with --tokenizer FOLDER, or prompts as numbers with --token-ids"
    )


def _tokenizer_settings(stored: _Stored, path: Path) -> TokenizerConfig:
    """Return the settings that a run saved, with the files beside the weights where its own are gone.

    What a checkpoint says never lets the code of a tokenizer run.
    """
    settings = TokenizerConfig()
    for name, value in stored.saved.get("tokenizer", {}).items():
        if name in settings.fields() and name != "trust_remote_code":
            settings.assign(name, decode_number(value), Origin("checkpoint", path.name))
    if stored.folder is not None and any(stored.folder.glob("tokenizer*")):
        named = settings.tokenizer_model
        if settings.tokenizer_type is None or (named is not None and not Path(named).exists()):
            settings.tokenizer_type = settings.tokenizer_type or "HuggingFaceTokenizer"
            settings.tokenizer_model = str(stored.folder)
    return settings


def _folder_of(saved: dict[str, dict[str, Any]]) -> Path | None:
    """Return where the tokenizer of a saved run came from."""
    named = saved.get("tokenizer", {}).get("tokenizer_model")
    return None if named is None else Path(named)


def _stop_tokens(folders: list[Path | None], tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end a text: those of generation_config.json or config.json, or the tokenizer's own."""
    if isinstance(tokenizer, NullTokenizer):
        folders = folders[:1]
    for folder in folders:
        for name in (GENERATION, CONFIG):
            if folder is not None and (folder / name).is_file():
                found = read_json(folder / name).get("eos_token_id")
                if found is not None:
                    return frozenset(found if isinstance(found, list) else [found])
    return frozenset() if tokenizer.eod_id is None else frozenset([tokenizer.eod_id])
