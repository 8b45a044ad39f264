"""The choice of the next token from its logits.

Shape legend: b batch, v vocabulary.
"""

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from lockstep.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest at a temperature of 0, else by chance.

    Attributes:
        temperature: divides the logits.
        top_k: only so many of the likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together have this probability, the one that reaches it included.
        seed: together with the number of the prompt it fixes the text, whatever else is in the batch.

    Raises:
        UserError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"a temperature of {self.temperature} is below 0; 0 takes the likeliest token")
        if self.top_k < 0:
            raise UserError(f"top-k of {self.top_k} is below 0; 0 leaves all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p of {self.top_p} is not above 0 and up to 1; 1 leaves all tokens")

    def chance(self, prompt: int) -> Random:
        """Return the random numbers of a prompt, by its number."""
        return Random(f"{self.seed} {prompt}")


def ranked(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return tokens [b, v] from the likeliest on and their probabilities, float64, which are 0 for those left out."""
    scores, tokens = (logits.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        scores[:, sampling.top_k :] = -torch.inf
    shares = scores.softmax(dim=-1)
    before = shares.cumsum(dim=-1) - shares
    shares = shares.masked_fill(before >= sampling.top_p, 0.0) if sampling.top_p < 1 else shares
    return tokens, shares / shares.sum(dim=-1, keepdim=True)


def choose(logits: Tensor, sampling: Sampling, chances: list[Random]) -> Tensor:
    """Return the next token [b] for logits [b, v]; each row draws one number of its own chance."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    tokens, shares = ranked(logits, sampling)
    drawn = torch.tensor([[chance.random()] for chance in chances], dtype=shares.dtype, device=shares.device)
    places = (shares.cumsum(dim=-1) <= drawn).sum(dim=-1, keepdim=True)
    last = (shares > 0).sum(dim=-1, keepdim=True) - 1  # where rounding leaves the sum below the number drawn
    return tokens.gather(-1, torch.minimum(places, last)).squeeze(-1)
