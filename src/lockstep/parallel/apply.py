"""The one function that lays a single-device model out over the processes of a mesh."""

import torch
from torch import nn

from lockstep.config.model import ModelConfig
from lockstep.config.stages import stage_layers
from lockstep.models import GPTModel
from lockstep.models.attention import SelfAttention
from lockstep.models.decoder import Span
from lockstep.models.mla import MultiLatentAttention
from lockstep.models.mlp import MLP
from lockstep.models.moe import MixtureOfExperts
from lockstep.models.router import Router
from lockstep.parallel.adapters import split_expert_adapters
from lockstep.parallel.context import SequencePart
from lockstep.parallel.experts import GatheringDispatcher, TravellingDispatcher, keep_experts
from lockstep.parallel.fsdp import WeightSharding, shard_weights
from lockstep.parallel.mesh import Mesh
from lockstep.parallel.modules import (
    ColumnParallelLinear,
    RowParallelLinear,
    SequenceParallelTable,
    SequencePartDispatcher,
    SharedByParts,
    SplitExpertsDispatcher,
    VocabParallelHead,
    VocabParallelTable,
)
from lockstep.parallel.plan import Shard, shard_of


def parallelize(model: GPTModel, mesh: Mesh, sharding: WeightSharding | None = None) -> list[Span]:
    """Lay a model of one process out over the mesh, in place; return its stages on this process.

    The model has its adapters, if any, and is on the meta device: afterwards its parameters have the shapes of this
    process's part. In order: pipeline stages drop what is not theirs; the model is told of its part of every sequence;
    every process keeps its experts, and its part of each split weight; attention, MLP, experts, embedding and head are
    told of their part; weights are sharded over the processes that have the same ones, where ``sharding`` says how.
    """
    spans = _keep_stages(model, mesh)
    if mesh.cp.size > 1:
        model.sequence = SequencePart(mesh.cp)
        for module in model.modules():
            if isinstance(module, Router):
                module.sequence = model.sequence
    if mesh.ep.size > 1:
        _share_out_experts(model, mesh)
    if mesh.tp.size > 1:
        halves = Shard(0, blocks=2 if model.config.gated_linear_unit else 1)
        _keep_parts(model, mesh)
        for module in list(model.modules()):
            if isinstance(module, SelfAttention):
                _split_attention(module, mesh)
            elif isinstance(module, MultiLatentAttention):
                _split_latent_attention(module, mesh)
            elif isinstance(module, MLP):
                module.linear_fc1 = ColumnParallelLinear(module.linear_fc1, mesh, halves)
                module.linear_fc2 = RowParallelLinear(module.linear_fc2, mesh)
            elif isinstance(module, MixtureOfExperts):
                kind = SequencePartDispatcher if mesh.whole_experts else SplitExpertsDispatcher
                module.dispatcher = kind(mesh, module.dispatcher)
                split_expert_adapters(module.experts, mesh)
        _split_vocabulary(model, mesh)
    if sharding is not None:
        shard_weights(model, mesh, sharding)
    return spans


def _keep_stages(model: GPTModel, mesh: Mesh) -> list[Span]:
    layers = stage_layers(model.config)
    last = len(layers) - 1
    spans = [Span(layers[i], first=i == 0, last=i == last) for i in range(mesh.pp.rank, len(layers), mesh.pp.size)]
    kept = {number for span in spans for number in span.layers}
    for number in [int(key) for key in model.decoder.layers if int(key) not in kept]:
        del model.decoder.layers[str(number)]
    if not spans[-1].last:
        model.decoder.final_layernorm = None
        model.output_layer = None
    if not spans[0].first:
        assert model.embedding is not None, "the model is whole"
        model.embedding.position_embeddings = None
        if not (spans[-1].last and model.config.share_embeddings_and_output_weights):
            model.embedding = None
    return spans


def _share_out_experts(model: GPTModel, mesh: Mesh) -> None:
    gathers = model.config.moe_token_dispatcher_type == "allgather"
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            keep_experts(module.experts, mesh.ep)
            module.dispatcher = (GatheringDispatcher if gathers else TravellingDispatcher)(mesh.ep)


@torch.no_grad()
def _keep_parts(model: GPTModel, mesh: Mesh) -> None:
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        part = part_of(name, parameter.detach(), model.config, mesh)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(part, requires_grad=parameter.requires_grad))


def part_of(name: str, whole: torch.Tensor, config: ModelConfig, mesh: Mesh) -> torch.Tensor:
    """Return the part of a parameter that tensor parallelism leaves to this process, in memory of its own."""
    shard = shard_of(name, config) if mesh.tp.size > 1 else None
    return whole if shard is None else shard.part(whole, mesh.tp.size, mesh.tp.rank).clone()


def _split_attention(attention: SelfAttention, mesh: Mesh) -> None:
    attention.heads //= mesh.tp.size
    attention.groups //= mesh.tp.size
    attention.linear_qkv = ColumnParallelLinear(attention.linear_qkv, mesh)
    attention.linear_proj = RowParallelLinear(attention.linear_proj, mesh)


def _split_latent_attention(attention: MultiLatentAttention, mesh: Mesh) -> None:
    attention.heads //= mesh.tp.size
    if attention.linear_q_down_proj is None:
        attention.linear_q_proj = ColumnParallelLinear(attention.linear_q_proj, mesh)
    else:
        attention.linear_q_up_proj = ColumnParallelLinear(attention.linear_q_up_proj, mesh)
    attention.linear_kv_up_proj = ColumnParallelLinear(attention.linear_kv_up_proj, mesh)
    attention.shared_key = SharedByParts(mesh)
    attention.linear_proj = RowParallelLinear(attention.linear_proj, mesh)


def _split_vocabulary(model: GPTModel, mesh: Mesh) -> None:
    tables, vocabulary = model.embedding, model.config.vocab_size
    assert vocabulary is not None, "the model config is not resolved"
    first_row = int(torch.arange(vocabulary).tensor_split(mesh.tp.size)[mesh.tp.rank][0])
    if tables is not None:
        tables.word_embeddings = VocabParallelTable(tables.word_embeddings, mesh, first_row)
        if tables.position_embeddings is not None and mesh.sequence_parallel:
            tables.position_embeddings = SequenceParallelTable(tables.position_embeddings, mesh)
    model.head = VocabParallelHead(mesh, vocabulary, first_row)
