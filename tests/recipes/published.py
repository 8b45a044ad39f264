"""The published configurations of the models that the recipes train, and what the models count."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """A model on the Hugging Face hub: values of its config.json, and its parameters."""

    parameters: int
    config: dict[str, Any]


def _llama(
    layers: int, hidden: int, inner: int, heads: int, factor: float | None = None, **more: Any
) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 500000.0}
    if factor is not None:
        rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 8192}
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": hidden // heads}
    other = {"vocab_size": 128256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_parameters": rope}
    return {"model_type": "llama", **sizes, **other, **more}


def _qwen3(layers: int, hidden: int, inner: int, heads: int, tied: bool = False) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128}
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    other = {"vocab_size": 151936, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied, "rope_parameters": rope}
    return {"model_type": "qwen3", **sizes, **other}


_DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2",
    "num_hidden_layers": 27,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 6,
    "norm_topk_prob": False,
    "vocab_size": 102400,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}

PUBLISHED = {
    "llama3_8b": Published(8_030_261_248, _llama(32, 4096, 14336, 32)),
    "llama3_70b": Published(70_553_706_496, _llama(80, 8192, 28672, 64)),
    "llama31_8b": Published(8_030_261_248, _llama(32, 4096, 14336, 32, 8.0)),
    "llama31_70b": Published(70_553_706_496, _llama(80, 8192, 28672, 64, 8.0)),
    "llama32_1b": Published(1_235_814_400, _llama(16, 2048, 8192, 32, 32.0, tie_word_embeddings=True)),
    "llama32_3b": Published(3_212_749_824, _llama(28, 3072, 8192, 24, 32.0, tie_word_embeddings=True)),
    "qwen3_600m": Published(596_049_920, _qwen3(28, 1024, 3072, 16, tied=True)),
    "qwen3_1p7b": Published(1_720_574_976, _qwen3(28, 2048, 6144, 16, tied=True)),
    "qwen3_4b": Published(4_022_468_096, _qwen3(36, 2560, 9728, 32, tied=True)),
    "qwen3_8b": Published(8_190_735_360, _qwen3(36, 4096, 12288, 32)),
    "qwen3_14b": Published(14_768_307_200, _qwen3(40, 5120, 17408, 40)),
    "qwen3_32b": Published(32_762_123_264, _qwen3(64, 5120, 25600, 64)),
    "deepseek_v2_lite": Published(15_706_484_224, _DEEPSEEK_V2_LITE),
}
