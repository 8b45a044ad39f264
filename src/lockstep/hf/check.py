"""Proof that a Hugging Face folder and a checkpoint are one model: every bit of the weights, and the logits."""

from pathlib import Path

import torch
from torch import Tensor

from lockstep.hf.checkpoint import Checkpoint
from lockstep.hf.convert import open_weights
from lockstep.hf.folder import Folder, Weights
from lockstep.hf.logits import Finding, compare_logits
from lockstep.hf.rules import listed
from lockstep.hf.settings import differences


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
        findings += compare_logits(weights, checkpoint, tokens)
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
