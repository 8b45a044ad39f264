"""The one function that lays a single-device model out over the processes of a mesh."""

import torch
from torch import nn

from lockstep.models import GPTModel
from lockstep.models.attention import SelfAttention
from lockstep.models.mlp import MLP
from lockstep.parallel.mesh import Mesh
from lockstep.parallel.modules import (
    ColumnParallelLinear,
    RowParallelLinear,
    SequenceParallelTable,
    VocabParallelHead,
    VocabParallelTable,
)
from lockstep.parallel.plan import shard_of


def parallelize(model: GPTModel, mesh: Mesh) -> GPTModel:
    """Lay the model out over the mesh, in place, and return it.

    The model comes with the initial weights of one process, equal on all. In order: every process keeps its part of
    each split weight; attention, MLP, embedding and head are told of their part.
    """
    if mesh.tp.size > 1:
        _keep_parts(model, mesh)
        for module in list(model.modules()):
            if isinstance(module, SelfAttention):
                _split_attention(module, mesh)
            elif isinstance(module, MLP):
                module.linear_fc1 = ColumnParallelLinear(module.linear_fc1, mesh)
                module.linear_fc2 = RowParallelLinear(module.linear_fc2, mesh)
        _split_vocabulary(model, mesh)
    return model


@torch.no_grad()
def _keep_parts(model: GPTModel, mesh: Mesh) -> None:
    for name, parameter in list(model.named_parameters()):
        shard = shard_of(name, model.config)
        if shard is not None:
            owner, _, leaf = name.rpartition(".")
            part = shard.part(parameter.detach(), mesh.tp.size, mesh.tp.rank).clone()
            setattr(model.get_submodule(owner), leaf, nn.Parameter(part))


def _split_attention(attention: SelfAttention, mesh: Mesh) -> None:
    attention.heads //= mesh.tp.size
    attention.groups //= mesh.tp.size
    attention.linear_qkv = ColumnParallelLinear(attention.linear_qkv, mesh)
    attention.linear_proj = RowParallelLinear(attention.linear_proj, mesh)


def _split_vocabulary(model: GPTModel, mesh: Mesh) -> None:
    tables, vocabulary = model.embedding, model.config.vocab_size
    assert vocabulary is not None, "the model config is not resolved"
    first_row = int(torch.arange(vocabulary).tensor_split(mesh.tp.size)[mesh.tp.rank][0])
    tables.word_embeddings = VocabParallelTable(tables.word_embeddings, mesh, first_row)
    if tables.position_embeddings is not None and mesh.sequence_parallel:
        tables.position_embeddings = SequenceParallelTable(tables.position_embeddings, mesh)
    model.head = VocabParallelHead(mesh, vocabulary, first_row)
