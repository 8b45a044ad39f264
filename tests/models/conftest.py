"""Tiny resolved configs, and both ways of multiplying on one machine."""

from collections.abc import Callable, Iterator

import pytest
import torch

from lockstep.config.model import ModelConfig
from lockstep.models import ops


@pytest.fixture
def tiny() -> Callable[..., ModelConfig]:
    """Return a maker of resolved configs of a tiny GPT; keyword arguments override."""

    def make(**overrides: object) -> ModelConfig:
        values: dict[str, object] = {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 4,
            "ffn_hidden_size": 112,
            "kv_channels": 8,
            "vocab_size": 512,
            "max_position_embeddings": 64,
            "seq_length": 64,
            "embedding_init_method_std": 0.02,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }
        return ModelConfig(**{**values, **overrides})  # type: ignore[arg-type]

    return make


@pytest.fixture
def llama_like(tiny: Callable[..., ModelConfig]) -> Callable[..., ModelConfig]:
    """Return a maker of resolved configs of a tiny Llama; keyword arguments override."""

    def make(**overrides: object) -> ModelConfig:
        values: dict[str, object] = {
            "num_query_groups": 2,
            "gated_linear_unit": True,
            "activation_func": "silu",
            "normalization": "RMSNorm",
            "add_bias_linear": False,
            "position_embedding_type": "rope",
            "share_embeddings_and_output_weights": False,
        }
        return tiny(**{**values, **overrides})

    return make


@pytest.fixture
def use_mode(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a setter of the way low-precision products are computed, in place of the measured one."""

    def use(mode: str) -> None:
        monkeypatch.setattr(ops, "_measured_mode", lambda *_: mode)

    return use


@pytest.fixture(autouse=True)
def _seeded_on_one_thread() -> Iterator[None]:
    """Tiny tensors lose more time to waiting threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def moe_like(llama_like: Callable[..., ModelConfig]) -> Callable[..., ModelConfig]:
    """Return a maker of resolved configs of a tiny model with experts; keyword arguments override."""

    def make(**overrides: object) -> ModelConfig:
        values: dict[str, object] = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 48}
        return llama_like(**{**values, **overrides})

    return make
