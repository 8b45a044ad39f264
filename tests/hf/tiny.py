"""Tiny random models of transformers, saved as their users would find them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

_SIZES: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def gpt2() -> Any:
    """GPT-2, tied."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=70, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    )


def llama() -> Any:
    """Llama 3, with an output layer of its own."""
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    sizes = _SIZES | {"num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(intermediate_size=48, rms_norm_eps=1e-5, rope_parameters=rope, **sizes))


def llama32() -> Any:
    """Llama 3.2: tied, with rope scaling by 32."""
    return LlamaForCausalLM(
        LlamaConfig(
            intermediate_size=48, rms_norm_eps=1e-5, rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=True, **_SIZES
        )
    )


def qwen3() -> Any:
    """Qwen3, whose heads are wider than the residual stream divided by their number."""
    return Qwen3ForCausalLM(Qwen3Config(intermediate_size=48, head_dim=16, **_SIZES))


def mixtral() -> Any:
    """Mixtral."""
    return MixtralForCausalLM(MixtralConfig(intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, **_SIZES))


def qwen3_moe() -> Any:
    """Qwen3-MoE with a dense first layer and weights of experts that do not add up to one."""
    experts: dict[str, Any] = {
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [0],
        "norm_topk_prob": False,
        "head_dim": 16,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(intermediate_size=48, **experts, **_SIZES))


def deepseek_v2(query_latent: int | None = None) -> Any:
    """DeepSeek-V2-Lite: queries without a latent, YaRN, a dense first layer, two shared experts."""
    rope: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0}
    rope |= {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    rope |= {"mscale": 0.707, "mscale_all_dim": 0.707}
    latents: dict[str, Any] = {"q_lora_rank": query_latent, "kv_lora_rank": 16}
    latents |= {"qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
    experts: dict[str, Any] = {
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    }
    sizes = _SIZES | {"num_key_value_heads": 4, "max_position_embeddings": 163840}
    return DeepseekV2ForCausalLM(
        DeepseekV2Config(intermediate_size=48, rope_parameters=rope, **latents, **experts, **sizes)
    )


def deepseek_v2_large() -> Any:
    """DeepSeek-V2 as the large one has it: queries through a latent, weights of experts times a factor."""
    model = deepseek_v2(query_latent=20)
    model.config.routed_scaling_factor = 1.5
    return type(model)(model.config)


MAKERS = {
    maker.__name__: maker for maker in (gpt2, llama, llama32, qwen3, mixtral, qwen3_moe, deepseek_v2, deepseek_v2_large)
}


def saved(folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 5, **options: Any) -> Path:
    """Save a model whose every weight, norms and biases too, is random enough to show a mistake; return the folder."""
    torch.manual_seed(seed)
    model = MAKERS[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def with_tokenizer(folder: Path, size: int = 70) -> Path:
    """Give a folder a tokenizer whose words are w2, w3, ..., with a chat template."""
    vocabulary = {f"w{i}" if i > 1 else f"<{i}>": i for i in range(size)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<1>", unk_token="<0>")
    made.chat_template = (
        "{% for m in messages %}{{ 'w2 ' if m.role == 'user' else 'w3 ' }}{{ m.content }} w4 {% endfor %}"
        "{% if add_generation_prompt %}w3{% endif %}"
    )
    made.save_pretrained(folder)
    return folder
