"""Checkpoints of Lockstep as conversion sees them: the whole model in whatever layout it was saved, and new ones."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.config import ConfigContainer, Origin
from lockstep.config.model import ModelConfig
from lockstep.errors import ConfigError, UserError
from lockstep.hf.rules import Mapped, listed
from lockstep.hf.settings import stated
from lockstep.parallel.placement import Placed, place
from lockstep.record.schema import decode_number
from lockstep.training import checkpoint_files as files
from lockstep.training.checkpoint_index import Stored, read_index, read_whole
from lockstep.training.checkpoint_peers import Peers
from lockstep.training.checkpoint_save import Snapshot, write_checkpoint
from lockstep.training.checkpoint_state import MODEL

CARRIED = "hf"
"""Folder in a checkpoint with the files of the Hugging Face model it came from."""

_ONE_PROCESS = {
    "processes": 1,
    "data_parallel": 1,
    "context_parallel": 1,
    "tensor_parallel": 1,
    "pipeline_parallel": 1,
    "sequence_parallel": False,
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, its files verified: the settings of its model, and its tensors by name of the parameter."""

    folder: Path
    model: ModelConfig
    tensors: dict[str, Stored]

    @classmethod
    def open(cls, path: Path, step: int | None = None) -> "Checkpoint":
        """Open the checkpoint in a folder of checkpoints, or in its own folder.

        Raises:
            UserError: there is none, or it is damaged.
        """
        folder = files.find_one(path, step)
        manifest = files.read_manifest(folder)
        files.verify(folder, manifest)
        if files.ADAPTERS in manifest:
            raise UserError(
                f"{folder} holds adapters only, for the weights of {manifest[files.ADAPTERS]['base']}; merge them "
                "first (lockstep adapter merge)"
            )
        model = ConfigContainer()
        for name, value in files.read_config(folder).get("model", {}).items():
            if name in model.model.fields():
                model.set(f"model.{name}", decode_number(value), Origin("checkpoint", folder.name))
        index = read_index(folder)
        tensors = {name.removeprefix(MODEL): stored for name, stored in index.items() if name.startswith(MODEL)}
        return cls(folder, model.model, tensors)

    @property
    def carried(self) -> Path | None:
        """The files of the Hugging Face model it came from, where it still has them."""
        folder = self.folder / CARRIED
        return folder if folder.is_dir() else None

    def check(self, mapping: Mapping[str, Mapped]) -> None:
        """Check that it holds exactly the parameters of a mapping, in their shapes.

        Raises:
            UserError: it does not; names them.
        """
        problems = []
        missing = [name for name in mapping if name not in self.tensors]
        surplus = [name for name in self.tensors if name not in mapping]
        if missing:
            problems.append(f"missing: {listed(missing)}")
        if surplus:
            problems.append(f"without a place in Hugging Face's model: {listed(surplus)}")
        wrong = [
            f"{name} is {list(self.tensors[name].shape)} instead of {list(entry.shape)}"
            for name, entry in mapping.items()
            if name in self.tensors and self.tensors[name].shape != entry.shape
        ]
        if wrong:
            problems.append(f"of another shape: {listed(wrong)}")
        if problems:
            raise UserError(f"the tensors of {self.folder} are not those of its model; {'; '.join(problems)}")

    def whole(self, name: str) -> Tensor:
        """Read a parameter."""
        return read_whole(self.folder, self.tensors[name])


@dataclass(frozen=True)
class _Later(Placed):
    """A whole tensor that is read when it is written; a stand-in on the meta device tells shape and dtype."""

    read: Callable[[], Tensor]

    def view(self, offsets: tuple[int, ...]) -> Tensor:
        """Read it."""
        return self.read()


def write_weights(
    root: Path,
    config: ConfigContainer,
    tensors: Iterable[tuple[str, tuple[int, ...], str, Callable[[], Tensor]]],
    carried: Iterable[Path],
    origin: dict[str, Any],
) -> Path:
    """Write weights as a checkpoint of iteration 0, given name, shape, dtype and reader of each; return its folder.

    Tensors are read file by file of the checkpoint.

    Raises:
        UserError: the folder holds checkpoints already, or cannot be written.
    """
    if files.holds_checkpoints(root):
        raise UserError(f"{root} already holds checkpoints; give another folder")
    placed: dict[str, Placed] = {}
    for name, shape, dtype, read in tensors:
        standin = place(torch.empty(shape, dtype=getattr(torch, dtype), device="meta"), shape, None, 1, 0)
        placed[MODEL + name] = _Later(standin.tensor, standin.shape, standin.pieces, read)
    facts = {
        "iteration": 0,
        "progress": {"consumed_samples": 0, "stepped_samples": 0, "evaluated_samples": {}},
        "schedules": {},
        "optimizer": None,
        "loss_scaler": None,
        "micro_batch_size": None,
        "streams": {},
        "layout": _ONE_PROCESS,
    }
    attached = {f"{CARRIED}/{path.name}": path for path in carried}
    origins = {info.path: str(where) for info, _, where in config.items() if where.kind != "default"}
    try:
        write_checkpoint(
            root,
            Snapshot(0, placed, {}, facts, attached),
            {"config": stated(config), "origins": origins},
            origin,
            Peers(),
        )
    except OSError as error:
        raise UserError(f"cannot write {root}: {error.strerror or error}") from None
    return files.iteration_dir(root, 0)


def model_problems(config: ConfigContainer) -> None:
    """Check that Lockstep can train the model of a configuration whose other settings are not known yet.

    Raises:
        UserError: it cannot.
    """
    from lockstep.config import resolve

    trial = config.copy()
    for path, value in {
        "train.micro_batch_size": 1,
        "train.train_iters": 1,
        "validation.skip_train": True,
        "tokenizer.tokenizer_type": "NullTokenizer",
        "tokenizer.vocab_size": 1,
    }.items():
        trial.set(path, value, Origin("derived", "trial"))
    try:
        resolve(trial)
    except ConfigError as error:
        raise UserError(f"this model cannot be trained: {'; '.join(error.problems)}") from None
