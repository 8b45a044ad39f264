"""What the declaration of a family is made of."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from lockstep.config.model import ModelConfig
from lockstep.hf.rules import Rule

Said = tuple[str, Any, str]
"""A setting of the model, its value, and the key of config.json that says so."""


@dataclass(frozen=True)
class Key:
    """A key of config.json and the model setting of the same meaning.

    Without the key ``default`` holds, or the value of the key ``like``; with neither the key has to be there.
    """

    theirs: str
    ours: str
    default: Any = None
    like: str | None = None


class Aspect(Protocol):
    """Keys of config.json that say together what several settings say."""

    def read(self, hf: dict[str, Any]) -> list[Said]:
        """Return the settings that a config.json states.

        Raises:
            UserError: it asks for something that is not supported.
        """
        ...

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the keys for the settings of a resolved model."""
        ...


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: ``model_type`` of its config.json.
        architecture: the class in transformers.
        rules: the weights.
        keys: settings that config.json states one by one; of two for one key the later is written.
        fixed: settings that the family implies.
        only: keys of config.json that change what is computed, with the values that are supported.
        aspects: settings that take more than a key each.
        tied: whether embeddings are tied where config.json does not say.
        prefix: what names of weights may lack in old files.
        buffers: patterns of names of tensors in old files that are no weights.
        blocks: modules of a layer in transformers, by the name of the same one in Lockstep.
    """

    name: str
    architecture: str
    rules: tuple[Rule, ...]
    keys: tuple[Key, ...]
    fixed: dict[str, Any]
    only: dict[str, tuple[Any, ...]]
    aspects: tuple[Aspect, ...]
    tied: bool = False
    prefix: str = "model."
    buffers: tuple[str, ...] = field(default=(r".*\.rotary_emb\.inv_freq",))
    blocks: dict[str, str] = field(
        default_factory=lambda: {
            "self_attention": "model.layers.{layer}.self_attn",
            "mlp": "model.layers.{layer}.mlp",
        }
    )
