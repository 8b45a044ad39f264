"""Runs that train adapters: their frozen weights come from a pretrained checkpoint, and only adapters are saved."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.config import ConfigContainer
from lockstep.errors import UserError
from lockstep.models.init import Fingerprint
from lockstep.models.ops import widened
from lockstep.parallel import Mesh
from lockstep.parallel.apply import part_of
from lockstep.parallel.fsdp import is_sharded, keeper
from lockstep.parallel.placement import Placement
from lockstep.peft.adapter import Adapter, delta
from lockstep.peft.apply import initial_value, is_adapter, is_magnitude, weight_of, whole_adapters
from lockstep.record.schema import encode
from lockstep.training import checkpoint_files as files
from lockstep.training.checkpoint_state import MODEL
from lockstep.training.setup import Parts

# What the numbers of an adapter mean.
_MEANING = ("scheme", "dim", "alpha", "share_expert_adapters")


def check_kind(config: ConfigContainer, folder: Path, manifest: dict[str, Any], pretrained: bool) -> None:
    """Check that a checkpoint holds what the run takes from it: whole weights, or adapters.

    Raises:
        UserError: it is of the other kind.
    """
    facts = manifest.get(files.ADAPTERS)
    if facts is not None and (pretrained or config.peft.scheme is None):
        raise UserError(
            f"{folder} holds adapters only, for the weights of {facts['base']}; add them to the weights first "
            "(lockstep adapter merge), or continue them with --load, --pretrained-checkpoint and --peft-scheme"
        )
    if facts is None and not pretrained and config.peft.scheme is not None:
        raise UserError(
            f"{folder} holds whole weights and no adapters; to train adapters for them, name it with "
            "--pretrained-checkpoint"
        )


def check_adapters(config: ConfigContainer, folder: Path, saved: dict[str, dict[str, Any]]) -> None:
    """Check that the adapters of a checkpoint mean what those of this run do.

    Raises:
        UserError: they do not; names every setting that differs.
    """
    theirs = saved.get("peft", {})
    differing = [
        f"{info.path} is {ours}, in the checkpoint {theirs.get(info.name)}"
        for info, ours, _ in config.peft.items()
        if info.name in _MEANING and theirs.get(info.name) != encode(ours)
    ]
    if differing:
        raise UserError(
            f"the adapters of {folder} are others: {'; '.join(differing)}. Give this run the checkpoint's values"
        )


def check_base(facts: dict[str, Any], folder: Path, ours: dict[str, Any]) -> None:
    """Check that adapters were trained for the weights that this run has.

    Raises:
        UserError: they were not; names both.
    """
    if facts["fingerprint"] != ours["fingerprint"]:
        raise UserError(
            f"the adapters of {folder} are for the weights of {facts['base']} (fingerprint {facts['fingerprint']}), "
            f"and {ours['base']} has others (fingerprint {ours['fingerprint']}); name those with "
            "--pretrained-checkpoint"
        )


class BasePrints:
    """Fingerprints taken in one pass over the frozen weights: as they are stored, and of the whole model of a run."""

    def __init__(self, config: ConfigContainer, dtype: torch.dtype) -> None:
        self._config, self._dtype = config, dtype
        self._whole = whole_adapters(config.model, config.peft)
        self._stored, self.model = Fingerprint(), Fingerprint()
        self._lengths: dict[str, Tensor] = {}
        names = [name for name, _ in self._whole.named_parameters() if is_magnitude(name)]
        self._weights = {weight_of(name) for name in names}

    def add(self, name: str, value: Tensor) -> None:
        """Add a frozen weight."""
        self._stored.add(name, value)
        self.model.add(name, value.to(self._dtype))
        if name in self._weights:
            self._lengths |= initial_lengths(self._config, self._whole, name, value.to(self._dtype))

    def add_adapter(self, name: str, known: dict[str, Any]) -> None:
        """Add a parameter of an adapter, which has its initial value: what is ``known`` of it, or found here."""
        if is_magnitude(name):
            self.model.add(name, self._lengths.pop(name))
        else:
            self.model.take(name, known)

    @property
    def stored(self) -> str:
        """The fingerprint of the frozen weights, whatever this run computes in."""
        return str(self._stored.result()["all"]["sha256"])


@torch.no_grad()
def initial_lengths(config: ConfigContainer, whole: torch.nn.Module, name: str, weight: Tensor) -> dict[str, Tensor]:
    """Return by name the magnitudes for a whole weight: the lengths of its rows with the adapter's initial values."""
    path = name.removesuffix("weight") + "adapter"
    adapter = whole.get_submodule(path)
    assert isinstance(adapter, Adapter), "magnitudes are an adapter's"
    pairs = {}
    for part, pair in adapter.pairs().items():
        shapes = {leaf: getattr(pair, leaf).weight.shape for leaf in ("linear_in", "linear_out")}
        inner, out = (
            initial_value(f"{path}.{part}.{leaf}.weight", shape, config.peft, config.rng.seed).to(weight)
            for leaf, shape in shapes.items()
        )
        pairs[part] = inner, out
    total = widened(weight) + delta(pairs, adapter.rows, adapter.settings.scale)
    lengths = adapter.rows.split(total.norm(dim=1).to(weight.dtype))
    return {f"{path}.{part}.magnitude": lengths[part] for part in pairs}


@torch.no_grad()
def set_magnitudes(
    config: ConfigContainer, mesh: Mesh, parts: Parts, weight: Callable[[str], Tensor], dtype: torch.dtype
) -> None:
    """Set DoRA's magnitudes of this process to the lengths of the rows; ``weight`` reads a whole weight by name."""
    named = {name: p for name, p in parts.model.named_parameters() if is_magnitude(name)}
    if not named:
        return
    whole = whole_adapters(config.model, config.peft)
    for of in dict.fromkeys(map(weight_of, named)):
        for name, lengths in initial_lengths(config, whole, of, weight(of).to(dtype)).items():
            part = part_of(name, lengths, config.model, mesh)
            if is_sharded(parts.model):
                owner, _, leaf = name.rpartition(".")
                keeper(parts.model, mesh)(parts.model.get_submodule(owner), leaf, part)
            else:
                named[name].copy_(part)


def missing_places(names: Iterable[str], placement: Placement) -> list[str]:
    """Return the weights among tensors of a checkpoint that a run has no place for."""
    weights = (name.removeprefix(MODEL) for name in names if name.startswith(MODEL))
    return [name for name in weights if is_adapter(name) and name not in placement.shapes]
