"""FlashAttention-4 behind a stand-in for its package: what it is given, its gradients, and compilation."""

import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.models import flash4
from lockstep.models.kernels import fused_attention
from lockstep.models.mask import CausalMask
from lockstep.parallel.context import SequencePart
from lockstep.parallel.mesh import Axis

CPU = torch.device("cpu")
LENGTH = 24
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 2 + [2] * 13, [0] * 24])


def shares(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return the probabilities [.., n, q, s]; the last query sees the last key."""
    key = key.repeat_interleave(query.shape[-2] // key.shape[-2], -2)
    scores = torch.einsum("...qnd,...knd->...nqk", query, key) * scale
    queries, keys = scores.shape[-2:]
    hidden = torch.arange(keys)[None] > torch.arange(queries)[:, None] + keys - queries
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def pieces(query: Tensor, key: Tensor, sizes: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield which queries and keys belong together, and check what is said of the longest."""
    query_begins, key_begins = sizes["cu_seqlens_q"], sizes["cu_seqlens_k"]
    if query_begins is None:
        yield ..., ...
        return
    assert query_begins.dtype == key_begins.dtype == torch.int32
    assert (query_begins[-1], key_begins[-1]) == (len(query), len(key))
    for begins, longest in ((query_begins, sizes["max_seqlen_q"]), (key_begins, sizes["max_seqlen_k"])):
        assert int(begins.diff().max()) <= longest
    for number in range(len(query_begins) - 1):
        yield slice(*query_begins[number : number + 2].tolist()), slice(*key_begins[number : number + 2].tolist())


def forward(query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float, **sizes: Any) -> tuple[Any, ...]:
    """Stand in for the forward function of the package."""
    assert sizes["causal"]
    assert sizes["return_lse"]
    result = query.new_zeros(*query.shape[:-1], value.shape[-1])
    wide = value.repeat_interleave(query.shape[-2] // key.shape[-2], -2)
    for of_queries, of_keys in pieces(query, key, sizes):
        probabilities = shares(query[of_queries], key[of_keys], softmax_scale)
        result[of_queries] = torch.einsum("...nqk,...knv->...qnv", probabilities, wide[of_keys])
    log_sum = query.new_zeros((*query.shape[:-3], query.shape[-2], query.shape[-3]), dtype=torch.float32)
    return result, log_sum, None, None, None


def backward(
    query: Tensor, key: Tensor, value: Tensor, result: Tensor, grad: Tensor, log_sum: Tensor, **rest: Any
) -> tuple[Tensor, ...]:
    """Stand in for the backward function of the package."""
    assert log_sum.shape == (*query.shape[:-3], query.shape[-2], query.shape[-3])
    scale, copies = rest["softmax_scale"], query.shape[-2] // key.shape[-2]
    found = rest["dq"].zero_(), rest["dk"].zero_(), rest["dv"].zero_()
    for of_queries, of_keys in pieces(query, key, rest):
        q, g, k, v = query[of_queries], grad[of_queries], key[of_keys], value[of_keys]
        wide_k, wide_v = (x.repeat_interleave(copies, -2) for x in (k, v))
        p = shares(q, k, scale)
        of_shares = torch.einsum("...qnv,...knv->...nqk", g, wide_v)
        sums = (g * result[of_queries]).sum(-1).transpose(-1, -2)[..., None]
        of_scores = p * (of_shares - sums) * scale
        found[0][of_queries] = torch.einsum("...nqk,...knd->...qnd", of_scores, wide_k)
        for place, full in (
            (1, torch.einsum("...nqk,...qnd->...knd", of_scores, q)),
            (2, torch.einsum("...nqk,...qnv->...knv", p, g)),
        ):
            found[place][of_keys] += full.unflatten(-2, (-1, copies)).sum(-2)
    return found


@pytest.fixture
def package(monkeypatch) -> None:
    """Have a package whose functions are those above."""
    module: Any = ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd, module._flash_attn_bwd = forward, backward
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", module)
    flash4._package.cache_clear()


def heads(queries: Tensor, groups: int, width: int, value_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of two samples; queries stand at some positions."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, LENGTH, 4, width), (2, LENGTH, groups, width), (2, LENGTH, groups, value_width))
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return query[:, queries].requires_grad_(), key.requires_grad_(), value.requires_grad_()


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "documents"])
@pytest.mark.parametrize("rank", [None, 0, 1], ids=["whole", "first", "second"])
@pytest.mark.parametrize(
    ("groups", "width", "value_width", "scale"), [(4, 8, 8, None), (2, 8, 8, 0.2), (1, 12, 8, None), (4, 6, 16, 0.1)]
)
def test_it_is_given_what_it_needs(package, groups, width, value_width, scale, rank, documents) -> None:
    sequence = None if rank is None else SequencePart(Axis(size=2, rank=rank))
    mask = CausalMask(LENGTH, CPU, documents, sequence)
    tensors = heads(mask.positions, groups, width, value_width)
    found, wanted = (fused_attention(kernel, *tensors, mask, scale) for kernel in ("flash4", "sdpa"))
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    grads = [torch.autograd.grad((result * weights).sum(), tensors) for result in (found, wanted)]
    for ours, theirs in zip((found, *grads[0]), (wanted, *grads[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_compiler_leaves_it_whole(package) -> None:
    mask = CausalMask(LENGTH, CPU)
    tensors = heads(mask.positions, 2, 8, 16)
    seen: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(
        lambda q, k, v: fused_attention("flash4", q, k, v, mask, None) * 2, backend=backend, fullgraph=True
    )
    found = compiled(*tensors)
    torch.testing.assert_close(found, fused_attention("sdpa", *tensors, mask, None) * 2)
    assert sum("flash4_forward" in name for name in seen) == 1


def test_its_operations_are_what_they_say(package) -> None:
    tensors = heads(torch.arange(LENGTH), 2, 8, 16)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    found = torch.library.opcheck(
        torch.ops.lockstep.flash4_forward.default,
        (*tensors, None, None, LENGTH, LENGTH, 0.3),
        test_utils=tests,
    )
    assert found == dict.fromkeys(tests, "SUCCESS")


def test_what_is_installed_is_told(monkeypatch, package) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert flash4.is_installed()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "flash_attn.cute" else object())
    assert not flash4.is_installed()
