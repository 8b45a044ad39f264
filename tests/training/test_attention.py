"""What computes attention: the choice by configuration and device, and that a run names it."""

import pytest
import torch

from lockstep.config import ConfigContainer, Origin, resolve
from lockstep.errors import UserError
from lockstep.models import build_model
from lockstep.models.attention import Attention
from lockstep.training.attention import choose_attention, use_attention

CPU, GPU = torch.device("cpu"), torch.device("meta")  # which stands for a GPU that has all kernels


def configured(**changes: object) -> ConfigContainer:
    """Return a resolved BF16 configuration without dropout; double underscores stand for dots."""
    values: dict[str, object] = {
        "model__num_layers": 2,
        "model__hidden_size": 32,
        "model__num_attention_heads": 4,
        "model__seq_length": 32,
        "model__attention_dropout": 0.0,
        "model__hidden_dropout": 0.0,
        "mixed_precision__bf16": True,
        "train__micro_batch_size": 1,
        "train__train_iters": 1,
        "optimizer__lr": 1e-3,
    }
    config = ConfigContainer()
    for name, value in {**values, **changes}.items():
        config.set(name.replace("__", "."), value, Origin("python"))
    return resolve(config, world_size=2)


@pytest.mark.parametrize(
    ("device", "changes", "kernel"),
    [
        (CPU, {}, "explicit"),
        (GPU, {}, "cudnn"),
        (GPU, {"model__attention_backend": "unfused"}, "explicit"),
        (GPU, {"model__attention_backend": "local"}, "explicit"),
        (GPU, {"model__attention_backend": "flash"}, "flash"),
        (CPU, {"model__attention_backend": "flash"}, "sdpa"),
        (GPU, {"model__attention_backend": "fused"}, "cudnn"),
        (GPU, {"model__attention_dropout": 0.1}, "explicit"),
        (GPU, {"mixed_precision__bf16": False}, "explicit"),
        (GPU, {"mixed_precision__bf16": False, "mixed_precision__fp16": True}, "cudnn"),
        (GPU, {"model__context_parallel_size": 2}, "flash"),
        (GPU, {"dataset__reset_attention_mask": True}, "flash"),
        (GPU, {"model__deterministic_mode": True}, "flash"),
    ],
)
def test_choice(device, changes, kernel) -> None:
    assert choose_attention(configured(**changes), device).kernel == kernel


@pytest.mark.parametrize(
    ("device", "changes", "message"),
    [
        (CPU, {"model__attention_backend": "fused"}, "needs a GPU"),
        (GPU, {"model__attention_backend": "fused", "mixed_precision__bf16": False}, "needs BF16 or FP16"),
        (GPU, {"model__attention_backend": "flash", "mixed_precision__bf16": False}, "needs BF16 or FP16"),
    ],
)
def test_a_named_kernel_that_cannot_run_is_an_error(device, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        choose_attention(configured(**changes), device)


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_a_trial_decides_about_heads(kernel, monkeypatch) -> None:
    tried = []

    def trial(name: str, *widths: object) -> bool:
        tried.append((name, widths[:2]))
        return name == kernel

    monkeypatch.setattr("lockstep.training.attention._runs", trial)
    assert choose_attention(configured(), GPU).kernel == kernel
    assert tried[0] == ("cudnn", (8, 8))
    monkeypatch.setattr("lockstep.training.attention._runs", lambda *_: False)
    assert choose_attention(configured(), GPU).kernel == "explicit"
    with pytest.raises(UserError, match="does not run on this GPU for heads of width 8"):
        choose_attention(configured(model__attention_backend="flash"), GPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__attention_dropout": 0.1}, "has no attention dropout"),
        ({"model__context_parallel_size": 2}, "does not work with context parallelism"),
        ({"dataset__reset_attention_mask": True}, "does not keep documents apart"),
        ({"model__deterministic_mode": True}, "is not deterministic"),
    ],
)
def test_what_cudnn_cannot_do_is_refused(changes, message) -> None:
    with pytest.raises(UserError, match=message):
        configured(model__attention_backend="fused", **changes)


def test_every_layer_gets_the_kernel() -> None:
    config = configured(model__attention_backend="flash")
    config.set("model.vocab_size", 64, Origin("python"))
    model = build_model(config.model, seed=1, params_dtype=torch.float32, device=CPU)
    use_attention(model, choose_attention(config, CPU))
    assert [module.kernel for module in model.modules() if isinstance(module, Attention)] == ["sdpa", "sdpa"]
