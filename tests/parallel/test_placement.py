"""Placement: the boxes of all processes are the whole tensor, each element once, and views show the right elements."""

import itertools
import math

import pytest
import torch

from lockstep.config import ConfigContainer
from lockstep.parallel import Axis, Mesh
from lockstep.parallel.placement import Box, Placement, place, stretch_boxes
from lockstep.parallel.plan import Shard, shard_of


def test_a_stretch_is_cut_into_boxes_of_rests_and_whole_rows() -> None:
    assert stretch_boxes((4, 5), 3, 17) == [Box((0, 3), (1, 2)), Box((1, 0), (2, 5)), Box((3, 0), (1, 2))]
    assert stretch_boxes((4, 5), 6, 8) == [Box((1, 1), (1, 2))]
    assert stretch_boxes((7,), 2, 5) == [Box((2,), (3,))]
    assert stretch_boxes((4, 5), 5, 5) == []


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
def test_every_stretch_is_covered_in_order(shape) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    for begin, end in itertools.combinations(range(whole.numel() + 1), 2):
        boxes = stretch_boxes(shape, begin, end)
        found = torch.cat([_cut(whole, box).flatten() for box in boxes])
        assert found.tolist() == list(range(begin, end))


@pytest.mark.parametrize(
    ("shape", "shard", "size"),
    [
        ((11, 3), Shard(0), 4),
        ((3, 8), Shard(1), 2),
        ((8, 3), Shard(0, blocks=2), 2),
        ((12,), Shard(0, blocks=2), 3),
        ((5, 4), None, 1),
    ],
)
@pytest.mark.parametrize("pieces", [1, 2, 3, 5])
def test_the_parts_of_all_processes_are_the_whole_tensor(shape, shard, size, pieces) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    found = torch.full(shape, -1)
    for rank in range(size):
        part = whole if shard is None else shard.part(whole, size, rank)
        # Pieces lie in one long tensor behind others, as an optimizer's do.
        flat = torch.cat([torch.full((2,), -5), part.flatten()])[2:]
        cuts = [part.numel() * cut // pieces for cut in range(pieces + 1)]
        for span in itertools.pairwise(cuts):
            placed = place(flat[slice(*span)], shape, shard, size, rank, span)
            assert sum(math.prod(piece.box.sizes) for piece in placed.pieces) == span[1] - span[0]
            for held in (placed, placed.on_host()):
                for piece in held.pieces:
                    target = _cut(found, piece.box)
                    assert held is not placed or (target == -1).all(), "an element is placed twice"
                    target.copy_(held.view(piece.box.offsets))
        assert len(place(part.contiguous(), shape, shard, size, rank).pieces) == (shard.blocks if shard else 1)
    assert torch.equal(found, whole)


def test_a_view_can_be_filled_in_place() -> None:
    memory = torch.zeros(12)
    placed = place(memory[2:9], (4, 5), None, 1, 0, (3, 10))
    for piece in placed.pieces:
        placed.view(piece.box.offsets).fill_(1.0)
    assert memory.tolist() == [0.0] * 2 + [1.0] * 7 + [0.0] * 3


def _cut(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))]


@pytest.mark.parametrize("replicated", [True, False])
def test_every_parameter_is_written_by_one_process_of_those_that_have_it(replicated) -> None:
    config = ConfigContainer().model
    for name, value in {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 5}.items():
        setattr(config, name, value)
    for name, value in {"ffn_hidden_size": 8, "kv_channels": 4, "num_query_groups": 2, "seq_length": 8}.items():
        setattr(config, name, value)
    config.max_position_embeddings = 8
    tied = "embedding.word_embeddings.weight"
    writers: dict[str, list[tuple[int, int, int]]] = {}
    for tp, replica, end in itertools.product(range(2), range(3), range(2)):
        mesh = Mesh(tp=Axis(2, tp), replicas=Axis(3, replica), pp=Axis(2, end), ends=Axis(2, end))
        placement = Placement(config, mesh)
        sizes = {name: math.prod(shape) for name, shape in placement.shapes.items() if name == tied or end == 0}
        for name in placement.written(sizes, str, replicated=replicated):
            writers.setdefault(name, []).append((tp, replica, end))
    assert set(writers) == set(placement.shapes)
    for name, places in writers.items():
        parts = 2 if shard_of(name, config) is not None else 1
        assert len({tp for tp, _, _ in places}) == parts, name
        assert len(places) == parts * (1 if replicated else 3), name
        assert {end for _, _, end in places} == {0}, name
    assert not replicated or len({replica for places in writers.values() for _, replica, _ in places}) == 3
