"""Proof that a Hugging Face folder and a checkpoint are one model: every bit of the weights, and the logits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.config.model import ModelConfig
from lockstep.errors import UserError
from lockstep.hf.checkpoint import Checkpoint
from lockstep.hf.convert import open_weights
from lockstep.hf.folder import Folder, Weights
from lockstep.hf.rules import listed
from lockstep.hf.settings import differences, vocabulary
from lockstep.models import GPTModel
from lockstep.models.init import fill

TOLERANCE = 1e-5
_SEED = 1234


@dataclass(frozen=True)
class Finding:
    """One line of the table: what was compared, what came out, and whether it is as it should be."""

    what: str
    result: str
    same: bool


def check_model(
    source: Path, against: Path, *, step: int | None = None, tokens: int = 64, logits: bool = True
) -> list[Finding]:
    """Compare a Hugging Face folder with a checkpoint: settings, weights both ways, logits of random tokens.

    Raises:
        UserError: one of the two is damaged, or its tensors are not those of its configuration.
    """
    folder, checkpoint = Folder(source), Checkpoint.open(against, step)
    found = differences(checkpoint.model, folder.config)
    findings = [Finding("settings", "; ".join(found) or "the same computation", not found)]
    if found:
        return findings
    weights = open_weights(folder, checkpoint.model)
    checkpoint.check(weights.mapping)
    findings += [_weights(weights, checkpoint), _back(weights, checkpoint)]
    if logits:
        findings += _logits(folder, weights, checkpoint, tokens)
    return findings


def _weights(weights: Weights, checkpoint: Checkpoint) -> Finding:
    """Compare the parameters of the checkpoint with those that the folder gives."""
    differing = []
    for name in weights.mapping:
        kind, ours = checkpoint.tensors[name].dtype, weights.dtype(name)
        if kind != ours:
            differing.append(f"{name} ({kind} in the checkpoint, {ours} in the folder)")
        elif not same_bits(_real(weights, name, weights.whole(name)), _real(weights, name, checkpoint.whole(name))):
            differing.append(name)
    return _finding("folder -> checkpoint", len(weights.mapping), "parameters", differing)


def _real(weights: Weights, name: str, whole: Tensor) -> Tensor:
    """Return a parameter without rows of padding: training moves them, and no folder has them."""
    entry = weights.mapping[name]
    (first, *_), *_ = entry.theirs.values()
    return whole[:first] if len(entry.theirs) == 1 and first < entry.shape[0] else whole


def _back(weights: Weights, checkpoint: Checkpoint) -> Finding:
    """Compare the tensors of the folder with those that the checkpoint gives."""
    differing, number = [], 0
    for name, entry in weights.mapping.items():
        for theirs, value in entry.split(checkpoint.whole(name)).items():
            number += 1
            if not same_bits(value, weights.folder.tensor(weights.spelled[theirs])):
                differing.append(theirs)
    return _finding("checkpoint -> folder", number, "tensors", differing)


def _finding(what: str, number: int, things: str, differing: list[str]) -> Finding:
    if differing:
        return Finding(what, f"{len(differing)} of {number} {things} differ: {listed(differing)}", False)
    return Finding(what, f"{number} {things} bit for bit", True)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors have the same dtype, shape and bits; NaN equals itself, and 0.0 is not -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _logits(folder: Folder, weights: Weights, checkpoint: Checkpoint, tokens: int) -> Iterator[Finding]:
    """Compare the logits of both models in float32."""
    model = checkpoint.model
    assert model.max_position_embeddings is not None, "a saved model has positions"
    length = min(tokens, model.max_position_embeddings)
    size = vocabulary(folder.config)
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(0, size, (2, length), generator=generator)
    with torch.no_grad():
        theirs = _transformers_model(folder.path)(ids).logits
        ours = build(model, checkpoint.whole)(ids, torch.arange(length).expand(2, length))[..., :size]
    relative = ((ours - theirs).norm() / theirs.norm()).item()
    advice = "" if relative <= TOLERANCE else ": the weights are the same, so the models compute something else"
    yield Finding(
        "logits in float32", f"relative difference {relative:.1e} (limit {TOLERANCE}){advice}", relative <= TOLERANCE
    )
    same = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    yield Finding("next token", f"the same for {same} of {ids.numel()} positions", same == ids.numel())


def _transformers_model(path: Path) -> Any:
    import transformers

    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        ).eval()
    except Exception as error:  # the library raises what its parts raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"transformers cannot load {path}: {reason}") from None


def build(model: ModelConfig, whole: Callable[[str], Tensor], dtype: torch.dtype = torch.float32) -> GPTModel:
    """Return a model of one process with weights that ``whole`` gives by name."""
    result = GPTModel(model, dtype=dtype, device=torch.device("meta"))
    names = [name for name, _ in result.named_parameters()]
    fill(result, ((name, whole(name).to(dtype)) for name in names))
    return result.eval()
