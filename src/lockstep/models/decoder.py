"""The decoder-only transformer.

Parameters have the names Megatron-core gives them in its local implementation.

Shape legend: b batch, s sequence, h hidden, v vocabulary (padded), q queries: tokens that the model works on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lockstep.config.experts import expert_layers
from lockstep.config.model import ModelConfig
from lockstep.models.attention import AttentionContext, SelfAttention
from lockstep.models.cross_entropy import linear_cross_entropy
from lockstep.models.dropout import DropoutStreams, bias_dropout_add, dropout
from lockstep.models.layers import Linear, Table, required
from lockstep.models.mask import CausalMask
from lockstep.models.mla import MultiLatentAttention
from lockstep.models.mlp import MLP
from lockstep.models.moe import MixtureOfExperts
from lockstep.models.norms import Norm
from lockstep.models.ops import linear
from lockstep.models.positions import latent_cos_sin, rotary_cos_sin
from lockstep.models.recompute import rebuilt_for_backward, recomputed, recomputed_chunks, recomputes
from lockstep.models.router import RouterLosses
from lockstep.models.sequence import WholeSequence

_Block = Callable[[Tensor], tuple[Tensor, Tensor | None]]

Head = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Span:
    """A run of layers, by their numbers; the embedding comes before it where it is first, the head after the last."""

    layers: range
    first: bool = True
    last: bool = True


class GPTModel(nn.Module):
    """Embedding, decoder layers, final norm and output layer. `train()` and `eval()` decide about dropout.

    The config must be resolved. Parameters hold no sensible values until `lockstep.models.init` has drawn them.
    A model that was cut to some spans of its layers lacks the modules that these do not need; `forward_span` runs one.
    """

    embedding: "Embedding | None"

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.config = config
        self.dtype = dtype  # of the residual stream; weights may be stored with more digits
        self.embedding = Embedding(config, dtype=dtype, device=device)
        self.decoder = Decoder(config, dtype=dtype, device=device)
        self.head: Head = head
        self.sequence = WholeSequence()
        self.output_layer: Linear | None = None
        if not config.share_embeddings_and_output_weights:
            hidden, vocab = required(config.hidden_size), required(config.vocab_size)
            self.output_layer = Linear(hidden, vocab, bias=False, dtype=dtype, device=device)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        labels: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        rotary_positions: Tensor | None = None,
        dropout: DropoutStreams | None = None,
        router_losses: RouterLosses | None = None,
        span: Span | None = None,
    ) -> Tensor:
        """Return the float32 loss of each token [b, s], or the logits [b, s, v] if there are no labels.

        tokens, position_ids, labels, document_ids and rotary_positions are int64 [b, s]. Attention sees earlier tokens
        of the same document id, or all earlier tokens. position_ids select learned positions; rotary positions count
        from the start of the sequence unless rotary_positions are given. A training model with dropout needs its random
        streams (ValueError). What routers add to the loss goes through router_losses; without it they add nothing. With
        a span this is `forward_span`.
        """
        span = span or Span(range(required(self.config.num_layers)))
        return self.forward_span(
            span,
            tokens,
            position_ids,
            labels,
            document_ids=document_ids,
            rotary_positions=rotary_positions,
            dropout=dropout,
            router_losses=router_losses,
        )

    def forward_span(
        self,
        span: Span,
        x: Tensor,
        position_ids: Tensor,
        labels: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        rotary_positions: Tensor | None = None,
        dropout: DropoutStreams | None = None,
        router_losses: RouterLosses | None = None,
    ) -> Tensor:
        """Return what `forward` returns where the span is last, else the residual stream [b, s, h] after it.

        x is the tokens [b, s] where the span is first, else the residual stream before it. Where the model works on
        some tokens of the sequence only, all are of those, but document_ids are of the whole sequence.
        """
        if self.training and dropout is None and max(self.config.hidden_dropout, self.config.attention_dropout) > 0:
            raise ValueError("a model with dropout needs random streams to train: pass dropout=DropoutStreams(...)")
        streams = dropout if self.training else None
        if span.first:
            assert self.embedding is not None, "the first span has the embedding"
            x = self.embedding(x, position_ids, streams)
        length = self.sequence.length(position_ids.shape[1])
        mask = CausalMask(length, x.device, document_ids, self.sequence)
        context = AttentionContext(
            mask,
            self._cos_sin(mask.positions if rotary_positions is None else rotary_positions, x),
            streams,
            self.sequence,
            router_losses,
        )
        x = self.decoder(x, context, span.layers, normalise=span.last)
        return self.head(x, self.output_weight, labels) if span.last else x

    @property
    def output_weight(self) -> Tensor:
        """The weight [v, h] that turns hidden states into logits."""
        if self.output_layer is not None:
            return self.output_layer.weight
        assert self.embedding is not None, "a tied output layer shares the word embeddings"
        return self.embedding.word_embeddings.weight

    def _cos_sin(self, positions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.config.multi_latent_attention:
            return latent_cos_sin(self.config, positions, hidden.dtype)
        if self.config.position_embedding_type != "rope":
            return None
        return rotary_cos_sin(self.config, positions, hidden.dtype)


def head(hidden: Tensor, weight: Tensor, labels: Tensor | None) -> Tensor:
    """Return the loss of each token [b, s] for hidden states [b, s, h], or without labels the logits [b, s, v]."""
    if labels is None:
        return linear(hidden, weight)
    return linear_cross_entropy(hidden, weight, labels)


class Embedding(nn.Module):
    """Word embeddings plus learned positions, if any, then dropout."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        hidden = required(config.hidden_size)
        self.dropout_probability = config.hidden_dropout
        self.word_embeddings = Table(required(config.vocab_size), hidden, dtype=dtype, device=device)
        self.position_embeddings: Table | None = None
        if config.position_embedding_type == "learned_absolute":
            rows = required(config.max_position_embeddings)
            self.position_embeddings = Table(rows, hidden, dtype=dtype, device=device)

    def forward(self, tokens: Tensor, position_ids: Tensor, streams: DropoutStreams | None) -> Tensor:
        """Return the embeddings [b, s, h] of tokens and position_ids [b, s]."""
        hidden = self.word_embeddings(tokens)
        if self.position_embeddings is not None:
            hidden = hidden + self.position_embeddings(position_ids)
        return dropout(hidden, _mask(streams, "embedding", hidden, self.dropout_probability), self.dropout_probability)


class Decoder(nn.Module):
    """The layers, by number, and the final norm."""

    final_layernorm: Norm | None

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.config = config
        # A mapping, so that a layer keeps its name where others are cut away.
        self.layers = nn.ModuleDict(
            {
                str(number): Layer(config, number, has_experts, dtype=dtype, device=device)
                for number, has_experts in enumerate(expert_layers(config))
            }
        )
        self.final_layernorm = Norm(config, required(config.hidden_size), dtype=dtype, device=device)

    def forward(self, hidden: Tensor, context: AttentionContext, layers: range, normalise: bool) -> Tensor:
        """Return the hidden states [b, s, h] after some layers, normalised where asked for."""
        for chunk, again in recomputed_chunks(self.config, layers):
            if again and self.training:
                hidden = recomputed(self._through, chunk, hidden, context, streams=context.streams)
            else:
                hidden = self._through(chunk, hidden, context)
        if not normalise:
            return hidden
        assert self.final_layernorm is not None, "the last span has the final norm"
        return self.final_layernorm(hidden)

    def _through(self, chunk: Sequence[int], hidden: Tensor, context: AttentionContext) -> Tensor:
        for number in chunk:
            hidden = self.layers[str(number)](hidden, context)
        return hidden


class Layer(nn.Module):
    """Attention and MLP, each on normalised input and added to the residual stream.

    A layer with experts has them in the place of the MLP. Numbers count from 0 over the whole model.
    """

    def __init__(
        self, config: ModelConfig, number: int, has_experts: bool, *, dtype: torch.dtype, device: torch.device
    ):
        super().__init__()
        hidden = required(config.hidden_size)
        self.dropout_probability = config.hidden_dropout
        self.residual_is_norm_output = config.apply_residual_connection_post_layernorm
        self.input_layernorm = Norm(config, hidden, dtype=dtype, device=device)
        attention = MultiLatentAttention if config.multi_latent_attention else SelfAttention
        self.self_attention: nn.Module = attention(config, number, dtype=dtype, device=device)
        self.pre_mlp_layernorm = Norm(config, hidden, dtype=dtype, device=device)
        self.mlp: MLP | MixtureOfExperts
        if has_experts:
            self.mlp = MixtureOfExperts(config, number, dtype=dtype, device=device)
        else:
            self.mlp = MLP(config, dtype=dtype, device=device)
        self.recompute_norms = recomputes(config, "layernorm")
        self.recompute_mlp = recomputes(config, "moe" if has_experts else "mlp")

    def forward(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """Return the residual stream [b, s, h] after this layer."""
        hidden = self.attend(hidden, context)
        if self.recompute_mlp and self.training:
            output, bias, normalised = self._recomputed_mlp(self._mlp(context), hidden, context.streams)
        else:
            output, bias, normalised = self._normalised_and(self._mlp(context), self.pre_mlp_layernorm, hidden)
        return self._added(output, bias, hidden, normalised, context.streams)

    def attend(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """Return the residual stream [b, s, h] after attention."""
        output, bias, normalised = self._normalised_and(
            lambda x: self.self_attention(x, context), self.input_layernorm, hidden
        )
        return self._added(output, bias, hidden, normalised, context.streams)

    def _mlp(self, context: AttentionContext) -> _Block:
        if isinstance(self.mlp, MLP):
            return self.mlp
        return partial(self.mlp, losses=context.router_losses)

    def _normalised_and(self, block: _Block, norm: Norm, hidden: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return a block's output [b, s, h] and bias for the norm of hidden [b, s, h], and that norm."""
        if not (self.recompute_norms and self.training):
            normalised = norm(hidden)
            return *block(normalised), normalised
        normalised = recomputed(norm, hidden)
        if torch.compiler.is_compiling():  # which keeps nothing that is marked so, whoever uses it
            return *block(normalised), normalised
        with rebuilt_for_backward(normalised, lambda: norm(hidden)):
            return *block(normalised), normalised

    def _recomputed_mlp(
        self, mlp: _Block, hidden: Tensor, streams: DropoutStreams | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the same for the MLP, which keeps its input only, or the input of its norm if that is not kept."""

        def both(x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
            normalised = self.pre_mlp_layernorm(x)
            return *mlp(normalised), normalised

        if self.recompute_norms:
            return recomputed(both, hidden, streams=streams)
        normalised = self.pre_mlp_layernorm(hidden)
        return *recomputed(mlp, normalised, streams=streams), normalised

    def _added(
        self, output: Tensor, bias: Tensor | None, stream: Tensor, normalised: Tensor, streams: DropoutStreams | None
    ) -> Tensor:
        residual = normalised if self.residual_is_norm_output else stream
        dropped = _mask(streams, "hidden", output, self.dropout_probability)
        return bias_dropout_add(output, bias, residual, dropped, self.dropout_probability)


def _mask(streams: DropoutStreams | None, name: str, like: Tensor, probability: float) -> Tensor | None:
    if streams is None or probability == 0:
        return None
    return streams.dropped(name, tuple(like.shape), probability)
