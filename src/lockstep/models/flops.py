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
    query = required(config.num_attention_heads) * required(config.kv_channels)
    key_value = 2 * required(config.num_query_groups) * required(config.kv_channels)
    mlp_products = 3 if config.gated_linear_unit else 2
    per_token = hidden * (query + key_value) + query * hidden
    layers = required(config.num_layers)
    inner = sum(
        _inner_width(config) if experts else required(config.ffn_hidden_size) for experts in expert_layers(config)
    )
    weights = length * (layers * per_token + mlp_products * hidden * inner + hidden * required(config.vocab_size))
    scores = layers * query * length * length
    return float(_OPERATIONS_PER_WEIGHT * (weights + scores))


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
