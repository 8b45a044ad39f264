"""Checkpoints of adapters as conversion sees them, and the weights that they are for."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lockstep.config import ConfigContainer, Origin
from lockstep.errors import UserError
from lockstep.hf.checkpoint import Checkpoint
from lockstep.hf.convert import open_weights
from lockstep.hf.folder import Folder, carried_files
from lockstep.hf.rules import listed
from lockstep.hf.settings import to_config
from lockstep.models import GPTModel
from lockstep.models.init import Fingerprint, in_order
from lockstep.peft.adapter import Adapter
from lockstep.peft.apply import adapter_names, is_adapter, whole_adapters
from lockstep.record.schema import decode_number
from lockstep.training import checkpoint_files as files
from lockstep.training.checkpoint_args import is_hf_folder
from lockstep.training.checkpoint_index import Stored, read_index, read_whole
from lockstep.training.checkpoint_state import MODEL


@dataclass(frozen=True)
class AdapterCheckpoint:
    """A checkpoint of adapters, its files verified: settings of model and adapters, and its tensors by parameter."""

    folder: Path
    config: ConfigContainer
    tensors: dict[str, Stored]
    base: dict[str, Any]

    @classmethod
    def open(cls, path: Path, step: int | None = None) -> "AdapterCheckpoint":
        """Open the checkpoint in a folder of checkpoints, or in its own folder.

        Raises:
            UserError: there is none, it is damaged, or it holds something else than adapters.
        """
        folder = files.find_one(path, step)
        manifest = files.read_manifest(folder)
        files.verify(folder, manifest)
        if files.ADAPTERS not in manifest:
            raise UserError(f"{folder} holds whole weights and no adapters; give a checkpoint of adapters")
        config, sections = ConfigContainer(), files.read_config(folder)
        for section in (config.model, config.peft, config.tokenizer):
            for name, value in sections.get(section.section_name, {}).items():
                if name in section.fields():
                    section.assign(name, decode_number(value), Origin("checkpoint", folder.name))
        index = read_index(folder)
        tensors = {name.removeprefix(MODEL): stored for name, stored in index.items() if name.startswith(MODEL)}
        opened = cls(folder, config, tensors, manifest[files.ADAPTERS])
        wanted = set(adapter_names(opened.layout))
        if wanted != set(tensors):
            raise UserError(
                f"the tensors of {folder} are not those of its settings: {listed(sorted(wanted ^ set(tensors)))}"
            )
        return opened

    @cached_property
    def layout(self) -> GPTModel:
        """The whole model with its adapters on the meta device."""
        return whole_adapters(self.config.model, self.config.peft)

    def adapters(self) -> Iterator[tuple[str, Adapter]]:
        """Yield the adapters, on the meta device, by full name of their linear."""
        for name, module in self.layout.named_modules():
            if isinstance(module, Adapter):
                yield name.removesuffix(".adapter"), module

    def whole(self, name: str) -> Tensor:
        """Read a parameter."""
        return read_whole(self.folder, self.tensors[name])

    def pairs(self, path: str, adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
        """Read both matrices of each name of the adapter of a linear."""
        return {
            name: (
                self.whole(f"{path}.adapter.{name}.linear_in.weight"),
                self.whole(f"{path}.adapter.{name}.linear_out.weight"),
            )
            for name in adapter.pairs()
        }

    def magnitudes(self, path: str, adapter: Adapter) -> dict[str, Tensor]:
        """Read the lengths of rows of each name, where it has them."""
        return {
            name: self.whole(f"{path}.adapter.{name}.magnitude")
            for name, pair in adapter.pairs().items()
            if pair.magnitude is not None
        }


def linear_of(weight: str) -> tuple[str, str]:
    """Return the linear that a weight belongs to, and where an adapter is that it shares with other experts."""
    path = weight.removesuffix(".weight")
    return path, re.sub(r"\.local_experts\.\d+", "", path)


@dataclass(frozen=True)
class BaseWeights:
    """Whole weights that adapters are for: a Hugging Face folder or a checkpoint."""

    path: Path
    config: ConfigContainer
    dtype: Callable[[str], str]
    whole: Callable[[str], Tensor]
    carried: list[Path]
    reference: Path | None

    @classmethod
    def open(cls, path: Path, config: ConfigContainer | None = None) -> "BaseWeights":
        """Open weights for the model of a configuration, or for the model that they say they are of.

        Raises:
            UserError: there are none, or they are of another model.
        """
        if not path.is_dir():
            raise UserError(f"the weights {path} that the adapters are for are gone; name where they are with --base")
        if is_hf_folder(path):
            folder = Folder(path)
            config = config or to_config(folder.config)
            weights = open_weights(folder, config.model)
            return cls(path, config, weights.dtype, weights.whole, carried_files(path), path)
        checkpoint = Checkpoint.open(path)
        if config is None:
            config = ConfigContainer()
            config.model = checkpoint.model
        carried = [] if checkpoint.carried is None else sorted(checkpoint.carried.iterdir())
        return cls(path, config, lambda n: checkpoint.tensors[n].dtype, checkpoint.whole, carried, checkpoint.carried)

    def fingerprint(self) -> str:
        """Return the fingerprint of the weights as they are stored."""
        prints = Fingerprint()
        for name, _ in in_order(whole_adapters(self.config.model, ConfigContainer().peft)):
            assert not is_adapter(name), "without a scheme there are none"
            prints.add(name, self.whole(name))
        return str(prints.result()["all"]["sha256"])


def base_of(adapters: AdapterCheckpoint, base: Path | None) -> BaseWeights:
    """Open the weights of adapters: those that they name, or ``base``.

    Raises:
        UserError: they are gone, or others than the adapters were trained for.
    """
    weights = BaseWeights.open(base or Path(adapters.base["base"]), adapters.config)
    found = weights.fingerprint()
    if found != adapters.base["fingerprint"]:
        raise UserError(
            f"the adapters of {adapters.folder} are for the weights of {adapters.base['base']} (fingerprint "
            f"{adapters.base['fingerprint']}), and {weights.path} has others (fingerprint {found}); name those "
            "with --base"
        )
    return weights
