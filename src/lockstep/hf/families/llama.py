"""Llama 3, 3.1 and 3.2."""

from lockstep.hf.families.decoders import COMMON_FIXED, COMMON_KEYS, COMMON_ONLY, DENSE_MLP, OUTSIDE_ATTENTION, QKV
from lockstep.hf.families.family import Family, Key
from lockstep.hf.families.rotary import Rotary

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    rules=(*OUTSIDE_ATTENTION, QKV, *DENSE_MLP),
    keys=(
        *COMMON_KEYS,
        Key("num_key_value_heads", "num_query_groups", like="num_attention_heads"),
        Key("head_dim", "kv_channels"),
        Key("rms_norm_eps", "layernorm_epsilon", 1e-6),
    ),
    fixed=COMMON_FIXED,
    only={**COMMON_ONLY, "attention_bias": (False,), "mlp_bias": (False,)},
    aspects=(Rotary(),),
)
