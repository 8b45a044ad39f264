"""Flags that are more than one field's: shorthands, deprecated spellings, and flags that only Megatron-LM needs."""

from dataclasses import dataclass, field
from typing import Any

from lockstep.config.reasons import OWN_GRAPHS


@dataclass(frozen=True)
class Composite:
    """A flag that sets the fields of ``sets`` to fixed values; what ``takes_value`` flags set is computed.

    ``holds`` says why a flag that sets nothing is accepted, ``refused`` why one is not.
    """

    flag: str
    sets: dict[str, Any] = field(default_factory=dict)
    help: str = ""
    holds: str = ""
    refused: str = ""
    takes_value: bool = False


COMPOSITES: tuple[Composite, ...] = (
    Composite(
        "--swiglu",
        {"model.gated_linear_unit": True, "model.activation_func": "silu"},
        "Gated MLP with SiLU.",
    ),
    Composite(
        "--quick-geglu",
        {"model.gated_linear_unit": True, "model.activation_func": "quick_gelu"},
        "Gated MLP with the sigmoid approximation of GeLU.",
    ),
    Composite("--squared-relu", {"model.activation_func": "squared_relu"}, "Squared ReLU in the MLP."),
    Composite("--openai-gelu", {"model.activation_func": "openai_gelu"}, "GeLU as GPT-2 writes it."),
    Composite("--group-query-attention", help="Use --num-query-groups key/value heads, 1 when that is not given."),
    Composite(
        "--use-rotary-position-embeddings",
        {"model.position_embedding_type": "rope"},
        "Deprecated spelling of --position-embedding-type rope.",
    ),
    Composite(
        "--use-flash-attn",
        {"model.attention_backend": "flash"},
        "Spelling of --attention-backend flash.",
    ),
    Composite(
        "--recompute-activations",
        {"model.recompute_granularity": "selective"},
        "Deprecated spelling of --recompute-granularity selective.",
    ),
    Composite("--grad-reduce-in-bf16", {"ddp.grad_reduce_in_fp32": False}, "Accumulate gradients in BF16."),
    Composite("--no-bias-swiglu-fusion", holds="chooses a kernel, not the result; Lockstep picks its own"),
    Composite(
        "--no-yarn-correction-range-round-to-int",
        {"model.yarn_correction_range_round_to_int": False},
        holds="YaRN is refused, so its rounding is not used",
    ),
    Composite(
        "--no-weight-decay-cond-type",
        refused="deprecated in Megatron-LM; give --apply-wd-to-qk-layernorm",
        takes_value=True,
    ),
    Composite(
        "--num-layers-per-virtual-pipeline-stage",
        help="Interleaved pipeline: layers in each of the runs of layers that a process has.",
        takes_value=True,
    ),
    Composite("--ckpt-fully-parallel-save", holds="processes with the same weights always share out the writing"),
    Composite("--use-dist-ckpt", refused="checkpoints have one format, see --ckpt-format; drop it"),
    Composite(
        "--dist-ckpt-format",
        refused="it has no effect in Megatron-LM, and checkpoints have one format, see --ckpt-format; drop it",
        takes_value=True,
    ),
    Composite("--moe-router-padding-for-fp8", refused="quantized training is not supported"),
    Composite(
        "--moe-layer-recompute",
        refused="deprecated in Megatron-LM; give --recompute-granularity selective --recompute-modules moe",
    ),
    Composite("--moe-enable-deepep", refused="the flex dispatcher is not supported"),
    Composite("--enable-cuda-graph", holds=OWN_GRAPHS),
    Composite("--external-cuda-graph", holds=OWN_GRAPHS),
    Composite(
        "--cuda-graph-scope",
        holds=OWN_GRAPHS,
        takes_value=True,
    ),
)
