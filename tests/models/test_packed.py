"""Samples in one packed sequence have the losses that each has alone, for every kind of positions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.config.model import ModelConfig
from lockstep.models import GPTModel, build_model

CPU = torch.device("cpu")
LENGTHS = (7, 1, 12, 5)
PADDING = 7
_LATENT: dict[str, Any] = {
    "num_query_groups": 4,
    "multi_latent_attention": True,
    "rope_type": "yarn",
    "rotary_scaling_factor": 40.0,
    "qk_layernorm": True,
    "kv_lora_rank": 16,
    "qk_head_dim": 12,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 10,
}
KINDS = {"learned": {}, "rope": {}, "interleaved": {"rotary_interleaved": True}, "latent": _LATENT}


@pytest.fixture
def model_of(tiny: Callable[..., ModelConfig], llama_like: Callable[..., ModelConfig]) -> Callable[[str], GPTModel]:
    """Return a maker of a tiny model by its kind of positions."""

    def make(kind: str) -> GPTModel:
        config = (tiny if kind == "learned" else llama_like)(**KINDS[kind])
        model = build_model(config, seed=1, params_dtype=torch.float32, device=CPU).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return make


def packed(model: GPTModel, *, restart: bool = True, apart: bool = True) -> tuple[Tensor, Tensor]:
    """Return the losses [s] of samples in one sequence, without its padding, and those of each sample alone."""
    torch.manual_seed(3)
    samples = [torch.randint(0, 512, (2, length)) for length in LENGTHS]  # tokens and labels
    whole = torch.cat([*samples, torch.zeros(2, PADDING, dtype=torch.int64)], dim=1)
    lengths = [*LENGTHS, PADDING]
    places = torch.cat([torch.arange(length) for length in lengths]) if restart else torch.arange(sum(lengths))
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    with torch.no_grad():
        together = model(
            whole[:1],
            places[None],
            whole[1:],
            document_ids=documents[None] if apart else None,
            rotary_positions=places[None],
        )
        alone = [model(one[:1], torch.arange(one.shape[1])[None], one[1:]) for one in samples]
    return together[0, : sum(LENGTHS)], torch.cat(alone, dim=1)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_packed_samples_are_those_of_each_alone(model_of: Callable[[str], GPTModel], kind: str) -> None:
    together, alone = packed(model_of(kind))
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_across_samples_would_show(model_of: Callable[[str], GPTModel], kind: str) -> None:
    together, alone = packed(model_of(kind), apart=False)
    assert (together - alone)[LENGTHS[0] :].abs().max() > 1e-3


def test_positions_that_do_not_restart_would_show(model_of: Callable[[str], GPTModel]) -> None:
    together, alone = packed(model_of("learned"), restart=False)
    assert (together - alone)[LENGTHS[0] :].abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["rope", "interleaved", "latent"])
def test_rotary_positions_are_the_ones_given(model_of: Callable[[str], GPTModel], kind: str) -> None:
    """A shift of all positions changes nothing, so a sample is stretched instead."""
    model, tokens = model_of(kind), torch.arange(9)[None]
    with torch.no_grad():
        counted, shifted, stretched = (
            model(tokens, tokens, tokens, rotary_positions=places) for places in (None, tokens + 5, tokens * 3)
        )
    torch.testing.assert_close(counted, shifted, rtol=1e-4, atol=1e-4)
    assert (counted - stretched).abs().max() > 1e-3
