"""The aspects of the model section that only some architectures have."""

from dataclasses import dataclass
from typing import Literal

from lockstep.config.fields import opt
from lockstep.config.section import Section

_KERNEL = "chooses a kernel, not the result; Lockstep picks its own"


@dataclass(kw_only=True)
class MixtureOfExperts(Section):
    """Experts and their router."""

    moe_shared_expert_intermediate_size: int | None = opt(
        None,
        "--moe-shared-expert-intermediate-size",
        help="Inner width of the shared experts together, which every token goes through.",
    )
    moe_shared_expert_gate: bool = opt(
        False, "--moe-shared-expert-gate", help="Weigh the shared experts by the sigmoid of a product with the token."
    )
    moe_shared_expert_overlap: bool = opt(
        False,
        "--moe-shared-expert-overlap",
        refused="shared experts are computed after the exchange of tokens, not during it",
    )
    use_grouped_gemm_for_shared_expert: bool = opt(
        False, "--use-grouped-gemm-for-shared-expert", holds=_KERNEL, effect="speed"
    )
    moe_ffn_hidden_size: int | None = opt(
        None, "--moe-ffn-hidden-size", help="Inner width of an expert; ffn_hidden_size when unset."
    )
    moe_router_topk: int = opt(2, "--moe-router-topk", help="Experts that a token goes to.")
    moe_router_padding_for_quantization: bool = opt(
        False, "--moe-router-padding-for-quantization", refused="quantized training is not supported"
    )
    moe_router_num_groups: int | None = opt(
        None, "--moe-router-num-groups", help="Groups of experts, of which a token may use moe_router_group_topk."
    )
    moe_router_group_topk: int | None = opt(
        None, "--moe-router-group-topk", help="Groups that the experts of a token come from."
    )
    moe_router_pre_softmax: bool = opt(
        False,
        "--moe-router-pre-softmax",
        help="Softmax over all experts before the choice, not over the chosen ones; "
        "other score functions score all experts anyhow.",
    )
    moe_router_topk_scaling_factor: float | None = opt(
        None, "--moe-router-topk-scaling-factor", help="Factor on the weights of the chosen experts."
    )
    moe_router_score_function: Literal["softmax", "sigmoid", "sqrtsoftplus"] = opt(
        "softmax",
        "--moe-router-score-function",
        help="Scores of the experts; those of the chosen ones are divided by their sum unless they are a softmax.",
    )
    moe_router_dtype: Literal["fp32", "fp64"] | None = opt(
        None, "--moe-router-dtype", help="Precision of the router's products and weights; that of the model when unset."
    )
    moe_router_enable_expert_bias: bool = opt(
        False,
        "--moe-router-enable-expert-bias",
        help="Add a bias to the scores for the choice alone; every step moves it towards an even load.",
    )
    moe_router_bias_update_rate: float = opt(
        0.001, "--moe-router-bias-update-rate", help="How far a step moves the bias of an expert."
    )
    moe_router_quantile_balancing_ema: float = opt(
        0.0, "--moe-router-quantile-balancing-ema", refused="quantile balancing is not supported"
    )
    moe_router_force_load_balancing: bool = opt(
        False,
        "--moe-router-force-load-balancing",
        help="For benchmarks: replace the router's logits by random ones, the same in every step.",
    )
    moe_router_force_biased: float | None = opt(
        None, "--moe-router-force-biased", refused="forcing an uneven load is not supported"
    )
    moe_grouped_gemm: bool = opt(False, "--moe-grouped-gemm", holds=_KERNEL, effect="speed")
    moe_z_loss_coeff: float | None = opt(
        None, "--moe-z-loss-coeff", help="Coefficient of the loss on the size of the router's logits."
    )
    moe_input_jitter_eps: float | None = opt(
        None, "--moe-input-jitter-eps", refused="noise on the router's input is not supported"
    )
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = opt(
        "allgather",
        "--moe-token-dispatcher-type",
        only=("allgather", "alltoall"),
        refused="the flex dispatcher needs kernels that Lockstep does not use",
        effect="speed",
    )
    moe_flex_dispatcher_backend: Literal["deepep", "hybridep", "ncclep"] = opt(
        "deepep", "--moe-flex-dispatcher-backend", refused="the flex dispatcher is not supported"
    )
    moe_permute_fusion_into_hybridep: bool = opt(
        False, "--moe-permute-fusion-into-hybridep", refused="the flex dispatcher is not supported"
    )
    moe_per_layer_logging: bool = opt(
        False, "--moe-per-layer-logging", refused="auxiliary losses are logged as means over the layers only"
    )
    moe_expert_capacity_factor: float | None = opt(
        None,
        "--moe-expert-capacity-factor",
        help="Tokens an expert takes of a micro-batch, as a multiple of an even load; no limit when unset or negative.",
    )
    moe_pad_expert_input_to_capacity: bool = opt(
        False,
        "--moe-pad-expert-input-to-capacity",
        holds="padding changes the shape of the work, not its result",
        effect="speed",
    )
    moe_token_drop_policy: Literal["probs", "position"] = opt(
        "probs",
        "--moe-token-drop-policy",
        help="Which tokens an expert drops beyond its capacity: those of least weight, or the last ones.",
    )
    moe_permute_fusion: bool = opt(False, "--moe-permute-fusion", holds=_KERNEL, effect="speed")
    moe_router_fusion: bool = opt(False, "--moe-router-fusion", holds=_KERNEL, effect="speed")
    moe_apply_probs_on_input: bool = opt(
        False, "--moe-apply-probs-on-input", help="Weigh what goes into the experts, not what they compute."
    )
    num_moe_experts: int | None = opt(
        None, "--num-experts", help="Experts of a layer; without it every layer has one MLP."
    )
    moe_layer_freq: int | str | list[int] = opt(
        1,
        "--moe-layer-freq",
        help="Layers with experts: every n-th from the first, or a pattern of 1 and 0 such as [0]+[1]*23.",
    )
    moe_router_load_balancing_type: list[str] = opt(
        ["aux_loss"],
        "--moe-router-load-balancing-type",
        help="Losses for an even load: aux_loss of each micro-batch, seq_aux_loss of each sample, or none; or "
        "sinkhorn, without a loss: scores are scaled until all experts have about as many tokens.",
    )
    moe_aux_loss_coeff: list[float] = opt(
        [0.0], "--moe-aux-loss-coeff", help="Coefficient of each of these losses; 0 leaves it out."
    )


@dataclass(kw_only=True)
class MultiLatentAttention(Section):
    """Multi-latent attention."""

    multi_latent_attention: bool = opt(
        False,
        "--multi-latent-attention",
        help="Attention whose keys and values, and perhaps queries, come through narrow latents.",
    )
    q_lora_rank: int | None = opt(
        None, "--q-lora-rank", help="Width of the latent of queries; without it they come from the residual stream."
    )
    kv_lora_rank: int = opt(32, "--kv-lora-rank", help="Width of the latent of keys and values.")
    qk_head_dim: int = opt(128, "--qk-head-dim", help="Channels of a query and key head without a position.")
    qk_pos_emb_head_dim: int = opt(
        64,
        "--qk-pos-emb-head-dim",
        help="Channels of a query and key head that are rotated; all heads share the key's.",
    )
    v_head_dim: int = opt(128, "--v-head-dim", help="Channels of a value head.")
    rotary_scaling_factor: float = opt(
        1.0, "--rotary-scaling-factor", help="How many times the original context of 4096 tokens YaRN stretches to."
    )
    mscale: float = opt(1.0, "--mscale", help="How much YaRN's factor enlarges the rotated channels.")
    mscale_all_dim: float = opt(
        0.0, "--mscale-all-dim", help="How much YaRN's factor enlarges the scores, in place of the rotated channels."
    )
    mla_down_proj_fusion: bool = opt(
        False,
        "--mla-down-proj-fusion",
        refused="one weight in place of two down projections would be drawn otherwise; it is not supported",
    )


@dataclass(kw_only=True)
class MultiTokenPrediction(Section):
    """Multi-token prediction."""

    mtp_standalone: bool = opt(False, "--mtp-standalone", refused="multi-token prediction is not supported")
    mtp_num_layers: int | None = opt(None, "--mtp-num-layers", refused="multi-token prediction is not supported")
    mtp_loss_scaling_factor: float = opt(
        0.1, "--mtp-loss-scaling-factor", refused="multi-token prediction is not supported"
    )
    mtp_use_repeated_layer: bool = opt(
        False, "--mtp-use-repeated-layer", refused="multi-token prediction is not supported"
    )
    mtp_detach_heads: bool = opt(False, "--mtp-detach-heads", refused="multi-token prediction is not supported")
    mtp_hsm: bool = opt(False, "--mtp-hsm", refused="multi-token prediction is not supported")
