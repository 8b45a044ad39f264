"""Training with adapters against Hugging Face's PEFT: the same adapters and batches, in float32."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from lockstep.config import ConfigContainer, Origin, resolve
from lockstep.models import DropoutStreams, GPTModel
from lockstep.peft.adapter import Adapter, Whole, delta
from lockstep.peft.apply import adapters, draw_from
from lockstep.peft.files import AdapterCheckpoint
from lockstep.peft.hf import import_adapters
from lockstep.training.feed import Batch
from lockstep.training.optimizer import Optimizer
from lockstep.training.passes import WholePasses
from lockstep.training.step import TrainStep
from tests.hf.tiny import saved
from tests.peft.test_hf import ours_at, theirs_at

_STEPS, _LENGTH, _DECAY, _CLIP = 20, 16, 0.1, 1.0
_RATE = {"adam": 3e-3, "sgd": 0.3}
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _config(folder: Path, optimizer: str) -> ConfigContainer:
    config, found = ConfigContainer(), AdapterCheckpoint.open(folder).config
    config.model, config.peft = found.model, found.peft
    values = {
        "model.seq_length": _LENGTH,
        "train.micro_batch_size": 2,
        "train.global_batch_size": 4,
        "train.train_iters": _STEPS,
        "optimizer.lr": _RATE[optimizer],
        "optimizer.optimizer": optimizer,
        "optimizer.clip_grad": _CLIP,
        "tokenizer.tokenizer_type": "NullTokenizer",
        "tokenizer.vocab_size": 69,
        "checkpoint.pretrained_checkpoint": "unread",
    }
    for path, value in values.items():
        config.set(path, value, Origin("python"))
    return resolve(config)


def _tokens(step: int) -> torch.Tensor:
    return torch.randint(0, 70, (4, _LENGTH + 1), generator=torch.Generator().manual_seed(step))


def _ours(model: GPTModel, config: ConfigContainer, sabotage: Callable[[GPTModel], None] | None = None) -> list[float]:
    if sabotage is not None:
        sabotage(model)
    streams = DropoutStreams(7, torch.device("cpu"))
    draw_from(model, streams)
    step = TrainStep(WholePasses(model, streams), Optimizer(model, config))
    positions = torch.arange(_LENGTH).expand(4, _LENGTH)
    losses = []
    for number in range(_STEPS):
        tokens = _tokens(number)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(4, _LENGTH), positions)
        losses.append(step(batch, 2, _RATE[config.optimizer.optimizer], _DECAY).lm_loss)
    return losses


def _theirs(model: Any, config: ConfigContainer) -> list[float]:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    kind = {"adam": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.optimizer.optimizer]
    extra = {"sgd": {"momentum": config.optimizer.sgd_momentum}, "adam": {}}[config.optimizer.optimizer]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": _DECAY},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = kind([g for g in groups if g["params"]], lr=_RATE[config.optimizer.optimizer], **extra)
    losses = []
    for number in range(_STEPS):
        optimizer.zero_grad()
        total = 0.0
        for part in _tokens(number).split(2):
            logits = model(part[:, :-1]).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()) / 2
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, _CLIP)
        optimizer.step()
        losses.append(total)
    return losses


def _largest(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("family", "dora"), [("llama", False), ("llama", True), ("qwen3", False), ("qwen3", True)])
def test_losses_are_those_of_peft(family, dora, optimizer, tmp_path) -> None:
    base = saved(tmp_path / "hf", family)
    theirs = theirs_at(tmp_path / "peft", base, _ALL, dora=dora)
    import_adapters(tmp_path / "peft", base, tmp_path / "ours")
    config = _config(tmp_path / "ours", optimizer)
    ours, theirs_losses = _ours(ours_at(tmp_path / "ours", base), config), _theirs(theirs, config)
    assert _largest(ours, theirs_losses) < 1e-5
    assert ours[0] != pytest.approx(ours[-1], rel=1e-3)


def _without_scale(model: GPTModel) -> None:
    for adapter in adapters(model):
        adapter.settings = dataclasses.replace(adapter.settings, scale=1.0)


def _length_with_gradient(model: GPTModel) -> None:
    def lengths(adapter: Adapter, weight: torch.Tensor) -> torch.Tensor:
        pairs = {name: (pair.linear_in.weight, pair.linear_out.weight) for name, pair in adapter.pairs().items()}
        return (weight + delta(pairs, adapter.rows, adapter.settings.scale)).norm(dim=1)

    for adapter in adapters(model):
        adapter._lengths = lambda weight, adapter=adapter: lengths(adapter, weight)  # type: ignore[method-assign,misc]


def _all_trained(model: GPTModel) -> None:
    model.requires_grad_(True)


@pytest.mark.parametrize("fault", [_without_scale, _length_with_gradient, _all_trained])
def test_faults_show(fault, tmp_path) -> None:
    base = saved(tmp_path / "hf", "llama")
    theirs = theirs_at(tmp_path / "peft", base, _ALL, dora=True)
    import_adapters(tmp_path / "peft", base, tmp_path / "ours")
    config = _config(tmp_path / "ours", "sgd")
    ours = _ours(ours_at(tmp_path / "ours", base), config, fault)
    assert _largest(ours, _theirs(theirs, config)) > 1e-4


class _Recorder(Whole):
    """Draws masks and keeps them for the other side."""

    def __init__(self) -> None:
        self.masks: list[torch.Tensor] = []

    def dropped_inputs(self, streams: Any, shape: Any, probability: float) -> torch.Tensor:
        """Draw a mask and keep it."""
        self.masks.append(super().dropped_inputs(streams, shape, probability))
        return self.masks[-1]


class _Replayed(torch.nn.Module):
    """Dropout with the masks that the other side has drawn."""

    def __init__(self, masks: list[torch.Tensor], probability: float) -> None:
        super().__init__()
        self.masks, self.kept = masks, 1.0 - probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop."""
        return x.masked_fill(self.masks.pop(0), 0.0) / self.kept


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_dropout_is_where_peft_has_it(dora, tmp_path) -> None:
    base, places = saved(tmp_path / "hf", "llama"), {"linear_proj": "self_attn.o_proj", "linear_fc2": "mlp.down_proj"}
    theirs = theirs_at(tmp_path / "peft", base, ["o_proj", "down_proj"], dora=dora)
    import_adapters(tmp_path / "peft", base, tmp_path / "ours")
    config = _config(tmp_path / "ours", "sgd")
    plain = _ours(ours_at(tmp_path / "ours", base), config)
    model = ours_at(tmp_path / "ours", base)
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            module.settings = dataclasses.replace(module.settings, dropout=0.25)
            module.part = recorder = _Recorder()
            _, _, layer, *_, linear, _ = name.split(".")
            found = theirs.get_submodule(f"base_model.model.model.layers.{layer}.{places[linear]}")
            found.lora_dropout["default"] = _Replayed(recorder.masks, 0.25)
    ours = _ours(model, config)
    assert _largest(ours, _theirs(theirs, config)) < 1e-5
    assert _largest(ours, plain) > 1e-4
