"""Deprecated spellings of Megatron-LM flags, and what Megatron-LM makes of them."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spelling:
    """What a deprecated flag stands for.

    Attributes:
        path: the field whose value it gives, when it is another name of that field's flag.
        sets: the values that it stands for otherwise.
        arity: how many values it takes.
        only: the one value that Megatron-LM takes.
        inert: why Megatron-LM does nothing with it.
        yields_to: flags beside which it says nothing.
    """

    path: str = ""
    sets: dict[str, Any] = field(default_factory=dict)
    arity: str = "0"
    only: str = ""
    inert: str = ""
    yields_to: tuple[str, ...] = ()


_NO_EFFECT = "deprecated; Megatron-LM does nothing with it"

SPELLINGS: dict[str, Spelling] = {
    "--encoder-num-layers": Spelling("model.num_layers", arity="1"),
    "--encoder-seq-length": Spelling("model.seq_length", arity="1"),
    "--cuda-graph-scope": Spelling("model.cuda_graph_modules", arity="*"),
    "--moe-router-padding-for-fp8": Spelling(sets={"model.moe_router_padding_for_quantization": True}),
    "--moe-enable-deepep": Spelling(sets={"model.moe_flex_dispatcher_backend": "deepep"}),
    "--moe-layer-recompute": Spelling(
        sets={"model.recompute_granularity": "selective", "model.recompute_modules": ["core_attn", "moe"]}
    ),
    "--enable-cuda-graph": Spelling(sets={"model.cuda_graph_impl": "local"}),
    "--external-cuda-graph": Spelling(sets={"model.cuda_graph_impl": "transformer_engine"}),
    "--no-weight-decay-cond-type": Spelling(
        sets={"optimizer.apply_wd_to_qk_layernorm": True}, arity="1", only="apply_wd_to_qk_layernorm"
    ),
    "--ckpt-fully-parallel-save": Spelling(inert=_NO_EFFECT),
    "--use-dist-ckpt": Spelling(inert=_NO_EFFECT),
    "--dist-ckpt-format": Spelling(arity="1", inert=_NO_EFFECT),
    "--disable-msc": Spelling(inert=_NO_EFFECT),
    "--use-flash-attn": Spelling(sets={"model.attention_backend": "flash"}, yields_to=("--attention-backend",)),
    "--num-layers-per-virtual-pipeline-stage": Spelling(arity="1"),
}

GONE: dict[str, str] = {
    "--batch-size": "Megatron-LM no longer takes it; give --micro-batch-size",
    "--warmup": "Megatron-LM no longer takes it; give --lr-warmup-fraction",
    "--model-parallel-size": "Megatron-LM no longer takes it; give --tensor-model-parallel-size",
    "--checkpoint-activations": "Megatron-LM no longer takes it; give --recompute-activations",
    "--yaml-cfg": "more options are in that file; give them here, or the file with --yaml",
}
"""Flags that Megatron-LM refuses, or that hide other flags, each with its remedy."""
