"""Even loads by scaling: the choice of experts of S-BASE routing (Clark et al., 2022, "Unified Scaling Laws for Routed
Language Models"), with the constants of Megatron-LM.

Shape legend: t tokens that the model works on, e experts.
"""

import torch
from torch import Tensor

from lockstep.models.sequence import WholeSequence

TOLERANCE = 1e-4
_NO_DIVISION_BY_ZERO = 1e-8


@torch.no_grad()
def evened(logits: Tensor, sequence: WholeSequence) -> Tensor:
    """Return exp(logits) [t, e] with rows and columns scaled until all tokens, and all experts, sum up alike.

    Rows are the tokens of this model; the sums of an expert go over those of whole sequences. Scaling ends when the
    factors of the experts move by less than ``TOLERANCE`` in the mean, which the host has to be told each time.
    """
    scores = torch.exp(logits)
    tokens, experts = scores.shape[0] * sequence.parts, scores.shape[1]
    of_experts = torch.ones_like(scores[0])
    moved = float("inf")
    while moved > TOLERANCE:
        of_tokens = 1 / (tokens * ((scores * of_experts).sum(dim=1) + _NO_DIVISION_BY_ZERO))
        sums = sequence.total((scores * of_tokens[:, None]).sum(dim=0))
        before, of_experts = of_experts, 1 / (experts * (sums + _NO_DIVISION_BY_ZERO))
        moved = 0.0 if scores.is_meta else float((before - of_experts).abs().mean())
    return scores * of_experts * of_tokens[:, None]
