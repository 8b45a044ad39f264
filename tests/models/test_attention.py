"""Attention: both ways of computing it, masks, and rotary positions."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.models import build_model
from lockstep.models.attention import Attention, AttentionContext, core_attention
from lockstep.models.mask import CausalMask, hidden_positions
from lockstep.models.positions import inverse_frequencies, rotary_cos_sin, rotate, scaled_frequencies

CPU = torch.device("cpu")


def attend(
    dtype: torch.dtype, *, softmax_in_fp32: bool, with_dropout: bool, divisor: float = 1.0
) -> tuple[Tensor, ...]:
    """Return the result and the gradients of query, key and value."""
    torch.manual_seed(5)
    query, key, value = (torch.randn(6, 20, 12).to(dtype).requires_grad_() for _ in range(3))
    dropped = torch.rand(6, 20, 20) < 0.3 if with_dropout else None
    documents = torch.tensor([[0] * 9 + [1] * 11, [0] * 20, [0] * 5 + [3] * 15])
    hidden = hidden_positions(torch.arange(20), 20, documents)
    result = core_attention(
        query,
        key,
        value,
        hidden,
        divisor=divisor,
        dropped=dropped,
        dropout_probability=0.3,
        softmax_in_fp32=softmax_in_fp32,
    )
    grads = torch.autograd.grad(result, (query, key, value), torch.randn(6, 20, 12).to(dtype))
    return (result.detach(), *grads)


@pytest.mark.parametrize("with_dropout", [False, True])
@pytest.mark.parametrize(("softmax_in_fp32", "divisor"), [(False, 1.0), (True, 1.0), (True, 3.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_attention_equals_native_low_precision_operations(
    dtype, softmax_in_fp32, divisor, with_dropout, use_mode, monkeypatch
):
    results = {}
    monkeypatch.setattr("lockstep.models.attention._CPU_CHUNK_SCORES", 800)
    for mode in ("native", "fp32-rounded"):
        use_mode(mode)
        results[mode] = attend(dtype, softmax_in_fp32=softmax_in_fp32, with_dropout=with_dropout, divisor=divisor)
    for native, rounded in zip(results["native"], results["fp32-rounded"], strict=True):
        assert (native == rounded).float().mean() > 0.9
        torch.testing.assert_close(native, rounded, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("mode", ["native", "fp32-rounded"])
@pytest.mark.parametrize("chunk", [1, 300, 1 << 20])
def test_some_queries_find_what_they_find_among_all(mode, chunk, use_mode, monkeypatch):
    monkeypatch.setattr("lockstep.models.attention._CPU_CHUNK_SCORES", chunk)
    use_mode(mode)
    rows = torch.tensor([0, 1, 2, 17, 18, 19])
    query, key, value = (torch.randn(6, 20, 12).bfloat16().requires_grad_() for _ in range(3))
    found = []
    for places in (torch.arange(20), rows):
        hidden = hidden_positions(places, 20, torch.tensor([[0] * 9 + [1] * 11] * 3))
        result = core_attention(
            query[:, places], key, value, hidden, dropped=None, dropout_probability=0.0, softmax_in_fp32=True
        )
        result = result[:, rows] if len(places) == 20 else result
        found.append((result, *torch.autograd.grad(result.sum(), (query, key, value))))
    for of_all, of_some in zip(*found, strict=True):
        torch.testing.assert_close(of_some, of_all, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("mode", ["native", "fp32-rounded"])
def test_divided_scores_stay_in_the_range_of_float16(mode, use_mode):
    use_mode(mode)
    query, key = (torch.full((1, 4, 64), size, dtype=torch.float16) for size in (300.0, 45.0))
    key[0, 1] *= 0.999
    value = torch.randn(1, 4, 8).half()
    options: dict[str, Any] = {"dropped": None, "dropout_probability": 0.0, "softmax_in_fp32": True}
    hidden = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert core_attention(query, key, value, hidden, **options).isnan().all()  # 108,000 is beyond float16
    found = core_attention(query, key, value, hidden, divisor=8.0, **options)
    exact = core_attention(query.double(), key.double(), value.double(), hidden, **options)
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=2e-2)


def test_scores_of_every_layer_are_divided_by_its_number(tiny):
    config = tiny(num_layers=3, apply_query_key_layer_scaling=True)
    model = build_model(config, seed=1, params_dtype=torch.float32, device=CPU)
    divisors = [module.score_divisor for module in model.modules() if isinstance(module, Attention)]
    assert divisors == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("softmax_in_fp32", "divisor"), [(False, 1.0), (True, 1.0), (True, 3.0)])
def test_rounded_attention_stays_near_float64(softmax_in_fp32, divisor, use_mode):
    use_mode("fp32-rounded")
    ours = attend(torch.bfloat16, softmax_in_fp32=softmax_in_fp32, with_dropout=True, divisor=divisor)
    exact = attend(torch.float64, softmax_in_fp32=softmax_in_fp32, with_dropout=True)
    for low, wanted in zip(ours, exact, strict=True):
        assert ((low.double() - wanted).norm() / wanted.norm()).item() < 0.02


def test_a_document_does_not_see_the_one_before_it(tiny):
    model = build_model(tiny(position_embedding_type="none"), seed=1, params_dtype=torch.float32, device=CPU).eval()
    first, second = torch.randint(0, 512, (1, 10)), torch.randint(0, 512, (1, 14))
    both = torch.cat((first, second), dim=1)
    positions = torch.zeros_like(both)
    documents = torch.tensor([[4] * 10 + [9] * 14])
    with torch.no_grad():
        apart = model(both, positions, document_ids=documents)
        together = model(both, positions)
        alone = model(second, positions[:, :14])
    torch.testing.assert_close(apart[:, 10:], alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(apart[:, :10], together[:, :10], rtol=1e-5, atol=1e-6)
    assert (together[:, 10:] - alone).abs().max() > 1e-4


def test_no_token_sees_a_later_one(tiny):
    model = build_model(tiny(), seed=1, params_dtype=torch.float32, device=CPU).eval()
    tokens, positions = torch.randint(0, 512, (1, 16)), torch.arange(16)[None]
    changed = tokens.clone()
    changed[0, 10] += 1
    with torch.no_grad():
        difference = (model(tokens, positions) - model(changed % 512, positions)).abs().amax(dim=-1)[0]
    assert difference[:10].max() == 0
    assert difference[10:].min() > 0


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_turns_pairs_of_channels_by_their_angle(interleaved, tiny):
    config = tiny(rotary_interleaved=interleaved, rotary_base=100, rotary_percent=0.5, position_embedding_type="rope")
    cos, sin = rotary_cos_sin(config, torch.arange(10), torch.float32)
    x = torch.randn(2, 10, 3, 8)
    turned = rotate(x, cos, sin, interleaved=interleaved)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    pairs = [(0, 1), (2, 3)] if interleaved else [(0, 2), (1, 3)]
    for (even, odd), frequency in zip(pairs, [1.0, 100**-0.5], strict=True):
        before = torch.complex(x[..., even], x[..., odd])
        angle = torch.arange(10.0) * frequency
        after = before * torch.polar(torch.ones(10), angle)[:, None]
        torch.testing.assert_close(torch.complex(turned[..., even], turned[..., odd]), after, rtol=1e-5, atol=1e-5)


def test_interpolation_divides_positions(tiny):
    plain = rotary_cos_sin(tiny(), torch.arange(16), torch.float32)
    divided = rotary_cos_sin(tiny(seq_len_interpolation_factor=4), torch.arange(64), torch.float32)
    for ours, wanted in zip(divided, plain, strict=True):
        torch.testing.assert_close(ours[::4], wanted, rtol=1e-6, atol=1e-6)


def test_rope_scaling_keeps_short_waves_and_stretches_long_ones(tiny):
    frequencies = inverse_frequencies(tiny(kv_channels=64, rotary_base=500000), CPU)
    scaled = scaled_frequencies(frequencies, 8.0)
    waves = 2 * math.pi / frequencies
    short, long = waves < 2048, waves > 8192
    assert short.any()
    assert long.any()
    assert not (short | long).all()
    assert torch.equal(scaled[short], frequencies[short])
    assert torch.equal(scaled[long], frequencies[long] / 8)
    ratio = (scaled / frequencies)[~short & ~long]
    smooth = (8192 / waves[~short & ~long] - 1) / 3
    torch.testing.assert_close(ratio, (1 - smooth) / 8 + smooth)


def test_qk_norm_is_applied_per_head_before_rotation(llama_like):
    model = build_model(llama_like(qk_layernorm=True), seed=1, params_dtype=torch.float32, device=CPU).eval()
    names = [name for name, _ in model.named_parameters() if "q_layernorm" in name or "k_layernorm" in name]
    prefix = "decoder.layers.0.self_attention"
    assert names[:2] == [f"{prefix}.q_layernorm.weight", f"{prefix}.k_layernorm.weight"]
    attention: Any = model.get_submodule(prefix)
    context = AttentionContext(CausalMask(6, CPU), None, None)
    query, key, _ = attention._query_key_value(torch.randn(1, 6, 32), context)
    for part, heads in ((query, 4), (key, 2)):
        torch.testing.assert_close(part.square().mean(dim=-1), torch.ones(1, 6, heads), rtol=1e-2, atol=1e-2)
