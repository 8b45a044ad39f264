"""The cross entropy's kernels on a GPU, against float64 and against the passes in tiles."""

import pytest
import torch
from torch import Tensor

from lockstep.models import cross_entropy

TOKENS = 37
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def problem(vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [t, v], labels [t] of which two are not in the vocabulary, and the gradient [t] of the losses."""
    generator = torch.Generator("cuda").manual_seed(vocab)
    logits = 4 * torch.randn(TOKENS, vocab, device="cuda", generator=generator)
    labels = torch.randint(0, vocab, (TOKENS,), device="cuda", generator=generator)
    labels[2], labels[5] = -3, vocab + 1
    return logits.to(dtype), labels, torch.rand(TOKENS, device="cuda", generator=generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [100, 4096, 32128, 151_936])
def test_kernels_are_the_rounded_result(vocab: int, dtype: torch.dtype):
    logits, labels, grad = problem(vocab, dtype)
    passes = cross_entropy._KernelPasses()
    found = passes.log_sums(logits)
    exact = torch.logsumexp(logits.double(), dim=1)
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=0)
    inside = (torch.arange(vocab, device="cuda") == labels[:, None]).double()
    wanted = ((logits.double() - exact[:, None]).exp() - inside) * grad[:, None]
    passes.put_gradients(logits, found, labels, grad)
    torch.testing.assert_close(logits.double(), wanted, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-7)


def test_rows_of_a_wider_tensor():
    wide, labels, grad = problem(512, torch.bfloat16)
    logits, rest = wide[:, :300], wide[:, 300:].clone()
    whole, labels = logits.contiguous(), labels.clamp(0, 299)
    passes = cross_entropy._KernelPasses()
    for each in (logits, whole):
        passes.put_gradients(each, passes.log_sums(each), labels, grad)
    torch.testing.assert_close(logits, whole, rtol=2**-7, atol=1e-7)
    assert torch.equal(wide[:, 300:], rest)


def test_loss_is_that_of_the_passes_in_tiles(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator("cuda").manual_seed(3)
    hidden = torch.randn(2, 64, 128, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(5000, 128, device="cuda", generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(0, 5000, (2, 64), device="cuda", generator=generator)
    results = []
    for kernels in (True, False):
        monkeypatch.setattr(cross_entropy, "runs_triton", lambda device, kernels=kernels: kernels)
        loss = cross_entropy.linear_cross_entropy(hidden, weight, labels)
        results.append((loss, *torch.autograd.grad(loss.mean(), (hidden, weight))))
    for ours, tiles in zip(*results, strict=True):
        torch.testing.assert_close(ours, tiles, rtol=1e-5 if ours.dtype == torch.float32 else 2**-7, atol=1e-5)
