"""Adding adapters to the weights they are for, in float32 and rounded once."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lockstep.hf.checkpoint import CARRIED, write_weights
from lockstep.hf.convert import SHARD_BYTES, set_tokenizer, target_of
from lockstep.hf.folder import split_all, write_folder
from lockstep.hf.rules import mapped
from lockstep.hf.settings import vocabulary
from lockstep.models.init import in_order
from lockstep.models.ops import widened
from lockstep.peft.adapter import Adapter, delta
from lockstep.peft.apply import whole_adapters
from lockstep.peft.files import AdapterCheckpoint, BaseWeights, base_of, linear_of
from lockstep.training import checkpoint_files as files


def merge(source: Path, target: Path, *, base: Path | None = None, step: int | None = None, hf: bool = False) -> Path:
    """Write the weights with their adapters added, as a checkpoint or, with ``hf``, as a Hugging Face folder.

    Args:
        source: folder of checkpoints of adapters, or one checkpoint.
        target: folder that is written.
        base: where the weights are now; where the adapters say when None.
        step: iteration instead of the newest.
        hf: what is written.

    Raises:
        UserError: the adapters are not for these weights, or the folder holds something already.
    """
    adapters = AdapterCheckpoint.open(source, step)
    weights = base_of(adapters, base)
    model = adapters.config.model
    if hf:
        wanted = target_of(model, weights.reference)
        mapping = mapped(wanted.family.rules, model, vocabulary(wanted.config))
        sizes = {
            theirs: getattr(torch, weights.dtype(name)).itemsize * torch.Size(shape).numel()
            for name, entry in mapping.items()
            for theirs, shape in entry.theirs.items()
        }
        tensors = split_all(mapping, partial(merged, adapters, weights), None)
        write_folder(target, wanted.config, sizes, tensors, SHARD_BYTES, wanted.carried)
        return target
    config = weights.config.copy()
    config.peft.assign("scheme", None, config.peft.origin("scheme"))
    set_tokenizer(config, files.iteration_dir(target, 0) / CARRIED, weights.carried)
    whole = whole_adapters(model, config.peft)
    entries = (
        (name, tuple(p.shape), weights.dtype(name), partial(merged, adapters, weights, name))
        for name, p in in_order(whole)
    )
    return write_weights(target, config, entries, weights.carried, {"merged_from": str(adapters.folder.absolute())})


def merged(adapters: AdapterCheckpoint, weights: BaseWeights, name: str) -> Tensor:
    """Return a weight with what its adapter, if it has one, adds to it, in the dtype of the weight."""
    weight = weights.whole(name)
    if not name.endswith(".weight"):
        return weight
    found = dict(adapters.adapters())
    for path in linear_of(name):
        if path in found:
            return with_adapter(weight, adapters, path, found[path])
    return weight


def with_adapter(weight: Tensor, adapters: AdapterCheckpoint, path: str, adapter: Adapter) -> Tensor:
    """Return a weight [o, i] with an adapter."""
    total = widened(weight) + delta(adapters.pairs(path, adapter), adapter.rows, adapter.settings.scale)
    magnitudes = adapters.magnitudes(path, adapter)
    if magnitudes:
        lengths = adapter.rows.split(total.norm(dim=1))
        scales = {name: widened(value) / lengths[name] for name, value in magnitudes.items()}
        total = total * adapter.rows.joined(scales, dim=0, missing=1.0)[:, None]
    return total.to(weight.dtype)
