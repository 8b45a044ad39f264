"""Which samples a data-parallel rank reads in each micro-batch.

Both samplers yield lists of ``micro_batch_size`` sample numbers, starting after ``consumed_samples`` samples of all
ranks together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from lockstep.errors import UserError


@dataclass(frozen=True)
class SequentialSampler:
    """``single``: samples in the order of the dataset, each once; an incomplete last micro-batch is dropped.

    Raises:
        UserError: no whole micro-batch is left.
    """

    total_samples: int
    consumed_samples: int
    micro_batch_size: int
    dp_rank: int = 0
    dp_size: int = 1

    def __post_init__(self) -> None:
        if self.consumed_samples + self.micro_batch_size * self.dp_size > self.total_samples:
            raise UserError(
                f"the dataset has {self.total_samples} samples, {self.consumed_samples} are consumed: too few are left "
                f"for a micro-batch of {self.micro_batch_size} on {self.dp_size} ranks; train for fewer samples or use "
                "--dataloader-type cyclic"
            )

    def __iter__(self) -> Iterator[list[int]]:
        together = self.micro_batch_size * self.dp_size
        offset = self.dp_rank * self.micro_batch_size
        for start in range(self.consumed_samples, self.total_samples - together + 1, together):
            yield list(range(start + offset, start + offset + self.micro_batch_size))


@dataclass(frozen=True)
class CyclicSampler:
    """``cyclic``: each rank's own stretch of the dataset, reshuffled every epoch, without end.

    Raises:
        UserError: fewer samples than one micro-batch of all ranks, or ``consumed_samples`` is not a multiple of it.
    """

    total_samples: int
    consumed_samples: int
    micro_batch_size: int
    dp_rank: int = 0
    dp_size: int = 1

    def __post_init__(self) -> None:
        together = self.micro_batch_size * self.dp_size
        if self.total_samples < together:
            raise UserError(
                f"the dataset has {self.total_samples} samples, fewer than a micro-batch of {self.micro_batch_size} on "
                f"{self.dp_size} ranks; use more data or a smaller micro-batch"
            )
        if self.consumed_samples % self._active % together:
            raise UserError(
                f"{self.consumed_samples} consumed samples do not end on a micro-batch of {together}; resume with the "
                "micro-batch size and number of ranks of the run that consumed them"
            )

    @property
    def _active(self) -> int:
        together = self.micro_batch_size * self.dp_size
        return self.total_samples // together * together

    def __iter__(self) -> Iterator[list[int]]:
        import torch

        epoch, consumed = divmod(self.consumed_samples, self._active)
        bucket = self._active // self.dp_size
        first = self.dp_rank * bucket
        position = consumed // self.dp_size
        while True:
            generator = torch.Generator().manual_seed(epoch)
            order = torch.randperm(bucket, generator=generator).tolist()
            for start in range(position, bucket, self.micro_batch_size):
                yield [first + i for i in order[start : start + self.micro_batch_size]]
            epoch, position = epoch + 1, 0
