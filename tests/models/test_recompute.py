"""Recomputed activations: the same numbers, the same random streams, less memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lockstep.config.model import ModelConfig
from lockstep.models import DropoutStreams, GPTModel, build_model
from lockstep.models.recompute import rebuilt_for_backward, recomputed, recomputed_chunks

CPU = torch.device("cpu")
LAYERS = 3


def full(method: str, number: int) -> dict[str, Any]:
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": number}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


MODES = {
    "uniform 1": full("uniform", 1),
    "uniform 2": full("uniform", 2),
    "uniform all": full("uniform", LAYERS),
    "block 1": full("block", 1),
    "block more than there are": full("block", LAYERS + 2),
    "core_attn": selective("core_attn"),
    "mlp": selective("mlp"),
    "layernorm": selective("layernorm"),
    "layernorm mlp": selective("layernorm", "mlp"),
    "all modules": selective("core_attn", "layernorm", "mlp"),
}


def model_of(config: ModelConfig, dtype: torch.dtype) -> GPTModel:
    return build_model(config, seed=1, params_dtype=dtype, device=CPU)


def two_steps(config: ModelConfig, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Return the losses and all gradients of two micro-batches, and the final states of the streams."""
    model, streams = model_of(config, dtype), DropoutStreams(7, CPU)
    generator = torch.Generator().manual_seed(3)
    results = []
    for _ in range(2):
        tokens = torch.randint(0, 512, (2, 17), generator=generator)
        loss = model(tokens[:, :-1], torch.arange(16).expand(2, 16), tokens[:, 1:], dropout=streams)
        loss.mean().backward()
        results.append(loss.detach())
    return results + [p.grad for p in model.parameters() if p.grad is not None], streams.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["tiny", "llama_like", "post_norm"])
def test_losses_gradients_and_streams_are_bit_for_bit_those_of_a_run_without(family, dtype, tiny, llama_like, use_mode):
    use_mode("fp32-rounded")
    make = llama_like if family == "llama_like" else tiny
    settings = {"num_layers": LAYERS, "hidden_dropout": 0.1, "attention_dropout": 0.2}
    settings["apply_residual_connection_post_layernorm"] = family == "post_norm"
    wanted, states = two_steps(make(**settings), dtype)
    for mode, changes in MODES.items():
        got, after = two_steps(make(**settings, **changes), dtype)
        assert len(got) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), mode
        assert all(torch.equal(after[name], states[name]) for name in states), mode


def test_native_products_and_documents_too(tiny, use_mode):
    use_mode("native")
    for changes in MODES.values():
        results = []
        for more in ({}, changes):
            model = model_of(tiny(num_layers=LAYERS, attention_dropout=0.3, **more), torch.bfloat16)
            tokens, documents = torch.arange(32).view(2, 16), torch.arange(16).expand(2, 16) // 5
            loss = model(tokens, tokens % 16, tokens, document_ids=documents, dropout=DropoutStreams(7, CPU)).sum()
            results.append(torch.autograd.grad(loss, list(model.parameters())))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), changes


def peak_bytes(job: Callable[[], object]) -> int:
    """Return the most memory that PyTorch's allocator held at once, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        job()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_memory_falls_as_each_mode_says(tiny, use_mode):
    use_mode("fp32-rounded")
    settings = {"num_layers": 8, "hidden_dropout": 0.1, "attention_dropout": 0.1, "vocab_size": 64}
    tokens, positions = torch.zeros(4, 64, dtype=torch.int64), torch.arange(64).expand(4, 64)

    def peak(**changes: Any) -> int:
        model, streams = model_of(tiny(**settings, **changes), torch.bfloat16), DropoutStreams(7, CPU)
        return peak_bytes(lambda: model(tokens, positions, tokens, dropout=streams).mean().backward())

    nothing = peak()
    peaks = {name: peak(**changes) / nothing for name, changes in {**MODES, "block 4": full("block", 4)}.items()}
    print({name: f"{share:.2f}" for name, share in peaks.items()})
    assert peaks["uniform 1"] < 0.5
    assert peaks["uniform 1"] < peaks["block 4"] < peaks["block 1"] < 0.95
    assert peaks["core_attn"] < 0.8
    assert peaks["mlp"] < 0.9
    assert peaks["layernorm"] < 0.97
    assert peaks["layernorm mlp"] < peaks["mlp"] - 0.02
    assert peaks["all modules"] < min(peaks["core_attn"], peaks["layernorm mlp"])


def test_nothing_is_recomputed_in_evaluation(tiny, monkeypatch):
    model = model_of(tiny(**selective("core_attn", "mlp", "layernorm")), torch.float32).eval()
    monkeypatch.setattr("lockstep.models.attention.recomputed", None)
    monkeypatch.setattr("lockstep.models.decoder.recomputed", None)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    assert model(tokens, tokens, tokens).shape == (1, 8)


@pytest.mark.parametrize(
    ("method", "number", "expected"),
    [
        ("uniform", 2, [([0, 1], True), ([2, 3], True), ([4], True)]),
        ("uniform", 9, [([0, 1, 2, 3, 4], True)]),
        ("block", 2, [([0], True), ([1], True), ([2], False), ([3], False), ([4], False)]),
    ],
)
def test_chunks(method, number, expected, tiny):
    chunks = recomputed_chunks(tiny(**full(method, number)), range(5))
    assert [(list(chunk), again) for chunk, again in chunks] == expected
    assert [again for _, again in recomputed_chunks(tiny(**selective("mlp")), range(5))] == [False] * 5


def test_an_error_in_a_recomputation_leaves_the_streams_where_they_were():
    streams, calls = DropoutStreams(7, CPU), []

    def function(x: torch.Tensor) -> torch.Tensor:
        calls.append(streams.dropped("hidden", (64,), 0.5))
        if len(calls) > 1:
            raise RuntimeError("second time")
        return x.exp() * x

    loss = recomputed(function, torch.ones(3, requires_grad=True), streams=streams).sum()
    streams.dropped("hidden", (9,), 0.5)
    before = streams.state_dict()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert torch.equal(calls[0], calls[1])
    assert all(torch.equal(before[name], state) for name, state in streams.state_dict().items())


def test_a_rebuilt_tensor_is_given_back_as_the_view_that_was_kept():
    x, other, rebuilt = torch.randn(4, 6), torch.randn(6, 4), []
    weight = torch.ones(6, 4, requires_grad=True)

    def rebuild() -> torch.Tensor:
        rebuilt.append(1)
        return x.clone()

    with rebuilt_for_backward(x, rebuild):
        y = (x.t() * weight).sum() + (other * weight).sum()
    (grad,) = torch.autograd.grad(y, weight)
    assert torch.equal(grad, x.t() + other)
    assert len(rebuilt) == 1
