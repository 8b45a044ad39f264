"""Settings of a model and the config.json of Hugging Face, both ways; what either cannot say is an error."""

from typing import Any

from lockstep.config import ConfigContainer, Origin
from lockstep.config.derive import derive
from lockstep.config.experts import expert_layers
from lockstep.config.model import ModelConfig
from lockstep.errors import ConfigError, UserError
from lockstep.hf.families import Family, Key, family_of
from lockstep.hf.families.gpt2 import spelled_activation
from lockstep.training.checkpoint_args import names_weights

_TRAINING = {
    "activation_func",
    "add_position_embedding",
    "apply_query_key_layer_scaling",
    "attention_backend",
    "attention_softmax_in_fp32",
    "bias_activation_fusion",
    "calculate_per_token_loss",
    "disable_bf16_reduced_precision_matmul",
    "moe_aux_loss_coeff",
    "moe_expert_capacity_factor",
    "moe_layer_freq",
    "moe_router_bias_update_rate",
    "moe_router_dtype",
    "moe_router_load_balancing_type",
    "moe_token_drop_policy",
    "moe_z_loss_coeff",
    "seq_length",
    "vocab_size",
}
"""Settings that belong to training and rounding, or that `computed` spells in another way."""


def to_config(hf: dict[str, Any], divisor: int = 1) -> ConfigContainer:
    """Return the tree with the model that a config.json describes, its vocabulary padded to a multiple of ``divisor``.

    Each value says which key it comes from. The sample length is that of the longest positions.

    Raises:
        UserError: config.json lacks a key, or asks for something that is not supported; names key and value.
    """
    family, config = family_of(hf), ConfigContainer()
    for name, accepted in family.only.items():
        if hf.get(name, accepted[0]) not in accepted:
            raise UserError(f"config.json: {name} = {hf[name]} is not supported (supported: {accepted[0]})")

    def take(ours: str, value: Any, detail: str) -> None:
        try:
            config.set(f"model.{ours}", value, Origin("hf", detail))
        except ConfigError as error:
            raise UserError(f"config.json: {detail}: {error}") from None

    for ours, value in family.fixed.items():
        take(ours, value, family.name)
    for key in family.keys:
        value = _stated(hf, key)
        if value is not None:
            take(key.ours, value, key.theirs)
    take("share_embeddings_and_output_weights", hf.get("tie_word_embeddings", family.tied), "tie_word_embeddings")
    for aspect in family.aspects:
        for ours, value, detail in aspect.read(hf):
            take(ours, value, detail)
    take("vocab_size", -(-vocabulary(hf) // divisor) * divisor, "vocab_size")
    take("make_vocab_size_divisible_by", divisor, "vocab_size")
    take("seq_length", config.model.max_position_embeddings, _of("max_position_embeddings", family))
    _derive_model(config)
    return config


def _derive_model(config: ConfigContainer) -> None:
    """Fill in what of the model follows from the rest, and leave the other sections to the run."""
    derived = config.copy()
    derive(derived)
    for info, value, origin in derived.model.items():
        if origin.kind == "derived":
            config.set(info.path, value, origin)


def stated(config: ConfigContainer) -> dict[str, dict[str, Any]]:
    """Return what the tree of a config.json says of model, tokenizer and adapters, by section, fit for JSON.

    Left out are settings that only training chooses, the sample length first of all, and a tokenizer that is not there.
    """
    model = {
        info.name: value
        for info, value, origin in config.model.items()
        if info.name != "seq_length" and (origin.kind != "default" or info.name not in _TRAINING)
    }
    tokenizer = config.tokenizer.as_dict() if config.tokenizer.tokenizer_type is not None else {}
    peft = {} if config.peft.scheme is None else {"peft": config.peft.as_dict()}
    return {"model": model, "tokenizer": tokenizer, **peft}


def vocabulary(hf: dict[str, Any]) -> int:
    """Return the rows that the embedding has in a Hugging Face model."""
    size = hf.get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise UserError(f"config.json: vocab_size = {size}: a number above 0 has to be there")
    return size


def _of(ours: str, family: Family) -> str:
    return next(key.theirs for key in family.keys if key.ours == ours)


def _stated(hf: dict[str, Any], key: Key) -> Any:
    value = hf.get(key.theirs)
    if value is None and key.like is not None:
        value = hf.get(key.like)
    if value is None:
        value = key.default
    # GPT-2's inner width and the width of a head follow from others where they are not stated.
    if value is None and key.ours not in ("ffn_hidden_size", "kv_channels"):
        raise UserError(f"config.json does not state {key.theirs}; take the config.json that the model came with")
    return value


def to_hf(model: ModelConfig, family: Family, size: int) -> dict[str, Any]:
    """Return the config.json of a resolved model with a vocabulary of ``size``.

    Raises:
        UserError: the family computes something else; names the settings.
    """
    hf: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": size,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        **{key.theirs: getattr(model, key.ours) for key in family.keys},
        **{key: accepted[0] for key, accepted in family.only.items() if accepted[0] is not None},
    }
    for aspect in family.aspects:
        hf |= aspect.write(model)
    check_same(model, hf, f"{family.architecture} cannot say all of this model")
    return hf


def computed(model: ModelConfig) -> dict[str, Any]:
    """Return the settings that say what a resolved model computes, without those of training and rounding alone."""
    result = {
        info.name: value for info, value, _ in model.items() if names_weights(info) and info.name not in _TRAINING
    }
    result["activation"] = spelled_activation(model)
    sparse = list(expert_layers(model))
    result["layers with experts"] = [i for i, has in enumerate(sparse) if has]
    result["moe_router_topk_scaling_factor"] = model.moe_router_topk_scaling_factor or 1.0
    unused = set()
    if model.position_embedding_type != "rope":
        unused |= {name for name in result if name.startswith(("rotary_", "rope_"))}
    else:
        unused.add("max_position_embeddings")
    if not model.rope_scaling:
        unused.add("rope_scaling_factor")
    if model.multi_latent_attention:
        unused.add("kv_channels")
        if model.rotary_scaling_factor == 1:
            unused |= {"mscale", "mscale_all_dim"}
    if model.moe_router_num_groups == model.moe_router_group_topk:
        unused |= {"moe_router_num_groups", "moe_router_group_topk"}
    if not any(sparse):
        unused |= {name for name in result if name.startswith("moe_")}
    elif all(sparse):
        unused.add("ffn_hidden_size")
    return {name: value for name, value in result.items() if name not in unused}


def check_same(model: ModelConfig, hf: dict[str, Any], problem: str) -> None:
    """Check that a config.json describes the same computation as the settings of a model.

    Raises:
        UserError: it does not; begins with ``problem`` and names every setting that differs.
    """
    found = differences(model, hf)
    if found:
        raise UserError(f"{problem}: {'; '.join(found)}")


def differences(model: ModelConfig, hf: dict[str, Any]) -> list[str]:
    """Return in what the computation of a model and of a config.json differ, one sentence a setting."""
    ours, theirs = computed(model), computed(to_config(hf).model)
    return [
        f"{name} is {ours.get(name)}, in config.json {theirs.get(name)}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
