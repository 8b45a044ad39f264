"""GPT-2."""

from typing import Any

from lockstep.config.model import ModelConfig
from lockstep.errors import UserError
from lockstep.hf.families.family import Family, Key, Said
from lockstep.hf.rules import GroupedInOne, Rule, Same, Transposed, Vocabulary
from lockstep.models.mlp import uses_fused_activation

_OURS, _THEIRS = "decoder.layers.{layer}", "transformer.h.{layer}"
_ACTIVATIONS = {"gelu_new": True, "gelu_pytorch_tanh": True, "gelu": False}


def spelled_activation(model: ModelConfig) -> str:
    """Return the activation as Hugging Face calls it; one it does not have keeps Lockstep's name."""
    name = model.activation_func
    if name == "gelu":
        return "gelu_new" if uses_fused_activation(model) else "gelu"
    return "gelu_new" if name == "openai_gelu" else name


class _Activation:
    """Which GELU, and the dropout of embeddings."""

    def read(self, hf: dict[str, Any]) -> list[Said]:
        name = hf.get("activation_function", "gelu_new")
        if name not in _ACTIVATIONS:
            raise UserError(f"config.json: activation_function = {name} is not supported ({', '.join(_ACTIVATIONS)})")
        return [
            ("activation_func", "gelu", "activation_function"),
            ("bias_activation_fusion", _ACTIVATIONS[name], "activation_function"),
        ]

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"activation_function": spelled_activation(model), "embd_pdrop": model.hidden_dropout}


def _with_bias(ours: str, theirs: str, weight: Any) -> tuple[Rule, ...]:
    return tuple(
        Rule(f"{_OURS}.{ours}.{kind}", (f"{_THEIRS}.{theirs}.{kind}",), form)
        for kind, form in (("weight", weight), ("bias", Same()))
    )


GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    rules=(
        Rule("embedding.word_embeddings.weight", ("transformer.wte.weight",), Vocabulary()),
        Rule("embedding.position_embeddings.weight", ("transformer.wpe.weight",), Same()),
        *_with_bias("input_layernorm", "ln_1", Same()),
        *_with_bias("pre_mlp_layernorm", "ln_2", Same()),
        *_with_bias("self_attention.linear_proj", "attn.c_proj", Transposed()),
        *_with_bias("mlp.linear_fc1", "mlp.c_fc", Transposed()),
        *_with_bias("mlp.linear_fc2", "mlp.c_proj", Transposed()),
        *(
            Rule(
                f"{_OURS}.self_attention.linear_qkv.{kind}",
                (f"{_THEIRS}.attn.c_attn.{kind}",),
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
    aspects=(_Activation(),),
    tied=True,
    prefix="transformer.",
    buffers=(r".*\.attn\.bias", r".*\.attn\.masked_bias"),
    blocks={"self_attention": f"{_THEIRS}.attn", "mlp": f"{_THEIRS}.mlp"},
)
