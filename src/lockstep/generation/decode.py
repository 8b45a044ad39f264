"""Continuing prompts token by token, in batches.

Shape legend: b batch, q new tokens, s longest prompt of the batch, v vocabulary, h hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.errors import UserError
from lockstep.generation.cache import GrowingSequence
from lockstep.generation.sampling import Sampling, choose
from lockstep.models import GPTModel
from lockstep.models.decoder import head
from lockstep.models.sequence import WholeSequence

_PADDING, _TEXT = 0, 1


@dataclass(frozen=True)
class Completion:
    """What follows a prompt: its tokens, the stop token included, and whether it ended at one."""

    tokens: list[int]
    stopped: bool


@torch.inference_mode()
def generate(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: frozenset[int] = frozenset(),
    sampling: Sampling | None = None,
    vocabulary: int | None = None,
    batch_size: int = 8,
) -> list[Completion]:
    """Return the completion of each prompt.

    Args:
        model: of one process, as `lockstep.generation.load` gives it.
        prompts: token ids, at least one each; those of a batch may differ in length.
        max_new_tokens: of each prompt, at most.
        stop: tokens that end a text.
        sampling: how tokens are chosen; the likeliest when None.
        vocabulary: ids from this one on are never chosen; all may be when None.
        batch_size: prompts at a time. Prompts of about the same length go together.

    Raises:
        UserError: an empty prompt, or one that with its completion is longer than the positions of the model.
    """
    _check(model, prompts, max_new_tokens)
    settings = sampling or Sampling()
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    found: dict[int, Completion] = {}
    for start in range(0, len(by_length), batch_size):
        numbers = by_length[start : start + batch_size]
        batch = _Batch(model, [prompts[number] for number in numbers], max_new_tokens)
        chances = [settings.chance(number) for number in numbers]
        texts: list[list[int]] = [[] for _ in numbers]
        stopped = [False] * len(numbers)
        for _ in range(max_new_tokens):
            chosen = choose(batch.logits()[:, :vocabulary], settings, chances)
            for row, token in enumerate(chosen.tolist()):
                if not stopped[row]:
                    texts[row].append(token)
                    stopped[row] = token in stop
            if all(stopped):
                break
            batch.append(chosen)
        found |= {n: Completion(t, s) for n, t, s in zip(numbers, texts, stopped, strict=True)}
    return [found[number] for number in range(len(prompts))]


def _check(model: GPTModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    rows = model.config.max_position_embeddings
    learned = model.config.position_embedding_type == "learned_absolute"
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise UserError(f"prompt {number} is empty; give at least one token")
        if learned and rows is not None and len(prompt) + max_new_tokens > rows:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, which with {max_new_tokens} new ones is more than the "
                f"{rows} positions of the model; lower --max-new-tokens or shorten the prompt"
            )


class _Batch:
    """Prompts aligned at their ends, with padding before the shorter ones, and what was appended to them."""

    def __init__(self, model: GPTModel, prompts: Sequence[Sequence[int]], room: int):
        longest = max(map(len, prompts))
        device = next(model.parameters()).device
        padding = [longest - len(prompt) for prompt in prompts]
        self._model = model
        self._new = torch.tensor(
            [[0] * before + list(prompt) for before, prompt in zip(padding, prompts, strict=True)], device=device
        )
        self._padding = torch.tensor(padding, device=device)[:, None]  # [b, 1]
        self._any_padding = max(padding) > 0
        self._sequence = GrowingSequence(longest + room)

    def logits(self) -> Tensor:
        """Return the logits [b, v] of the next token, float32."""
        tokens = self._new
        length = self._sequence.length(tokens.shape[1])
        places = torch.arange(length, device=tokens.device) - self._padding
        document_ids = torch.where(places < 0, _PADDING, _TEXT) if self._any_padding else None
        position_ids = places[:, -tokens.shape[1] :].clamp(min=0)
        rotary_positions = position_ids if self._any_padding else None
        model = self._model
        model.sequence, model.head = self._sequence, _last
        try:
            logits: Tensor = model(tokens, position_ids, document_ids=document_ids, rotary_positions=rotary_positions)
        finally:
            model.sequence, model.head = WholeSequence(), head
        self._sequence.grown(tokens.shape[1])
        return logits[:, -1].float()

    def append(self, tokens: Tensor) -> None:
        """Append a token to every row, given them [b]."""
        self._new = tokens[:, None]


def _last(hidden: Tensor, weight: Tensor, labels: Tensor | None) -> Tensor:
    """Return the logits [b, 1, v] after the last of the tokens with hidden states [b, q, h]."""
    return head(hidden[:, -1:], weight, labels)
