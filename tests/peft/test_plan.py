"""Frozen weights have no gradients and no optimizer state: neither in the plan nor in the optimizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.cli import main
from lockstep.parallel.mesh import Mesh
from lockstep.peft.apply import is_adapter
from lockstep.training.optimizer import Optimizer
from lockstep.training.setup import build_parallel_model
from tests.parallel import sweep
from tests.plan.test_cli import BIG

_LORA = ["--peft-scheme", "lora", "--lora-dim", "8", "--pretrained-checkpoint", "unread"]


@pytest.mark.parametrize("words", [[], ["--use-distributed-optimizer"]], ids=["one", "sharded"])
def test_the_plan_knows_what_adapters_spare(words: list[str], tmp_path: Path) -> None:
    parts: dict[str, Any] = {}
    for name, more in (("all", []), ("lora", _LORA)):
        file = tmp_path / name
        main(["plan", "--gpu", "h100", "--gpus", "2", "--no-layouts", "--json", str(file), "--", *BIG, *words, *more])
        parts[name] = json.loads(file.read_text())["asked"]["parts"]
    assert parts["lora"]["gradients"] + parts["lora"]["optimizer"] < 0.02 * parts["all"]["optimizer"]
    assert parts["all"]["weights"] < parts["lora"]["weights"] < 1.01 * parts["all"]["weights"]
    assert parts["lora"]["logits"] <= parts["all"]["logits"]


@pytest.mark.parametrize("share", [True, False])
def test_base_weights_are_no_matter_of_the_optimizer(share: bool) -> None:
    kind = {**sweep.KINDS["experts"], "model.moe_router_enable_expert_bias": False}
    adapters = {
        "peft.scheme": "lora",
        "peft.share_expert_adapters": share,
        "checkpoint.pretrained_checkpoint": "unread",
    }
    config = sweep.configure({**kind, **adapters}, 1)
    model, _, _ = build_parallel_model(config, Mesh(), torch.device("cpu"), torch.bfloat16)
    optimizer = Optimizer(model, config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert set(optimizer.weights.names) == trained
    assert sum(len(group["params"]) for group in optimizer.inner.param_groups) == len(trained)
    own = [name for name in trained if ".local_experts." in name]
    assert bool(own) is not share
    assert any(".mlp.experts.linear_fc1.adapter." in name for name in trained) is share
