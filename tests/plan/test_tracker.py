import gc

import pytest
import torch

from lockstep.plan.tracker import PARTS, MemoryTracker, OverLimit, block_bytes

META = torch.device("meta")
MIB = 1 << 20


def test_blocks_are_rounded_as_the_allocator_rounds_them() -> None:
    assert block_bytes(0) == 0
    assert block_bytes(1) == 512
    assert block_bytes(1024) == 1024
    assert block_bytes(3 * MIB) == 3 * MIB
    assert block_bytes(11 * MIB + 1) == 12 * MIB  # the rest of 1 MiB and less stays with the block
    assert block_bytes(10 * MIB + 512) == 10 * MIB + 512  # a larger rest is handed on


def test_memory_is_counted_while_it_lives() -> None:
    with MemoryTracker() as tracker:
        first = torch.empty(1024, device=META)
        view = first.view(32, 32)
        second = first + 1
        assert tracker.peak_bytes == 2 * 4096
        del second
        third = view * 2
        del first, view, third
        assert tracker.peak_bytes == 2 * 4096
        assert sum(tracker.present.values()) == 0


def test_what_the_backward_pass_needs_lives_until_then() -> None:
    with MemoryTracker() as tracker:
        x = torch.empty(1024, device=META, requires_grad=True)
        y = x.exp()
        loss = y.sin().sum()
        del y
        assert sum(tracker.present.values()) >= 2 * 4096
        loss.backward()
        del loss
        assert sum(tracker.present.values()) == 2 * 4096  # x and its gradient


def test_parts() -> None:
    with MemoryTracker() as tracker:
        tracker.reserve("workspace", 100)
        with tracker.during("logits", "head"):
            whole = torch.empty(1024, device=META)
        whole.add_(1)
        assert tracker.present["logits"] == 4096
        assert tracker.peak_moment == "head"
        tracker.assign(whole[:256], "experts")
        tracker.assign(whole[:256], "experts")
        assert tracker.present["logits"] == 3072
        assert tracker.present["experts"] == 1024
        assert set(tracker.present) == set(PARTS)
        del whole
        assert tracker.present["experts"] == tracker.present["logits"] == 0
        assert tracker.peak_bytes == 4196
        assert sum(tracker.peak_parts.values()) == 4196
        assert tracker.highest["experts"] == 1024


def test_a_small_tensor_moves_with_what_its_block_was_rounded_up_by() -> None:
    with MemoryTracker() as tracker:
        bias = torch.empty(3, device=META)
        tracker.assign(bias, "weights")
        assert tracker.present == dict.fromkeys(PARTS, 0) | {"weights": 512}


def test_the_host_reads_ones() -> None:
    with MemoryTracker():
        x = torch.empty(2, 3, device=META)
        assert x.sum().item() == 1.0
        assert x.tolist() == [[1.0] * 3] * 2
        assert (x > 0).nonzero().shape == (6, 2)
        assert torch.ones(2).tolist() == [1.0, 1.0]


def test_too_much_is_told_at_once() -> None:
    with pytest.raises(OverLimit), MemoryTracker(limit=8192):
        kept = [torch.empty(1024, device=META) for _ in range(3)]
    with MemoryTracker(limit=8192):
        kept = [torch.empty(1024, device=META) for _ in range(2)]
    del kept
    gc.collect()
