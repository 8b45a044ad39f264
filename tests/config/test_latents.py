"""What is wrong with the settings of multi-latent attention, and what follows from them."""

import pytest

from lockstep.config import resolve
from lockstep.config.container import ConfigContainer
from lockstep.errors import ConfigError
from lockstep.megatron_lm.parser import parse_flags
from tests.config.test_experts import JOB, problem

LATENT = "--multi-latent-attention --position-embedding-type rope"


def resolved(flags: str) -> ConfigContainer:
    return resolve(parse_flags([*JOB, *flags.split()]))


def test_positions_are_yarn_unless_said_otherwise() -> None:
    assert resolved(LATENT).model.rope_type == "yarn"
    assert resolved(f"{LATENT} --rope-type rope").model.rope_type == "rope"
    assert resolved("--position-embedding-type rope").model.rope_type is None


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--kv-lora-rank 16", "--kv-lora-rank has no effect without model.multi_latent_attention"),
        ("--mscale 0.707", "--mscale has no effect without"),
        ("--rope-type yarn", "--rope-type = yarn needs model.multi_latent_attention"),
        (f"{LATENT} --q-lora-rank 0", "--q-lora-rank = 0: give 1 or more"),
        (f"{LATENT} --qk-pos-emb-head-dim 7", "--qk-pos-emb-head-dim = 7 is not even"),
        (f"{LATENT} --rotary-scaling-factor 0.5", "--rotary-scaling-factor = 0.5: give 1 or more"),
        (f"{LATENT} --mscale -1", "--mscale = -1.0: give 0 or more"),
        (f"{LATENT} --group-query-attention --num-query-groups 2", "every head has its own keys; give 4, or drop it"),
        (f"{LATENT} --rotary-interleaved", "--rotary-interleaved has no effect on --multi-latent-attention"),
        (f"{LATENT} --use-rope-scaling", "--use-rope-scaling has no effect on"),
        (f"{LATENT} --mla-down-proj-fusion", "--mla-down-proj-fusion = true: one weight in place of two"),
        (f"{LATENT} --tensor-model-parallel-size 3", "--num-attention-heads = 4 is not divisible by"),
        ("--multi-latent-attention --position-embedding-type yarn", "positions of model.rope_type (--rope-type)"),
        (
            "--recompute-granularity selective --recompute-modules mla_up_proj",
            "mla_up_proj is part of multi-latent attention; use some of core_attn, mlp, layernorm",
        ),
    ],
)
def test_what_is_wrong_is_said(flags: str, part: str) -> None:
    assert part in problem(*flags.split())


def test_modules_of_latents_are_not_offered_to_others() -> None:
    sentence = problem(*"--recompute-granularity selective --recompute-modules nothing".split())
    assert "core_attn" in sentence
    assert "mla_up_proj" not in sentence


def test_what_deepseek_asks_for_is_accepted() -> None:
    flags = f"{LATENT} --qk-layernorm --rotary-scaling-factor 40 --mscale 0.707 --mscale-all-dim 0.707 --q-lora-rank 8"
    config = resolved(f"{flags} --recompute-granularity selective --recompute-modules mla_up_proj core_attn")
    assert config.model.recompute_modules == ["mla_up_proj", "core_attn"]
    with pytest.raises(ConfigError, match="there is no module mla_down_proj"):
        resolved(f"{LATENT} --recompute-granularity selective --recompute-modules mla_down_proj")
