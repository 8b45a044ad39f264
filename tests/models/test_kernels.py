"""Fused attention against explicit scores: grouped keys, latents, pieces of a sequence, documents, and masks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.models.attention import Attention, AttentionContext
from lockstep.models.flash4 import is_installed
from lockstep.models.kernels import Kernel, fused_attention
from lockstep.models.mask import CausalMask, hidden_positions
from lockstep.parallel.context import SequencePart
from lockstep.parallel.mesh import Axis

CPU = torch.device("cpu")
LENGTH = 24
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 2 + [2] * 13, [0] * 24])


def part(rank: int, size: int = 2) -> SequencePart:
    """Return the part of a sequence that one of several processes has."""
    return SequencePart(Axis(size=size, rank=rank))


def heads(queries: Tensor, groups: int, value_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of two samples; queries stand at some positions."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, LENGTH, 4, 8), (2, LENGTH, groups, 8), (2, LENGTH, groups, value_width))
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return query[:, queries].requires_grad_(), key.requires_grad_(), value.requires_grad_()


def results(model: Attention, tensors: Any, mask: CausalMask) -> tuple[Tensor, ...]:
    """Return what is attended to and the gradients of query, key and value."""
    query, key, value = tensors
    found = model.attended(query, key, value, AttentionContext(mask, None, None))
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    return found, *torch.autograd.grad((found * weights).sum(), tensors)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "documents"])
@pytest.mark.parametrize("sequence", [None, part(0), part(1), part(0, 3)], ids=["whole", "first", "second", "of three"])
@pytest.mark.parametrize(("groups", "value_width", "scale"), [(4, 8, None), (2, 8, None), (1, 8, 0.2), (4, 6, 0.3)])
def test_fused_attention_equals_explicit_scores(tiny, groups, value_width, scale, sequence, documents) -> None:
    mask = CausalMask(LENGTH, CPU, documents, sequence)
    model = Attention(tiny(), 0)
    model.scale = scale
    found = {}
    kernels: tuple[Kernel, ...] = ("explicit", "sdpa")
    for kernel in kernels:
        model.kernel = kernel
        found[kernel] = results(model, heads(mask.positions, groups, value_width), mask)
    for fused, explicit in zip(found["sdpa"], found["explicit"], strict=True):
        torch.testing.assert_close(fused, explicit, rtol=1e-10, atol=1e-10)


def test_masks_are_not_made_where_a_kernel_needs_none(tiny, monkeypatch) -> None:
    made: list[int] = []
    original = hidden_positions

    def noted(positions: Tensor, length: int, documents: Tensor | None) -> Tensor:
        made.append(length)
        return original(positions, length, documents)

    monkeypatch.setattr("lockstep.models.mask.hidden_positions", noted)
    model, mask = Attention(tiny(), 0), CausalMask(LENGTH, CPU)
    model.kernel = "sdpa"
    model.attended(*heads(mask.positions, 4, 8), AttentionContext(mask, None, None))
    assert made == []
    model.kernel = "explicit"
    model.attended(*heads(mask.positions, 4, 8), AttentionContext(mask, None, None))
    assert made == [LENGTH]


@pytest.mark.parametrize("sequence", [None, part(0), part(1)], ids=["whole", "first", "second"])
def test_segments_say_what_the_mask_says(sequence) -> None:
    mask = CausalMask(LENGTH, CPU, DOCUMENTS, sequence)
    rows = []
    for run in mask.runs:
        segments = mask.segments(run)
        hidden = torch.ones(2 * len(run), 2 * run.stop, dtype=torch.bool)
        for q0, q1, k0, k1 in zip(
            segments.queries[:-1], segments.queries[1:], segments.keys[:-1], segments.keys[1:], strict=True
        ):
            for back in range(1, int(q1 - q0) + 1):  # the last query of a document sees all its keys
                hidden[q1 - back, k0 : k1 - back + 1] = False
        of_samples = hidden.view(2, len(run), 2, run.stop)
        assert of_samples[0, :, 1].all()
        assert of_samples[1, :, 0].all()
        own = torch.stack([of_samples[0, :, 0], of_samples[1, :, 1]])
        rows.append(torch.nn.functional.pad(own, (0, LENGTH - run.stop), value=True))
        assert mask.segments(run) is segments
    assert torch.equal(torch.cat(rows, dim=1), mask.hidden)


def test_runs_are_the_positions() -> None:
    for sequence in (None, part(0), part(1, 4)):
        mask = CausalMask(LENGTH, CPU, None, sequence)
        assert [each for run in mask.runs for each in run] == mask.positions.tolist()


def test_cudnn_refuses_what_it_cannot_do() -> None:
    mask = CausalMask(LENGTH, CPU, DOCUMENTS)
    with pytest.raises(ValueError, match="whole sequences"):
        fused_attention("cudnn", *heads(mask.positions, 4, 8), mask, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "documents"])
@pytest.mark.parametrize("sequence", [None, part(0), part(1)], ids=["whole", "first", "second"])
@pytest.mark.parametrize(("groups", "width", "value_width"), [(4, 64, 64), (1, 128, 128), (4, 192, 128), (2, 36, 36)])
@pytest.mark.parametrize("kernel", ["cudnn", "flash", "flash4"])
def test_gpu_kernels_stay_near_float64(kernel, groups, width, value_width, sequence, documents) -> None:
    length, device = 512, torch.device("cuda")
    ids = None if documents is None else documents.repeat_interleave(22, dim=1)[:, :length].contiguous().to(device)
    ids = ids if ids is None else torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=3)
    mask = CausalMask(length, device, ids, sequence)
    if kernel == "cudnn" and (documents is not None or sequence is not None or width % 8 or width > 128):
        pytest.skip("not for cuDNN")
    if kernel == "flash4" and (not is_installed() or width % 64):
        pytest.skip("no flash-attn-4, or not for it")
    shapes = ((2, len(mask.positions), 4, width), (2, length, groups, width), (2, length, groups, value_width))
    tensors: Any = tuple(torch.randn(s, device=device).bfloat16().requires_grad_() for s in shapes)
    exact: Any = tuple(t.detach().double().requires_grad_() for t in tensors)
    found = fused_attention(kernel, tensors[0], tensors[1], tensors[2], mask, None)
    grad = torch.randn_like(found)
    grads = torch.autograd.grad(found, tensors, grad)
    wanted = fused_attention("sdpa", exact[0], exact[1], exact[2], mask, None)
    wanted_grads = torch.autograd.grad(wanted, exact, grad.double())
    for low, full in zip((found, *grads), (wanted, *wanted_grads), strict=True):
        assert ((low.double() - full).norm() / full.norm()).item() < 0.01
