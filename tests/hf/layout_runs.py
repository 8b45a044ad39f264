"""Runs on several processes that start from a Hugging Face folder, as jobs of `tests.parallel.spawn.in_turn`."""

import importlib
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.models import GPTModel
from lockstep.models.decoder import Span
from lockstep.parallel import Mesh
from lockstep.training.setup import Parts
from tests.training.checkpoint_runs import train

_SIZES = [
    f"model.{name}"
    for name in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")
]


def starting_from(source: Path) -> dict[str, Any]:
    """Return the changes for a step that leaves the weights as they are, and saves them."""
    return {
        **dict.fromkeys(_SIZES),
        "model.seq_length": 64,
        "tokenizer.vocab_size": 70,
        "checkpoint.pretrained_checkpoint": str(source),
        "checkpoint.use_checkpoint_args": True,
        "checkpoint.save_interval": 1,
        "train.train_iters": 1,
        "optimizer.lr": 0.0,
        "optimizer.weight_decay": 0.0,
        "mixed_precision.bf16": False,
        "validation.eval_iters": 0,
    }


def tokens() -> Tensor:
    """Return what all models are asked about, [b, s]."""
    return torch.randint(0, 70, (2, 40), generator=torch.Generator().manual_seed(11))


def logits_then_train(changes: dict[str, Any], run_dir: Path) -> Any:
    """Train, and return the logits of the model before, as an array; None on a process without an output layer."""
    module = importlib.import_module("lockstep.training.run")
    restore, seen = module.restore, []

    def restored(source: Any, config: Any, mesh: Mesh, *rest: Any) -> Parts:
        parts: Parts = restore(source, config, mesh, *rest)
        parts.model.eval()
        with torch.no_grad():
            seen.append(_logits(parts.model, mesh))
        return parts

    with mock.patch.object(module, "restore", restored):
        assert train(changes, run_dir) == "finished"
    return None if seen[0] is None else seen[0].numpy()


def _logits(model: GPTModel, mesh: Mesh) -> Tensor | None:
    """Run the model, or its part in a pipeline of two."""
    ids = tokens()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    if mesh.pp.size == 1:
        logits: Tensor = model(ids, positions)
        return logits
    numbers = [int(name) for name in model.decoder.layers]
    span = Span(range(min(numbers), max(numbers) + 1), first=mesh.pp.rank == 0, last=mesh.pp.rank == 1)
    hidden = torch.empty(*ids.shape, model.config.hidden_size or 0)
    if span.first:
        hidden = model.forward_span(span, ids, positions)
    dist.broadcast(hidden, src=0)
    return model.forward_span(span, hidden, positions) if span.last else None
