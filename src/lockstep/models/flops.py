"""Floating-point operations of a training step, counted as Megatron-LM counts them."""

from lockstep.config.experts import expert_layers
from lockstep.config.model import ModelConfig
from lockstep.models.layers import required

# Each product is computed forward, for the gradient of its input and for that of its weight; a multiply-add is two.
_OPERATIONS_PER_WEIGHT = 3 * 2


def flops_per_sequence(config: ModelConfig) -> float:
    """Return the operations one sequence of `seq_length` tokens takes, forward and backward.

    Matrix products only; causal attention counts half its scores; the padded vocabulary counts whole. A token counts
    the experts it goes to, none of them dropped, and not its router.
    """
    length, hidden = required(config.seq_length), required(config.hidden_size)
    per_token, score_width = (_latent_attention if config.multi_latent_attention else _attention)(config)
    mlp_products = 3 if config.gated_linear_unit else 2
    layers = required(config.num_layers)
    inner = sum(
        _inner_width(config) if experts else required(config.ffn_hidden_size) for experts in expert_layers(config)
    )
    weights = length * (layers * per_token + mlp_products * hidden * inner + hidden * required(config.vocab_size))
    scores = layers * score_width * length * length
    return float(_OPERATIONS_PER_WEIGHT * (weights + scores))


def _attention(config: ModelConfig) -> tuple[int, float]:
    """Return the weights of an attention layer, and half the channels of its queries and its values together."""
    hidden, channels = required(config.hidden_size), required(config.kv_channels)
    query = required(config.num_attention_heads) * channels
    return hidden * (query + 2 * required(config.num_query_groups) * channels) + query * hidden, query


def _latent_attention(config: ModelConfig) -> tuple[int, float]:
    """Return the same of multi-latent attention, with its norms; Megatron-LM counts these, used or not."""
    hidden, heads = required(config.hidden_size), required(config.num_attention_heads)
    rank, latent, rotated = config.q_lora_rank, config.kv_lora_rank, config.qk_pos_emb_head_dim
    query, value = heads * (config.qk_head_dim + rotated), heads * config.v_head_dim
    to_query = hidden * query if rank is None else rank * (hidden + query + 1)
    to_key_value = latent * (hidden + heads * config.qk_head_dim + value + 1) + hidden * rotated
    return to_query + to_key_value + value * hidden, (query + value) / 2


def _inner_width(config: ModelConfig) -> int:
    """Return the inner width of all experts together that a token goes through."""
    return config.moe_router_topk * required(config.moe_ffn_hidden_size) + (
        config.moe_shared_expert_intermediate_size or 0
    )


def flops_per_token(config: ModelConfig) -> float:
    """Return the operations per token, forward and backward, averaged over a sequence."""
    return flops_per_sequence(config) / required(config.seq_length)


def flops_per_iteration(config: ModelConfig, global_batch_size: int) -> float:
    """Return the operations of one optimizer step over `global_batch_size` sequences, without the optimizer's own."""
    return flops_per_sequence(config) * global_batch_size
