"""The same conversions as Python calls, in the manner of Megatron Bridge's AutoBridge."""

from dataclasses import dataclass
from pathlib import Path

import torch

from lockstep.config import ConfigContainer
from lockstep.errors import UserError
from lockstep.hf import SHARD_BYTES
from lockstep.hf.convert import export_model, import_model, open_weights, target_of
from lockstep.hf.folder import Folder, split_all, write_folder
from lockstep.hf.logits import build
from lockstep.hf.rules import mapped
from lockstep.hf.settings import to_config, vocabulary
from lockstep.models import GPTModel


@dataclass(frozen=True)
class AutoBridge:
    """A Hugging Face folder as a source of settings and weights, and as the pattern of what is written back."""

    folder: Folder

    @classmethod
    def from_hf_pretrained(cls, path: str | Path) -> "AutoBridge":
        """Open a folder with config.json and safetensors files.

        Raises:
            UserError: there is none, or its family is not supported.
        """
        bridge = cls(Folder(Path(path)))
        bridge.to_config()
        return bridge

    def to_config(self, make_vocab_size_divisible_by: int = 1) -> ConfigContainer:
        """Return a tree with the settings of the model; every value says which key of config.json it comes from."""
        return to_config(self.folder.config, make_vocab_size_divisible_by)

    def load(self, dtype: torch.dtype = torch.float32) -> GPTModel:
        """Return the model with its weights, for one process.

        Raises:
            UserError: the tensors are not those of config.json.
        """
        model = self.to_config().model
        return build(model, open_weights(self.folder, model).whole, dtype)

    def import_checkpoint(self, target: str | Path, make_vocab_size_divisible_by: int = 1) -> Path:
        """Write the weights as a checkpoint, from which a run starts; return the checkpoint's folder."""
        return import_model(self.folder.path, Path(target), divisor=make_vocab_size_divisible_by)

    def save_hf(
        self,
        model: GPTModel | str | Path,
        target: str | Path,
        *,
        dtype: torch.dtype | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> list[str]:
        """Write a model of one process, or the checkpoint in a folder, as a Hugging Face folder after this one.

        Raises:
            UserError: it is a model of another family, or the folder is there already.
        """
        if not isinstance(model, GPTModel):
            kind = None if dtype is None else str(dtype).removeprefix("torch.")
            return export_model(
                Path(model), Path(target), reference=self.folder.path, dtype=kind, shard_bytes=shard_bytes
            )
        wanted = target_of(model.config, self.folder.path)
        mapping = mapped(wanted.family.rules, model.config, vocabulary(wanted.config))
        parameters = dict(model.named_parameters())
        if set(parameters) != set(mapping):
            raise UserError("a part of a model cannot be written; save a checkpoint and give its folder")
        chosen = dtype or model.dtype
        sizes = {
            name: chosen.itemsize * torch.Size(shape).numel()
            for entry in mapping.values()
            for name, shape in entry.theirs.items()
        }
        tensors = split_all(mapping, lambda name: parameters[name].detach().cpu(), chosen)
        key = "dtype" if "dtype" in wanted.config else "torch_dtype"
        config = wanted.config | {key: str(chosen).removeprefix("torch.")}
        return write_folder(Path(target), config, sizes, tensors, shard_bytes, wanted.carried)
