"""The families: which tensors of Hugging Face are which parameters, and which keys of config.json which settings."""

from typing import Any

from lockstep.config.model import ModelConfig
from lockstep.errors import UserError, nearest
from lockstep.hf.families.deepseek_v2 import DEEPSEEK_V2
from lockstep.hf.families.family import Aspect, Family, Key, Said
from lockstep.hf.families.gpt2 import GPT2
from lockstep.hf.families.llama import LLAMA
from lockstep.hf.families.mixtral import MIXTRAL
from lockstep.hf.families.qwen3 import QWEN3, QWEN3_MOE

__all__ = [
    "DEEPSEEK_V2",
    "FAMILIES",
    "GPT2",
    "LLAMA",
    "MIXTRAL",
    "QWEN3",
    "QWEN3_MOE",
    "Aspect",
    "Family",
    "Key",
    "Said",
    "family_for",
    "family_of",
]

FAMILIES = {family.name: family for family in (GPT2, LLAMA, QWEN3, MIXTRAL, QWEN3_MOE, DEEPSEEK_V2)}


def family_of(hf: dict[str, Any]) -> Family:
    """Return the family of a config.json.

    Raises:
        UserError: it is not supported.
    """
    name = hf.get("model_type")
    family = FAMILIES.get(str(name))
    if family is None:
        raise UserError(
            f"models of type {name} cannot be converted yet; supported: {', '.join(FAMILIES)}."
            f"{nearest(str(name), FAMILIES)}"
        )
    named = hf.get("architectures") or [family.architecture]
    if family.architecture not in named:
        raise UserError(f"{', '.join(named)} is not supported; of {name} it is {family.architecture} alone")
    return family


def family_for(model: ModelConfig) -> Family:
    """Return the family that a model without a config.json belongs to.

    Raises:
        UserError: none has its kind of attention without experts.
    """
    if model.normalization == "LayerNorm":
        return GPT2
    if model.multi_latent_attention:
        if model.num_moe_experts is None:
            raise UserError("no family has multi-latent attention without experts, so this model cannot be exported")
        return DEEPSEEK_V2
    if model.num_moe_experts is not None:
        return QWEN3_MOE if model.qk_layernorm else MIXTRAL
    return QWEN3 if model.qk_layernorm else LLAMA
