"""The aspects of the model section that only some architectures have."""

from dataclasses import dataclass
from typing import Literal

from lockstep.config.fields import opt
from lockstep.config.section import Section


@dataclass(kw_only=True)
class MixtureOfExperts(Section):
    """Experts and their router."""

    moe_shared_expert_intermediate_size: int | None = opt(
        None, "--moe-shared-expert-intermediate-size", refused="mixture-of-experts models are not supported yet"
    )
    moe_shared_expert_gate: bool = opt(
        False, "--moe-shared-expert-gate", refused="mixture-of-experts models are not supported yet"
    )
    moe_shared_expert_overlap: bool = opt(
        False, "--moe-shared-expert-overlap", refused="mixture-of-experts models are not supported yet"
    )
    use_grouped_gemm_for_shared_expert: bool = opt(
        False, "--use-grouped-gemm-for-shared-expert", refused="mixture-of-experts models are not supported yet"
    )
    moe_ffn_hidden_size: int | None = opt(
        None, "--moe-ffn-hidden-size", refused="mixture-of-experts models are not supported yet"
    )
    moe_router_topk: int = opt(2, "--moe-router-topk", refused="mixture-of-experts models are not supported yet")
    moe_router_padding_for_quantization: bool = opt(
        False, "--moe-router-padding-for-quantization", refused="mixture-of-experts models are not supported yet"
    )
    moe_router_num_groups: int | None = opt(
        None, "--moe-router-num-groups", refused="mixture-of-experts models are not supported yet"
    )
    moe_router_group_topk: int | None = opt(
        None, "--moe-router-group-topk", refused="mixture-of-experts models are not supported yet"
    )
    moe_router_pre_softmax: bool = opt(
        False, "--moe-router-pre-softmax", refused="mixture-of-experts models are not supported yet"
    )
    moe_router_topk_scaling_factor: float | None = opt(
        None, "--moe-router-topk-scaling-factor", refused="mixture-of-experts models are not supported yet"
    )
    moe_router_score_function: Literal["softmax", "sigmoid", "sqrtsoftplus"] = opt(
        "softmax", "--moe-router-score-function", refused="mixture-of-experts models are not supported yet"
    )
    moe_router_dtype: Literal["fp32", "fp64"] | None = opt(
        None, "--moe-router-dtype", refused="mixture-of-experts models are not supported yet"
    )
    moe_router_enable_expert_bias: bool = opt(
        False, "--moe-router-enable-expert-bias", refused="mixture-of-experts models are not supported yet"
    )
    moe_router_bias_update_rate: float = opt(
        0.001, "--moe-router-bias-update-rate", refused="mixture-of-experts models are not supported yet"
    )
    moe_router_quantile_balancing_ema: float = opt(
        0.0, "--moe-router-quantile-balancing-ema", refused="mixture-of-experts models are not supported yet"
    )
    moe_router_force_load_balancing: bool = opt(
        False, "--moe-router-force-load-balancing", refused="mixture-of-experts models are not supported yet"
    )
    moe_router_force_biased: float | None = opt(
        None, "--moe-router-force-biased", refused="mixture-of-experts models are not supported yet"
    )
    moe_grouped_gemm: bool = opt(False, "--moe-grouped-gemm", refused="mixture-of-experts models are not supported yet")
    moe_z_loss_coeff: float | None = opt(
        None, "--moe-z-loss-coeff", refused="mixture-of-experts models are not supported yet"
    )
    moe_input_jitter_eps: float | None = opt(
        None, "--moe-input-jitter-eps", refused="mixture-of-experts models are not supported yet"
    )
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = opt(
        "allgather", "--moe-token-dispatcher-type", refused="mixture-of-experts models are not supported yet"
    )
    moe_flex_dispatcher_backend: Literal["deepep", "hybridep", "ncclep"] = opt(
        "deepep", "--moe-flex-dispatcher-backend", refused="mixture-of-experts models are not supported yet"
    )
    moe_permute_fusion_into_hybridep: bool = opt(
        False, "--moe-permute-fusion-into-hybridep", refused="mixture-of-experts models are not supported yet"
    )
    moe_per_layer_logging: bool = opt(
        False, "--moe-per-layer-logging", refused="mixture-of-experts models are not supported yet"
    )
    moe_expert_capacity_factor: float | None = opt(
        None, "--moe-expert-capacity-factor", refused="mixture-of-experts models are not supported yet"
    )
    moe_pad_expert_input_to_capacity: bool = opt(
        False, "--moe-pad-expert-input-to-capacity", refused="mixture-of-experts models are not supported yet"
    )
    moe_token_drop_policy: Literal["probs", "position"] = opt(
        "probs", "--moe-token-drop-policy", refused="mixture-of-experts models are not supported yet"
    )
    moe_permute_fusion: bool = opt(
        False, "--moe-permute-fusion", refused="mixture-of-experts models are not supported yet"
    )
    moe_router_fusion: bool = opt(
        False, "--moe-router-fusion", refused="mixture-of-experts models are not supported yet"
    )
    moe_apply_probs_on_input: bool = opt(
        False, "--moe-apply-probs-on-input", refused="mixture-of-experts models are not supported yet"
    )
    num_moe_experts: int | None = opt(None, "--num-experts", refused="mixture-of-experts models are not supported yet")
    moe_layer_freq: int | str = opt(1, "--moe-layer-freq", refused="mixture-of-experts models are not supported yet")
    moe_router_load_balancing_type: list[str] = opt(
        ["aux_loss"], "--moe-router-load-balancing-type", refused="mixture-of-experts models are not supported yet"
    )
    moe_aux_loss_coeff: list[float] = opt(
        [0.0], "--moe-aux-loss-coeff", refused="mixture-of-experts models are not supported yet"
    )


@dataclass(kw_only=True)
class MultiLatentAttention(Section):
    """Multi-latent attention."""

    multi_latent_attention: bool = opt(
        False, "--multi-latent-attention", refused="multi-latent attention is not supported yet"
    )
    q_lora_rank: int | None = opt(None, "--q-lora-rank", refused="multi-latent attention is not supported yet")
    kv_lora_rank: int = opt(32, "--kv-lora-rank", refused="multi-latent attention is not supported yet")
    qk_head_dim: int = opt(128, "--qk-head-dim", refused="multi-latent attention is not supported yet")
    qk_pos_emb_head_dim: int = opt(64, "--qk-pos-emb-head-dim", refused="multi-latent attention is not supported yet")
    v_head_dim: int = opt(128, "--v-head-dim", refused="multi-latent attention is not supported yet")
    rotary_scaling_factor: float = opt(
        1.0, "--rotary-scaling-factor", refused="multi-latent attention is not supported yet"
    )
    mscale: float = opt(1.0, "--mscale", refused="multi-latent attention is not supported yet")
    mscale_all_dim: float = opt(0.0, "--mscale-all-dim", refused="multi-latent attention is not supported yet")
    mla_down_proj_fusion: bool = opt(
        False, "--mla-down-proj-fusion", refused="multi-latent attention is not supported yet"
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
