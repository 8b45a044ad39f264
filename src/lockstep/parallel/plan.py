"""Which parameter is split how: sharding as data, by parameter name.

A parameter that no row names is whole on every process.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from lockstep.config.experts import has_whole_experts
from lockstep.config.model import ModelConfig


@dataclass(frozen=True)
class Shard:
    """A parameter split along ``dim``, within each of ``blocks`` equal blocks; parts may differ by one row."""

    dim: int
    blocks: int = 1

    def part(self, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        """Return the part of one of ``size`` processes."""
        pieces = [block.tensor_split(size, self.dim)[rank] for block in whole.chunk(self.blocks, self.dim)]
        rows = [piece.shape[self.dim] for piece in pieces]
        part = whole.new_empty((*whole.shape[: self.dim], sum(rows), *whole.shape[self.dim :][1:]))
        # torch.cat would import PyTorch's compiler where the tensors are on the meta device.
        for place, piece in zip(part.split(rows, self.dim), pieces, strict=True):
            place.copy_(piece)
        return part

    def whole(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Put the parts of all processes, in their order, together again."""
        pieces = [part.chunk(self.blocks, self.dim) for part in parts]
        return torch.cat([pieces[rank][block] for block in range(self.blocks) for rank in range(len(parts))], self.dim)


ROWS = Shard(0)
WORD_EMBEDDINGS = "embedding.word_embeddings.weight"

_SPLIT: tuple[tuple[str, Shard | None], ...] = (
    # Adapters: of linears whose inputs are split the first matrix is, of those whose outputs are the second.
    ("*.linear_proj.adapter.*.linear_in.weight", Shard(1)),
    ("*.linear_fc2.adapter.*.linear_in.weight", Shard(1)),
    ("*.linear_proj.adapter.*", None),
    ("*.linear_fc2.adapter.*", None),
    ("*.adapter.*.linear_in.weight", None),
    (WORD_EMBEDDINGS, Shard(0)),
    ("output_layer.weight", Shard(0)),
    # Rows of the projection lie group by group, so that a split into runs of rows is one into query groups.
    ("*.linear_qkv.*", Shard(0)),
    # Those of multi-latent attention lie head by head; its latents are whole on every process.
    ("*.linear_q_proj.*", Shard(0)),
    ("*.linear_q_up_proj.*", Shard(0)),
    ("*.linear_kv_up_proj.*", Shard(0)),
    ("*.linear_proj.weight", Shard(1)),
    ("*.linear_fc1.*", Shard(0)),
    ("*.linear_fc2.weight", Shard(1)),
)

_EXPERTS = "*.mlp.experts.local_experts.*"
# Norms of single heads: every process has some of the heads.
_OF_HEADS = ("*.q_layernorm.*", "*.k_layernorm.*")
# What multi-latent attention does to the residual stream before its heads part.
_OF_LATENTS = ("*.linear_q_down_proj.*", "*.linear_kv_down_proj.*", "*.q_layernorm.*", "*.kv_layernorm.*")
# Parameters used where the residual stream is split along the sequence.
_OF_SEQUENCE = (
    "embedding.position_embeddings.weight",
    "*.input_layernorm.*",
    "*.pre_mlp_layernorm.*",
    "*.final_layernorm.*",
    "*.linear_proj.bias",
    "*.linear_fc2.bias",
    "*.shared_experts.gate_weight",
    "*.linear_qkv.adapter.*.linear_in.weight",
    "*.linear_q_proj.adapter.*.linear_in.weight",
    "*.linear_q_up_proj.adapter.*.linear_in.weight",
    "*.linear_kv_up_proj.adapter.*.linear_in.weight",
    "*.linear_fc1.adapter.*.linear_in.weight",
)
# Whole parts of adapters between parts of a linear.
_OF_SPLIT_LINEARS = (
    "*.linear_proj.adapter.*.linear_out.weight",
    "*.linear_proj.adapter.*.magnitude",
    "*.linear_fc2.adapter.*.linear_out.weight",
    "*.linear_fc2.adapter.*.magnitude",
    "*.mlp.experts.*linear_fc1.adapter.*.linear_in.weight",
)


def shard_of(name: str, config: ModelConfig) -> Shard | None:
    """Return how tensor parallelism splits a parameter; None where it stays whole."""
    if is_expert(name) and has_whole_experts(config):
        return None
    for pattern, shard in _SPLIT:
        if fnmatchcase(name, pattern):
            # The rows of a gated MLP are those of its gate and of the rest, unless an adapter is of one of them.
            gated = config.gated_linear_unit and ".linear_fc1." in name and ".adapter.linear_fc1_" not in name
            return Shard(shard.dim, blocks=2) if gated and shard is not None else shard
    return None


def is_expert(name: str) -> bool:
    """Tell whether a parameter is one of the experts that expert parallelism shares out."""
    return fnmatchcase(name, _EXPERTS)


def has_partial_gradient(name: str, config: ModelConfig, sequence_parallel: bool) -> bool:
    """Tell whether each tensor-parallel process finds only its part of the gradient of a whole parameter."""
    latent = config.multi_latent_attention
    of_sequence = _OF_SEQUENCE + (_OF_LATENTS if latent else ())
    patterns = _OF_SPLIT_LINEARS + (() if latent else _OF_HEADS) + (of_sequence if sequence_parallel else ())
    return any(fnmatchcase(name, pattern) for pattern in patterns)
