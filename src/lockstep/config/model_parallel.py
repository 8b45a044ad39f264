"""The aspects of the model section that say where and how it is executed."""

from dataclasses import dataclass
from typing import Literal

from lockstep.config.fields import opt
from lockstep.config.reasons import NARROW_FORMATS, OWN_GRAPHS
from lockstep.config.section import Section

_OF_TP_OVERLAP = "it is a part of tp_comm_overlap, which is refused"
_SCHEDULES = "PyTorch's schedules decide when stages exchange; it does not change what they exchange"


@dataclass(kw_only=True)
class ModelParallel(Section):
    """How the model is spread over processes."""

    tensor_model_parallel_size: int = opt(
        1,
        "--tensor-model-parallel-size",
        help="Processes that share each layer: attention heads, MLP and vocabulary are split over them.",
        effect="speed",
    )
    pipeline_model_parallel_comm_backend: Literal["nccl", "ucc"] | None = opt(
        None,
        "--pipeline-model-parallel-comm-backend",
        only=(None, "nccl"),
        refused="pipeline stages exchange through the backend of all processes",
        effect="speed",
    )
    pipeline_model_parallel_size: int = opt(
        1,
        "--pipeline-model-parallel-size",
        help="Pipeline stages: runs of layers, each on processes of its own.",
        effect="speed",
    )
    sequence_parallel: bool = opt(
        False,
        "--sequence-parallel",
        help="Split the residual stream along the sequence between tensor-parallel layers.",
        effect="speed",
    )
    context_parallel_size: int = opt(
        1,
        "--context-parallel-size",
        help="Processes that share each sequence: every one computes some of its tokens, with the keys and values of "
        "all.",
        effect="speed",
    )
    hierarchical_context_parallel_sizes: list[int] | None = opt(
        None,
        "--hierarchical-context-parallel-sizes",
        holds="keys and values are gathered over all context-parallel processes at once, with the same result; the "
        "product must be their number",
        effect="speed",
    )
    expert_model_parallel_size: int = opt(
        1,
        "--expert-model-parallel-size",
        help="Processes, of those that have the same weights otherwise, that share out the experts of every layer.",
        effect="speed",
    )
    expert_tensor_parallel_size: int | None = opt(
        None,
        "--expert-tensor-parallel-size",
        help="Processes that split each expert: tensor_model_parallel_size, as when unset, or 1.",
        effect="speed",
    )
    tp_comm_bulk_wgrad: bool = opt(
        True,
        "--no-tp-comm-bulk-wgrad",
        "--disable-tp-comm-bulk-wgrad",
        negated=True,
        holds=_OF_TP_OVERLAP,
        effect="speed",
    )
    tp_comm_bulk_dgrad: bool = opt(
        True,
        "--no-tp-comm-bulk-dgrad",
        "--disable-tp-comm-bulk-dgrad",
        negated=True,
        holds=_OF_TP_OVERLAP,
        effect="speed",
    )
    tp_comm_overlap_ag: bool = opt(
        True,
        "--no-tp-comm-overlap-ag",
        "--disable-tp-comm-overlap-ag",
        negated=True,
        holds=_OF_TP_OVERLAP,
        effect="speed",
    )
    tp_comm_overlap_rs: bool = opt(
        True,
        "--no-tp-comm-overlap-rs",
        "--disable-tp-comm-overlap-rs",
        negated=True,
        holds=_OF_TP_OVERLAP,
        effect="speed",
    )
    tp_comm_overlap_rs_dgrad: bool = opt(False, "--tp-comm-overlap-rs-dgrad", holds=_OF_TP_OVERLAP, effect="speed")
    tp_comm_split_ag: bool = opt(
        True,
        "--no-tp-comm-split-ag",
        "--disable-tp-comm-split-ag",
        negated=True,
        holds=_OF_TP_OVERLAP,
        effect="speed",
    )
    tp_comm_split_rs: bool = opt(
        True,
        "--no-tp-comm-split-rs",
        "--disable-tp-comm-split-rs",
        negated=True,
        holds=_OF_TP_OVERLAP,
        effect="speed",
    )
    use_ring_exchange_p2p: bool = opt(
        False,
        "--use-ring-exchange-p2p",
        refused="PyTorch has no ring exchange; stages send and receive",
        effect="speed",
    )
    overlap_p2p_comm_warmup_flush: bool = opt(
        False,
        "--overlap-p2p-communication-warmup-flush",
        holds=_SCHEDULES,
        effect="speed",
    )
    microbatch_group_size_per_vp_stage: int | None = opt(
        None,
        "--microbatch-group-size-per-virtual-pipeline-stage",
        help="Micro-batches that a virtual stage takes in a row: as many as there are pipeline stages, or unset.",
        effect="speed",
    )
    account_for_embedding_in_pipeline_split: bool = opt(
        False,
        "--account-for-embedding-in-pipeline-split",
        help="Count the embedding as a layer when layers are shared out to pipeline stages.",
        effect="speed",
    )
    account_for_loss_in_pipeline_split: bool = opt(
        False,
        "--account-for-loss-in-pipeline-split",
        help="Count the loss as a layer when layers are shared out to pipeline stages.",
        effect="speed",
    )
    high_priority_a2a_comm_stream: bool = opt(
        False,
        "--high-priority-a2a-comm-stream",
        refused="all process groups communicate on streams of one priority",
        effect="speed",
    )
    num_layers_in_first_pipeline_stage: int | None = opt(
        None,
        "--decoder-first-pipeline-num-layers",
        help="Layers of the first pipeline process; the others share out the rest.",
        effect="speed",
    )
    num_layers_in_last_pipeline_stage: int | None = opt(
        None,
        "--decoder-last-pipeline-num-layers",
        help="Layers of the last pipeline process; the others share out the rest.",
        effect="speed",
    )
    pipeline_model_parallel_layout: str | None = opt(
        None,
        "--pipeline-model-parallel-layout",
        help="Stages written out, such as Et*3|t*4|tL: E embedding, t layer, L loss, | between stages; (...)*n "
        "repeats.",
        effect="speed",
    )
    virtual_pipeline_model_parallel_size: int | None = opt(
        None,
        "--num-virtual-stages-per-pipeline-rank",
        help="Interleaved pipeline: runs of layers on each pipeline process.",
        effect="speed",
    )
    overlap_p2p_comm: bool = opt(
        True,
        "--no-overlap-p2p-communication",
        negated=True,
        holds=_SCHEDULES,
        effect="speed",
    )
    cp_comm_type: list[Literal["p2p", "all_gather", "a2a", "a2a+p2p"]] = opt(
        ["p2p"],
        "--cp-comm-type",
        holds="keys and values are gathered (all_gather) whatever is asked for; how they travel changes no number",
        effect="speed",
    )


@dataclass(kw_only=True)
class ModelExecution(Section):
    """Recomputation, offloading, CUDA graphs and FP8 layers."""

    cpu_offloading_num_layers: int = opt(
        0, "--cpu-offloading-num-layers", refused="CPU offloading is not supported", effect="speed"
    )
    cpu_offloading_retain_pinned_cpu_buffers: bool = opt(
        False, "--cpu-offloading-retain-pinned-cpu-buffers", refused="CPU offloading is not supported", effect="speed"
    )
    recompute_granularity: Literal["full", "selective"] | None = opt(
        None,
        "--recompute-granularity",
        help="Compute activations again in the backward pass instead of keeping them: whole layers, or the modules "
        "that recompute_modules names.",
        effect="speed",
    )
    recompute_method: Literal["uniform", "block"] | None = opt(
        None,
        "--recompute-method",
        help="With full granularity: uniform keeps the input of every chunk of recompute_num_layers layers; block "
        "recomputes the first recompute_num_layers layers of a stage and keeps all of the others.",
        effect="speed",
    )
    recompute_num_layers: int | None = opt(
        None,
        "--recompute-num-layers",
        help="With full granularity: layers in a chunk (uniform), or layers that are recomputed (block).",
        effect="speed",
    )
    distribute_saved_activations: bool = opt(
        False,
        "--distribute-saved-activations",
        refused="spreading kept activations over ranks is not supported",
        effect="speed",
    )
    recompute_modules: list[str] | None = opt(
        None,
        "--recompute-modules",
        help="With selective granularity: modules that are recomputed, of core_attn, mlp and layernorm; core_attn when "
        "unset.",
        effect="speed",
    )
    fp8_interval: int = opt(1, "--fp8-interval", refused=NARROW_FORMATS)
    fp8_output_proj: bool = opt(
        False,
        "--fp8-output-proj",
        refused=NARROW_FORMATS,
    )
    cuda_graph_warmup_steps: int = opt(
        3,
        "--cuda-graph-warmup-steps",
        holds=OWN_GRAPHS,
        effect="speed",
    )
    cuda_graph_impl: Literal["none", "local", "transformer_engine", "full_iteration"] = opt(
        "none",
        "--cuda-graph-impl",
        holds=OWN_GRAPHS,
        effect="speed",
    )
    cuda_graph_modules: list[str] = opt(
        [],
        "--cuda-graph-modules",
        holds=OWN_GRAPHS,
        effect="speed",
    )
