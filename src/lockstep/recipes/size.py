"""How many parameters a configuration's model has, counted without building it."""

from collections.abc import Iterator

from lockstep.config.experts import expert_layers
from lockstep.config.model import ModelConfig
from lockstep.config.peft import PEFTConfig


def count_parameters(m: ModelConfig) -> int | None:
    """Return the parameters of the whole model of a derived configuration; None where its size is not given."""
    if not (m.num_layers and m.hidden_size and m.num_attention_heads and m.vocab_size):
        return None
    with_experts = expert_layers(m)
    dense, sparse = with_experts.count(False), with_experts.count(True)
    layer = _attention(m) + 2 * _norm(m, m.hidden_size)
    total = m.num_layers * layer + _norm(m, m.hidden_size)
    total += dense * _mlp(m, m.ffn_hidden_size or 0) + (sparse * _experts(m) if sparse else 0)
    total += m.vocab_size * m.hidden_size * (1 if m.share_embeddings_and_output_weights else 2)
    if m.position_embedding_type == "learned_absolute":
        total += (m.max_position_embeddings or 0) * m.hidden_size
    return total


def count_trained(m: ModelConfig, peft: PEFTConfig) -> int | None:
    """Return the parameters that are trained: all, or those of adapters on plain names of linears.

    None where the model's size is not given.
    """
    if peft.scheme is None or count_parameters(m) is None:
        return count_parameters(m)
    extra = 1 if peft.scheme == "dora" else 0
    return sum(
        peft.dim * (inputs + outputs) + extra * outputs
        for name, inputs, outputs in _linears(m)
        if name in peft.target_modules
    )


def _linears(m: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """Yield the name, inputs and outputs of every linear of all layers; the experts of a layer share one."""
    hidden, heads, layers = m.hidden_size or 0, m.num_attention_heads or 0, m.num_layers or 0
    mlps = [m.ffn_hidden_size or 0], [m.moe_ffn_hidden_size or 0, m.moe_shared_expert_intermediate_size or 0]
    if m.multi_latent_attention:
        attention = [
            ("linear_q_proj", hidden, heads * (m.qk_head_dim + m.qk_pos_emb_head_dim)),
            ("linear_kv_down_proj", hidden, m.kv_lora_rank + m.qk_pos_emb_head_dim),
            ("linear_kv_up_proj", m.kv_lora_rank, heads * (m.qk_head_dim + m.v_head_dim)),
            ("linear_proj", heads * m.v_head_dim, hidden),
        ]
    else:
        width, groups = m.kv_channels or 0, m.num_query_groups or 0
        attention = [("linear_qkv", hidden, (heads + 2 * groups) * width), ("linear_proj", heads * width, hidden)]
    yield from attention * layers
    for sparse in expert_layers(m):
        for inner in filter(None, mlps[sparse]):
            yield "linear_fc1", hidden, inner * (2 if m.gated_linear_unit else 1)
            yield "linear_fc2", inner, hidden


def _attention(m: ModelConfig) -> int:
    if m.multi_latent_attention:
        return _latent_attention(m)
    hidden, heads, groups, width = (
        m.hidden_size or 0,
        m.num_attention_heads or 0,
        m.num_query_groups or 0,
        m.kv_channels,
    )
    width = width or 0
    in_bias = m.add_bias_linear or m.add_qkv_bias
    total = _linear(hidden, (heads + 2 * groups) * width, in_bias) + _linear(heads * width, hidden, m.add_bias_linear)
    return total + (2 * _norm(m, width) if m.qk_layernorm else 0)


def _latent_attention(m: ModelConfig) -> int:
    hidden, heads = m.hidden_size or 0, m.num_attention_heads or 0
    query = heads * (m.qk_head_dim + m.qk_pos_emb_head_dim)
    total = hidden * (m.kv_lora_rank + m.qk_pos_emb_head_dim)
    total += m.kv_lora_rank * heads * (m.qk_head_dim + m.v_head_dim)
    total += _linear(heads * m.v_head_dim, hidden, m.add_bias_linear)
    total += hidden * query if m.q_lora_rank is None else m.q_lora_rank * (hidden + query)
    return total + (_norm(m, m.kv_lora_rank) + _norm(m, m.q_lora_rank or 0) if m.qk_layernorm else 0)


def _experts(m: ModelConfig) -> int:
    hidden, experts = m.hidden_size or 0, m.num_moe_experts or 0
    total = experts * (hidden + _mlp(m, m.moe_ffn_hidden_size or 0))
    if m.moe_shared_expert_intermediate_size:
        total += _mlp(m, m.moe_shared_expert_intermediate_size) + (hidden if m.moe_shared_expert_gate else 0)
    return total


def _mlp(m: ModelConfig, inner: int) -> int:
    hidden, bias = m.hidden_size or 0, m.add_bias_linear
    return _linear(hidden, inner * (2 if m.gated_linear_unit else 1), bias) + _linear(inner, hidden, bias)


def _linear(inputs: int, outputs: int, bias: bool) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _norm(m: ModelConfig, width: int) -> int:
    return width * (2 if m.normalization == "LayerNorm" else 1)
