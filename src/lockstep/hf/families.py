"""The families: which tensors of Hugging Face are which parameters, and which keys of config.json which settings."""

from dataclasses import dataclass, field
from typing import Any

from lockstep.errors import UserError, nearest
from lockstep.hf.rules import Gated, Grouped, GroupedInOne, Rule, Same, Transposed, Vocabulary


@dataclass(frozen=True)
class Key:
    """A key of config.json and the model setting of the same meaning.

    Without the key ``default`` holds, or the value of the key ``like``; with neither the key has to be there.
    """

    theirs: str
    ours: str
    default: Any = None
    like: str | None = None


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: ``model_type`` of its config.json.
        architecture: the class in transformers.
        rules: the weights.
        keys: settings that config.json states.
        fixed: settings that the family implies.
        only: keys of config.json that change what is computed, with the values that are supported.
        rotary: whether it has rotary positions.
        rotary_base: base of the rotary positions where config.json states none.
        tied: whether embeddings are tied where config.json does not say.
        prefix: what names of weights may lack in old files.
        buffers: patterns of names of tensors in old files that are no weights.
    """

    name: str
    architecture: str
    rules: tuple[Rule, ...]
    keys: tuple[Key, ...]
    fixed: dict[str, Any]
    only: dict[str, tuple[Any, ...]]
    rotary: bool = True
    rotary_base: float = 10000.0
    tied: bool = False
    prefix: str = "model."
    buffers: tuple[str, ...] = field(default=(r".*\.rotary_emb\.inv_freq",))


_OURS, _THEIRS = "decoder.layers.{layer}", "model.layers.{layer}"
_EXPERT = f"{_OURS}.mlp.experts.local_experts.{{expert}}"

_LLAMA_TRUNK = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary()),
    Rule(f"{_OURS}.input_layernorm.weight", (f"{_THEIRS}.input_layernorm.weight",), Same()),
    Rule(
        f"{_OURS}.self_attention.linear_qkv.weight",
        tuple(f"{_THEIRS}.self_attn.{part}_proj.weight" for part in ("q", "k", "v")),
        Grouped(),
    ),
    Rule(f"{_OURS}.self_attention.linear_proj.weight", (f"{_THEIRS}.self_attn.o_proj.weight",), Same()),
    Rule(f"{_OURS}.pre_mlp_layernorm.weight", (f"{_THEIRS}.post_attention_layernorm.weight",), Same()),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Same()),
    Rule("output_layer.weight", ("lm_head.weight",), Vocabulary()),
)
_QK_NORMS = tuple(
    Rule(f"{_OURS}.self_attention.{part}_layernorm.weight", (f"{_THEIRS}.self_attn.{part}_norm.weight",), Same())
    for part in ("q", "k")
)


def _gated_mlp(ours: str, theirs: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}.linear_fc1.weight", (f"{theirs}.{gate}.weight", f"{theirs}.{up}.weight"), Gated()),
        Rule(f"{ours}.linear_fc2.weight", (f"{theirs}.{down}.weight",), Same()),
    )


_DENSE_MLP = _gated_mlp(f"{_OURS}.mlp", f"{_THEIRS}.mlp", "gate_proj", "up_proj", "down_proj")

_COMMON_KEYS = (
    Key("num_hidden_layers", "num_layers"),
    Key("hidden_size", "hidden_size"),
    Key("num_attention_heads", "num_attention_heads"),
    Key("max_position_embeddings", "max_position_embeddings"),
    Key("initializer_range", "init_method_std", 0.02),
    Key("attention_dropout", "attention_dropout", 0.0),
)
_LLAMA_FIXED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "silu",
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "hidden_dropout": 0.0,
}
_QWEN_FIXED = {**_LLAMA_FIXED, "qk_layernorm": True}
_SILU: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "quantization_config": (None,)}
_EXPERTS_FIXED = {"moe_router_score_function": "softmax", "moe_router_load_balancing_type": ["aux_loss"]}

GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    rules=(
        Rule("embedding.word_embeddings.weight", ("transformer.wte.weight",), Vocabulary()),
        Rule("embedding.position_embeddings.weight", ("transformer.wpe.weight",), Same()),
        *(
            Rule(f"{_OURS}.{ours}.{kind}", (f"transformer.h.{{layer}}.{theirs}.{kind}",), Same())
            for ours, theirs in (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2"))
            for kind in ("weight", "bias")
        ),
        *(
            Rule(f"{_OURS}.{ours}.{kind}", (f"transformer.h.{{layer}}.{theirs}.{kind}",), form)
            for ours, theirs in (
                ("self_attention.linear_proj", "attn.c_proj"),
                ("mlp.linear_fc1", "mlp.c_fc"),
                ("mlp.linear_fc2", "mlp.c_proj"),
            )
            for kind, form in (("weight", Transposed()), ("bias", Same()))
        ),
        *(
            Rule(
                f"{_OURS}.self_attention.linear_qkv.{kind}",
                (f"transformer.h.{{layer}}.attn.c_attn.{kind}",),
                GroupedInOne(transposed=kind == "weight"),
            )
            for kind in ("weight", "bias")
        ),
        *(
            Rule(f"decoder.final_layernorm.{kind}", (f"transformer.ln_f.{kind}",), Same())
            for kind in ("weight", "bias")
        ),
        Rule("output_layer.weight", ("lm_head.weight",), Vocabulary()),
    ),
    keys=(
        Key("n_layer", "num_layers"),
        Key("n_embd", "hidden_size"),
        Key("n_head", "num_attention_heads"),
        Key("n_inner", "ffn_hidden_size"),
        Key("n_positions", "max_position_embeddings"),
        Key("layer_norm_epsilon", "layernorm_epsilon", 1e-5),
        Key("initializer_range", "init_method_std", 0.02),
        Key("attn_pdrop", "attention_dropout", 0.1),
        Key("resid_pdrop", "hidden_dropout", 0.1),
    ),
    fixed={
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "add_bias_linear": True,
        "position_embedding_type": "learned_absolute",
    },
    only={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    },
    rotary=False,
    tied=True,
    prefix="transformer.",
    buffers=(r".*\.attn\.bias", r".*\.attn\.masked_bias"),
)

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    rules=(*_LLAMA_TRUNK, *_DENSE_MLP),
    keys=(
        *_COMMON_KEYS,
        Key("intermediate_size", "ffn_hidden_size"),
        Key("num_key_value_heads", "num_query_groups", like="num_attention_heads"),
        Key("head_dim", "kv_channels"),
        Key("rms_norm_eps", "layernorm_epsilon", 1e-6),
    ),
    fixed=_LLAMA_FIXED,
    only={**_SILU, "attention_bias": (False,), "mlp_bias": (False,)},
)

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    rules=(*_LLAMA_TRUNK, *_QK_NORMS, *_DENSE_MLP),
    keys=(
        *_COMMON_KEYS,
        Key("intermediate_size", "ffn_hidden_size"),
        Key("num_key_value_heads", "num_query_groups"),
        Key("head_dim", "kv_channels", 128),
        Key("rms_norm_eps", "layernorm_epsilon", 1e-6),
    ),
    fixed=_QWEN_FIXED,
    only={**_SILU, "attention_bias": (False,), "use_sliding_window": (False,)},
)

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    rules=(
        *_LLAMA_TRUNK,
        Rule(f"{_OURS}.mlp.router.weight", (f"{_THEIRS}.block_sparse_moe.gate.weight",), Same()),
        *_gated_mlp(_EXPERT, f"{_THEIRS}.block_sparse_moe.experts.{{expert}}", "w1", "w3", "w2"),
    ),
    keys=(
        *_COMMON_KEYS,
        Key("intermediate_size", "moe_ffn_hidden_size"),
        Key("num_key_value_heads", "num_query_groups"),
        Key("head_dim", "kv_channels"),
        Key("rms_norm_eps", "layernorm_epsilon", 1e-5),
        Key("num_local_experts", "num_moe_experts"),
        Key("num_experts_per_tok", "moe_router_topk"),
    ),
    fixed={**_LLAMA_FIXED, **_EXPERTS_FIXED, "moe_router_pre_softmax": False},
    only={**_SILU, "sliding_window": (None,), "router_jitter_noise": (0.0,)},
    rotary_base=1e6,
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rules=(
        *_LLAMA_TRUNK,
        *_QK_NORMS,
        *_DENSE_MLP,
        Rule(f"{_OURS}.mlp.router.weight", (f"{_THEIRS}.mlp.gate.weight",), Same()),
        *_gated_mlp(_EXPERT, f"{_THEIRS}.mlp.experts.{{expert}}", "gate_proj", "up_proj", "down_proj"),
    ),
    keys=(
        *_COMMON_KEYS,
        Key("intermediate_size", "ffn_hidden_size"),
        Key("moe_intermediate_size", "moe_ffn_hidden_size"),
        Key("num_key_value_heads", "num_query_groups"),
        Key("head_dim", "kv_channels"),
        Key("rms_norm_eps", "layernorm_epsilon", 1e-6),
        Key("num_experts", "num_moe_experts", like="num_local_experts"),
        Key("num_experts_per_tok", "moe_router_topk"),
    ),
    fixed={**_QWEN_FIXED, **_EXPERTS_FIXED},
    only={**_SILU, "attention_bias": (False,), "use_sliding_window": (False,)},
)

FAMILIES = {family.name: family for family in (GPT2, LLAMA, QWEN3, MIXTRAL, QWEN3_MOE)}


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
