from itertools import chain, islice

import pytest

from lockstep.data.samplers import CyclicSampler, SequentialSampler
from lockstep.errors import UserError


def test_sequential_takes_consecutive_samples_and_drops_the_incomplete_end() -> None:
    assert list(SequentialSampler(11, 2, 2)) == [[2, 3], [4, 5], [6, 7], [8, 9]]


def test_sequential_ranks_share_each_stretch() -> None:
    ranks = [list(SequentialSampler(13, 0, 2, rank, 3)) for rank in range(3)]
    assert ranks == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]


def test_sequential_needs_a_whole_micro_batch() -> None:
    with pytest.raises(
        UserError, match=r"has 10 samples, 8 are consumed: too few are left for a micro-batch of 2 on 2"
    ):
        SequentialSampler(10, 8, 2, 0, 2)


def test_cyclic_draws_as_megatron_lm() -> None:
    """Measured on Megatron-LM's sampler: 10 samples, 4 consumed, micro-batches of 2."""
    assert list(islice(CyclicSampler(10, 4, 2), 9)) == [
        [3, 9], [0, 8], [6, 2], [5, 6], [1, 2], [0, 8], [9, 3], [7, 4], [8, 7],
    ]  # fmt: skip


def test_cyclic_reads_every_sample_of_a_bucket_once_an_epoch() -> None:
    for rank in range(2):
        epoch = list(chain.from_iterable(islice(CyclicSampler(13, 0, 3, rank, 2), 2)))
        assert sorted(epoch) == list(range(6 * rank, 6 * rank + 6))


def test_cyclic_goes_on_where_it_stopped() -> None:
    whole = list(islice(CyclicSampler(13, 0, 2, 1, 2), 12))
    for batches in range(8):
        assert list(islice(CyclicSampler(13, 4 * batches, 2, 1, 2), 4)) == whole[batches : batches + 4]


def test_cyclic_refuses_too_little_data_and_odd_positions() -> None:
    with pytest.raises(UserError, match="has 3 samples, fewer than a micro-batch of 2 on 2 ranks"):
        CyclicSampler(3, 0, 2, 0, 2)
    with pytest.raises(UserError, match="5 consumed samples do not end on a micro-batch of 4"):
        CyclicSampler(20, 5, 2, 0, 2)
