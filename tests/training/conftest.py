"""Small configurations and a small model for the trainer's tests."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lockstep.config import ConfigContainer, Origin, resolve

Configure = Callable[..., ConfigContainer]

_TINY: dict[str, Any] = {
    "model.num_layers": 1,
    "model.hidden_size": 16,
    "model.num_attention_heads": 2,
    "model.ffn_hidden_size": 32,
    # Mock data has a fixed number of tokens: long samples keep its index short.
    "model.seq_length": 256,
    "model.hidden_dropout": 0.0,
    "model.attention_dropout": 0.0,
    "train.micro_batch_size": 2,
    "train.global_batch_size": 4,
    "train.train_iters": 4,
    "validation.eval_iters": 2,
    "validation.eval_interval": 2,
    "dataset.mock": True,
    "tokenizer.tokenizer_type": "NullTokenizer",
    "tokenizer.vocab_size": 50,
    "model.make_vocab_size_divisible_by": 16,
    "optimizer.lr": 1e-2,
    "logger.log_interval": 1,
    "run.device": "cpu",
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Keep PyTorch to one thread: models this small only lose time by waiting for others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def configure() -> Configure:
    """Return a function that resolves the tiny configuration with changes by dotted path; None unsets a value."""

    def build(changes: dict[str, Any] | None = None) -> ConfigContainer:
        config = ConfigContainer()
        for path, value in {**_TINY, **(changes or {})}.items():
            config.set(path, value, Origin("python"))
        return resolve(config)

    return build


class TinyModel(torch.nn.Module):
    """A bigram model with the interface of the real one: per-token losses [b, s] from tokens and labels [b, s]."""

    def __init__(self, vocabulary: int = 11, width: int = 4, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.embedding = torch.nn.Parameter(torch.randn(vocabulary, width, generator=generator).to(dtype))
        self.output = torch.nn.Linear(width, vocabulary, dtype=dtype)
        with torch.no_grad():
            self.output.weight.copy_(torch.randn(vocabulary, width, generator=generator))
            self.output.bias.zero_()

    def forward(self, tokens: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        logits = self.output(self.embedding[tokens])
        return torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")


@pytest.fixture
def tiny_model() -> Callable[..., TinyModel]:
    """Return the class of the bigram model."""
    return TinyModel
