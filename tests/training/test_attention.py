"""What computes attention: the choice by configuration and device, and that a run names it."""

import pytest
import torch

from lockstep.config import ConfigContainer, Origin, resolve
from lockstep.errors import UserError
from lockstep.models import build_model
from lockstep.models.attention import Attention
from lockstep.training.attention import _runs, choose_attention, use_attention

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


@pytest.fixture
def hopper(monkeypatch) -> None:
    """Have a GPU of capability 9.0 on which all kernels run, and FlashAttention-4."""
    monkeypatch.setattr("lockstep.training.attention._runs", lambda *_: True)
    monkeypatch.setattr("lockstep.training.attention.is_installed", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))


LONG = {"model__seq_length": 2048, "model__hidden_size": 256}


@pytest.mark.parametrize(
    ("changes", "kernel", "reason"),
    [
        (LONG, "flash4", "auto"),
        ({"model__hidden_size": 256}, "cudnn", "auto; FlashAttention-4 pays from sequences of 2048 tokens on"),
        (LONG | {"model__context_parallel_size": 2}, "flash4", "auto"),
        (LONG | {"dataset__reset_attention_mask": True}, "flash4", "auto"),
        (LONG | {"model__flash_attention_version": 4}, "flash4", "auto"),
        (LONG | {"model__flash_attention_version": 2}, "cudnn", "names"),
        (LONG | {"model__deterministic_mode": True}, "flash", "cuDNN does not work in deterministic mode"),
        ({"model__seq_length": 2048}, "cudnn", "FlashAttention-4 takes heads of 64, 128, 192 or 256 channels"),
        ({"model__hidden_size": 256, "model__attention_backend": "flash"}, "flash4", "model.attention_backend=flash"),
        (LONG | {"model__attention_backend": "flash", "model__flash_attention_version": 2}, "flash", "version=2"),
        (LONG | {"model__attention_backend": "fused"}, "cudnn", "model.attention_backend=fused"),
    ],
)
def test_choice_where_flash_attention_4_is_there(hopper, changes, kernel, reason) -> None:
    choice = choose_attention(configured(**changes), torch.device("cuda"))
    assert choice.kernel == kernel
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        (("lockstep.training.attention.is_installed", lambda: False), "FlashAttention-4 is not installed"),
        (("torch.cuda.get_device_capability", lambda _: (10, 0)), "FlashAttention-4 is not measured on this GPU"),
    ],
)
def test_flash_attention_4_is_taken_where_it_was_measured(hopper, monkeypatch, patch, reason) -> None:
    monkeypatch.setattr(*patch)
    choice = choose_attention(configured(**LONG), torch.device("cuda"))
    assert (choice.kernel, choice.reason) == ("cudnn", f"auto; {reason}")
    with pytest.raises(UserError, match=f"{reason}; FlashAttention-2 is not what .* use model.flash_attention_version"):
        choose_attention(
            configured(model__attention_backend="flash", model__flash_attention_version=4, **LONG), torch.device("cuda")
        )


def test_a_package_that_cannot_be_imported_is_an_error(monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise ImportError("libcuda_something.so is not there")

    monkeypatch.setattr("lockstep.training.attention.fused_attention", broken)
    _runs.cache_clear()
    with pytest.raises(UserError, match=r"FlashAttention-4 cannot be imported \(libcuda.*pip install 'lockstep-lm"):
        _runs("flash4", 64, 64, torch.bfloat16, CPU)


def test_there_is_no_version_3() -> None:
    with pytest.raises(UserError, match=r"flash-attention-version.* = 3 is not supported; use 2 or 4"):
        configured(model__flash_attention_version=3)


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
