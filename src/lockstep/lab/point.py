"""One iteration, as a side of a comparison tells of it."""

from dataclasses import dataclass

EvaluationKey = tuple[int, str, bool]
"""Iteration, split, and whether the evaluation was made after training."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a side tells of one iteration, or of the iterations ``start`` to ``iteration`` that one line averages.

    ``lr`` is the learning rate that the iteration's update used, ``next_lr`` that of the following one; the rest
    belongs to the last iteration. None where the side does not tell. ``averaged`` marks a loss that was averaged over
    several lines of the side.
    """

    iteration: int
    start: int
    lm_loss: float | None
    grad_norm: float | None = None
    lr: float | None = None
    next_lr: float | None = None
    weight_decay: float | None = None
    loss_scale: float | None = None
    consumed_samples: int | None = None
    consumed_tokens: int | None = None
    global_batch_size: int | None = None
    valid_tokens: int | None = None
    batch_hash: str | None = None
    skipped: bool | None = None
    averaged: bool = False
