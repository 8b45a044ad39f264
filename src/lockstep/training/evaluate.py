"""Evaluation on the validation and test splits."""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch

from lockstep.parallel import Axis
from lockstep.training.feed import Feed, in_global_order
from lockstep.training.passes import Passes
from lockstep.training.result import Evaluation

Split = Literal["valid", "test"]


def perplexity(loss: float) -> float:
    """Return exp(loss), with losses above 20 counted as 20."""
    return math.exp(min(20.0, loss))


class Evaluator:
    """Evaluates a model on ``eval_iters`` batches at a time; each evaluation goes on where the split's last one ended.

    ``passes`` run the model. ``size`` is the number of samples of a batch, ``micro_size`` of a forward pass; the
    processes of ``dp`` share them out.
    """

    def __init__(
        self,
        passes: Passes,
        feeds: dict[Split, Feed],
        *,
        eval_iters: int,
        size: int,
        micro_size: int,
        device: torch.device,
        out_of_time: Callable[[], bool] = lambda: False,
        dp: Axis | None = None,
    ) -> None:
        self._passes = passes
        self._feeds = feeds
        self._size = size
        self._micro_size = micro_size
        self._device = device
        self._out_of_time = out_of_time
        self._dp = dp or Axis()
        self.eval_iters = eval_iters

    @property
    def splits(self) -> list[Split]:
        """The splits there is data for, in the order they are evaluated after training."""
        return list(self._feeds)

    @property
    def taken(self) -> dict[Split, int]:
        """Samples that the evaluations of each split have taken so far."""
        return {split: feed.taken for split, feed in self._feeds.items()}

    def seek(self, taken: Mapping[Split, int]) -> None:
        """Go on after so many samples of each split; a split that ``taken`` lacks starts at its first."""
        for split, feed in self._feeds.items():
            feed.seek(taken.get(split, 0))

    @property
    def samples(self) -> int:
        """Samples of one evaluation."""
        return self.eval_iters * self._size

    def evaluate(
        self, split: Split, iteration: int, final: bool, progress: Callable[[int], None] = lambda batch: None
    ) -> Evaluation | None:
        """Return the mean loss per token over the next batches of a split; None when the time of the run is over.

        ``progress`` is told the number of each batch, from 1.
        """
        losses: list[float] = []
        tokens: list[float] = []
        for number in range(1, self.eval_iters + 1):
            progress(number)
            for loss_sum, count in self._batch(self._feeds[split]):
                losses.append(loss_sum)
                tokens.append(count)
            if self._out_of_time():
                return None
        total = sum(tokens)
        loss = sum(losses) / total if total else math.nan
        return Evaluation(iteration, split, final, loss, perplexity(loss), self.samples)

    def _batch(self, feed: Feed) -> list[list[float]]:
        """Return the loss sum and valid tokens of each forward pass of the next batch."""
        batch = feed.next(self._size // self._micro_size // self._dp.size).to(self._device)
        return in_global_order(self._passes.evaluate(batch, self._micro_size), self._dp).tolist()
