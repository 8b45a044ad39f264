"""Context parallelism beside the sweep: losses, documents, positions, low precision, dropout masks."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from lockstep.models import DropoutStreams
from lockstep.parallel.context import SequencePart
from lockstep.parallel.dropout import LayoutDropoutStreams
from lockstep.parallel.mesh import Axis, Mesh, build_mesh
from lockstep.training.feed import Batch
from lockstep.training.setup import build_parallel_model, build_passes
from tests.parallel import sweep
from tests.parallel.spawn import on_processes

CPU = torch.device("cpu")
_ROTARY = {
    "model.position_embedding_type": "rope",
    "model.rotary_interleaved": True,
    "model.rope_scaling": True,
    "model.seq_len_interpolation_factor": 2,
}
_MODELS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "learned": ({}, torch.float64),
    "rotary": (_ROTARY, torch.float64),
    "bf16": ({"mixed_precision.bf16": True}, torch.bfloat16),
}


def _with_documents(batch: Batch) -> Batch:
    """Cut every sample into two documents, each with positions of its own."""
    length = batch.tokens.shape[1]
    starts = torch.arange(len(batch))[:, None] % (length - 2) + 1
    places = torch.arange(length).expand(len(batch), length)
    second = places >= starts
    positions = torch.where(second, places - starts, places)
    return replace(batch, document_ids=second.long(), position_ids=positions, rotary_positions=positions)


def _sums(changes: dict[str, Any], dtype: torch.dtype, processes: int) -> dict[str, torch.Tensor]:
    """Return what passes of training and of evaluation report, and the gradient."""
    config = sweep.configure({**changes, "model.context_parallel_size": processes}, processes)
    mesh = build_mesh(config.model, "cpu") if processes > 1 else Mesh()
    model, spans, _ = build_parallel_model(config, mesh, CPU, dtype)
    passes = build_passes(config, model, spans, mesh, CPU)
    batch = _with_documents(sweep.global_batch(config, 0))
    found = {"evaluation": passes.evaluate(batch, 2)}
    found["training"] = passes.train(batch, 2, lambda loss_sum, tokens: loss_sum / tokens)
    grads = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    found["gradient"] = mesh.cp.sum_(torch.cat(grads))
    return found


def _everything() -> dict[str, Any]:
    return {name: {"one": _sums(*job, processes=1), "two": _sums(*job, processes=2)} for name, job in _MODELS.items()}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_processes(_everything, 2)


@pytest.mark.parametrize("name", _MODELS)
def test_losses_of_whole_sequences_are_reported_on_every_process(results, name: str) -> None:
    limit = 1e-2 if name == "bf16" else 1e-13
    for found in results:
        one, two = found[name]["one"], found[name]["two"]
        for what in ("evaluation", "training"):
            assert two[what].shape == one[what].shape == (4, 2)
            assert torch.equal(two[what][:, 1], one[what][:, 1])
            torch.testing.assert_close(two[what], one[what], rtol=limit, atol=0)
            assert torch.equal(two[what], results[0][name]["two"][what])
        error = (two["gradient"] - one["gradient"]).norm() / one["gradient"].norm()
        assert error < (2e-2 if name == "bf16" else 1e-13)


def test_early_and_late_tokens_are_shared_out_evenly() -> None:
    parts = [SequencePart(Axis(4, rank)).positions(16, CPU).tolist() for rank in range(4)]
    assert parts == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    keys_attended_to = {sum(place + 1 for place in part) for part in parts}
    assert len(keys_attended_to) == 1


def test_a_part_of_a_batch_keeps_whole_documents_and_counts() -> None:
    batch = _with_documents(sweep.global_batch(sweep.configure({}, 1), 0))
    positions = torch.tensor([0, 1, 14, 15])
    part = batch.at(positions)
    assert torch.equal(part.tokens, batch.tokens[:, positions])
    assert torch.equal(part.position_ids, batch.position_ids[:, positions])
    assert part.document_ids is batch.document_ids
    assert part.valid_tokens is not None
    assert torch.equal(part.valid_tokens, batch.loss_mask.sum(dim=1))
    assert [len(piece.valid_tokens) for piece in part.split(2) if piece.valid_tokens is not None] == [2, 2, 2, 2]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_masks_are_those_of_one_process(sequence_parallel: bool) -> None:
    whole = DropoutStreams(7, CPU)
    attention, hidden = whole.dropped("attention", (2 * 4, 16, 16), 0.3), whole.dropped("hidden", (2, 16, 6), 0.3)
    for rank in range(4):
        tp, cp = Axis(2, rank % 2), Axis(2, rank // 2)
        streams = LayoutDropoutStreams(7, CPU, Mesh(tp=tp, cp=cp, sequence_parallel=sequence_parallel), heads=4)
        places = SequencePart(cp).positions(16, CPU)
        heads = attention.unflatten(0, (2, 2, 2))[:, tp.rank].flatten(0, 1)
        assert torch.equal(streams.dropped("attention", (2 * 2, 8, 16), 0.3), heads[:, places])
        mine = places.chunk(2)[tp.rank] if sequence_parallel else places
        assert torch.equal(streams.dropped("hidden", (2, len(mine), 6), 0.3), hidden[:, mine])
