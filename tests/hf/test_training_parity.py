"""Training beside transformers: the same weights and batches, 20 steps, losses and gradient norms of every one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import AutoModelForCausalLM

from lockstep.config import ConfigContainer, Origin, resolve
from lockstep.hf.bridge import AutoBridge
from lockstep.hf.convert import open_weights
from lockstep.hf.logits import build
from lockstep.training.feed import Batch
from lockstep.training.optimizer import Optimizer, is_decayed
from lockstep.training.passes import WholePasses
from lockstep.training.schedule import build_schedules
from lockstep.training.step import TrainStep
from tests.hf.tiny import saved

STEPS, BATCH, MICRO, LENGTH = 20, 4, 2, 24
LIMIT = 1e-5
TRAINING: dict[str, Any] = {
    "model.seq_length": LENGTH,
    "model.hidden_dropout": 0.0,
    "model.attention_dropout": 0.0,
    "train.micro_batch_size": MICRO,
    "train.global_batch_size": BATCH,
    "train.train_iters": STEPS,
    "validation.eval_iters": 0,
    "tokenizer.tokenizer_type": "NullTokenizer",
    "tokenizer.vocab_size": 70,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_grad": 1.0,
    "scheduler.lr_decay_style": "cosine",
    "scheduler.lr_warmup_iters": 3,
    "dataset.mock": True,
    "run.device": "cpu",
}
RATES = {"sgd": 0.1, "adam": 1e-3}
FAMILIES = ["gpt2", "llama32", "qwen3", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v2_large"]


@dataclass(frozen=True)
class Steps:
    """What 20 steps reported."""

    losses: list[float]
    grad_norms: list[float]


def batches() -> list[Tensor]:
    """Return the samples [b, s + 1] of every step; half of each repeats earlier ones, so that losses fall."""
    generator = torch.Generator().manual_seed(21)
    again = torch.randint(0, 70, (BATCH // 2, LENGTH + 1), generator=generator)
    fresh = torch.randint(0, 70, (STEPS, BATCH // 2, LENGTH + 1), generator=generator)
    return [torch.cat([again, each]) for each in fresh]


def configured(source: Path, optimizer: str, changes: dict[str, Any] | None = None) -> ConfigContainer:
    """Return the settings of the folder's model with those of training, resolved."""
    config = AutoBridge.from_hf_pretrained(source).to_config()
    rate = {"optimizer.optimizer": optimizer, "optimizer.lr": RATES[optimizer], "optimizer.min_lr": 1e-5}
    if config.model.num_moe_experts is not None:
        rate["model.moe_aux_loss_coeff"] = [0.0]
    for path, value in {**TRAINING, **rate, **(changes or {})}.items():
        config.set(path, value, Origin("python"))
    return resolve(config)


def ours(source: Path, config: ConfigContainer) -> Steps:
    """Train with Lockstep."""
    weights = open_weights(AutoBridge.from_hf_pretrained(source).folder, config.model)
    model = build(config.model, weights.whole)
    step = TrainStep(WholePasses(model), Optimizer(model, config))
    rate, decay = build_schedules(config)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    losses, norms = [], []
    for number, text in enumerate(batches()):
        batch = Batch(text[:, :-1], text[:, 1:], torch.ones(BATCH, LENGTH), positions)
        done = number * BATCH
        result = step(batch, config.train.micro_batch_size or 0, rate(done), decay(done))
        assert result.grad_norm is not None
        losses.append(result.lm_loss)
        norms.append(result.grad_norm)
    return Steps(losses, norms)


def theirs(source: Path, config: ConfigContainer, router_loss: float = 0.0) -> Steps:
    """Train the model of transformers with the optimizers of PyTorch, in the plainest way."""
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if config.model.add_bias_linear else {}
    model = AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager", **dropout).train()
    split: dict[bool, list[Tensor]] = {True: [], False: []}
    for parameter in model.parameters():
        split[is_decayed("", parameter.shape, False)].append(parameter)
    s = config.optimizer
    groups = [{"params": params, "decayed": decayed} for decayed, params in split.items()]
    optimizer: torch.optim.Optimizer
    if s.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=s.sgd_momentum)
    else:
        optimizer = torch.optim.AdamW(groups, betas=(s.adam_beta1, s.adam_beta2), eps=s.adam_eps)
    rate, decay = build_schedules(config)
    losses, norms = [], []
    for number, text in enumerate(batches()):
        optimizer.zero_grad()
        output = model(text[:, :-1], **({"output_router_logits": True} if router_loss else {}))
        loss = F.cross_entropy(output.logits.flatten(0, 1), text[:, 1:].flatten())
        (loss + router_loss * output.aux_loss if router_loss else loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = rate(number * BATCH)
            group["weight_decay"] = decay(number * BATCH) if group["decayed"] else 0.0
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return Steps(losses, norms)


def furthest(a: list[float], b: list[float]) -> float:
    """Return the largest relative difference of two lists."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def furthest_of(a: Steps, b: Steps) -> float:
    """Return that of losses and gradient norms."""
    return max(furthest(a.losses, b.losses), furthest(a.grad_norms, b.grad_norms))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradient_norms_are_those_of_transformers(family, optimizer, tmp_path) -> None:
    source = saved(tmp_path / "hf", family)
    config = configured(source, optimizer)
    mine, hf = ours(source, config), theirs(source, config)
    assert hf.losses[-1] < hf.losses[0] - 0.3
    assert max(hf.grad_norms) > 1.0  # so they are clipped
    assert furthest_of(mine, hf) < LIMIT


def test_the_loss_for_an_even_load_is_that_of_transformers_in_a_model_with_one_router(tmp_path) -> None:
    """There transformers counts every token as often as it has experts; over more routers it pools what they choose."""
    source = saved(tmp_path / "hf", "qwen3_moe")
    settings = {"train.micro_batch_size": BATCH, "model.moe_aux_loss_coeff": [0.05 * 2]}
    config = configured(source, "sgd", settings)
    assert furthest_of(ours(source, config), theirs(source, config, router_loss=0.05)) < LIMIT
    unequal = configured(source, "sgd", {**settings, "model.moe_aux_loss_coeff": [0.05]})
    assert furthest_of(ours(source, unequal), theirs(source, config, router_loss=0.05)) > LIMIT


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Steps]]:
    """Return a maker of a family's folder and what transformers does with it, each made once."""

    @cache
    def make(family: str) -> tuple[Path, Steps]:
        source = saved(tmp_path_factory.mktemp(family) / "hf", family)
        return source, theirs(source, configured(source, "adam"))

    return make


@pytest.mark.parametrize(
    ("family", "mistake"),
    [
        ("gpt2", {"model.bias_activation_fusion": False}),
        ("gpt2", {"model.layernorm_epsilon": 1e-6}),
        ("llama32", {"model.rotary_base": 10000}),
        ("llama32", {"model.rotary_interleaved": True}),
        ("llama32", {"model.layernorm_epsilon": 1e-6}),
        ("qwen3", {"model.layernorm_epsilon": 1e-5}),
        ("mixtral", {"model.moe_router_pre_softmax": True}),
        ("mixtral", {"model.moe_router_score_function": "sigmoid"}),
        ("qwen3_moe", {"model.moe_router_pre_softmax": False}),
        ("qwen3_moe", {"model.moe_aux_loss_coeff": [0.001]}),
        ("deepseek_v2", {"model.moe_router_pre_softmax": False}),
        ("deepseek_v2", {"model.mscale_all_dim": 0.0}),
        ("deepseek_v2", {"model.rotary_scaling_factor": 20.0}),
        ("deepseek_v2_large", {"model.moe_router_topk_scaling_factor": None}),
        ("qwen3", {"optimizer.adam_beta2": 0.95}),
        ("qwen3", {"optimizer.adam_eps": 1e-6}),
        ("qwen3", {"optimizer.clip_grad": 0.0}),
        ("qwen3", {"optimizer.weight_decay": 0.0, "scheduler.start_weight_decay": None}),
        ("qwen3", {"scheduler.lr_warmup_iters": 2}),
    ],
)
def test_a_mistake_shows(family, mistake, expected) -> None:
    source, hf = expected(family)
    assert furthest_of(ours(source, configured(source, "adam", mistake)), hf) > 2 * LIMIT
