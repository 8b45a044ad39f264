"""A Hugging Face folder as what a run starts from, without a conversion on disk before it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lockstep.config import ConfigContainer
from lockstep.hf.convert import open_weights, set_tokenizer
from lockstep.hf.folder import Folder, Weights, carried_files
from lockstep.hf.settings import check_same, stated, to_config
from lockstep.parallel.placement import Placed
from lockstep.training.checkpoint_index import Stored
from lockstep.training.checkpoint_load import Source
from lockstep.training.checkpoint_state import MODEL


@dataclass(frozen=True)
class HFSource(Source):
    """The weights of a Hugging Face folder, cut for each process as it reads them; matched once, with one model."""

    matched: list[Weights] = field(default_factory=list)

    def _weights(self, config: ConfigContainer) -> Weights:
        if not self.matched:
            self.matched.append(open_weights(Folder(self.folder), config.model))
        return self.matched[0]

    def index(self, config: ConfigContainer) -> dict[str, Stored]:
        """Return its tensors by name, as a run of the resolved ``config`` finds them."""
        weights = self._weights(config)
        return {MODEL + name: Stored(entry.shape, weights.dtype(name), ()) for name, entry in weights.mapping.items()}

    def read(self, tensors: dict[str, Placed], config: ConfigContainer) -> None:
        """Fill tensors of this process in place."""
        weights = self._weights(config)
        for name, placed in tensors.items():
            whole = weights.whole(name.removeprefix(MODEL))
            for piece in placed.pieces:
                box = piece.box
                there = tuple(slice(first, end) for first, end in zip(box.offsets, box.ends, strict=True))
                placed.view(box.offsets).copy_(whole[there])

    def whole(self, name: str, stored: Stored, config: ConfigContainer) -> Tensor:
        """Return a whole tensor."""
        return self._weights(config).whole(name.removeprefix(MODEL))


def open_hf_source(root: Path, config: ConfigContainer) -> HFSource:
    """Return the weights of a Hugging Face folder as what a run of the resolved ``config`` starts from.

    Raises:
        UserError: there is no such model, or it computes something else than the run's.
    """
    folder = Folder(root)
    check_same(
        config.model,
        folder.config,
        f"the model of {root} is another one. Give this run its values with --use-checkpoint-args; to change them on "
        "purpose, convert it first (lockstep convert import) and take its weights with --load and --finetune",
    )
    _ = folder.files
    return HFSource(root, root, {"iteration": 0, "files": {}}, {}, True)


def hf_settings(root: Path) -> dict[str, dict[str, Any]]:
    """Return the settings of model and tokenizer that a Hugging Face folder states, by section."""
    config = to_config(Folder(root).config)
    set_tokenizer(config, root, carried_files(root))
    return stated(config)
