"""config.json and the settings of a model: what the recipes build, and what is refused or allowed by its key."""

from typing import Any

import pytest

from lockstep.config.derive import derive, interpolate
from lockstep.errors import UserError
from lockstep.hf.families import family_for
from lockstep.hf.settings import differences, to_config, to_hf
from lockstep.recipes.catalog import find_recipe, get_recipe
from tests.hf.tiny import MAKERS
from tests.recipes.published import PUBLISHED


@pytest.mark.parametrize("stem", sorted(PUBLISHED))
def test_a_recipe_computes_what_the_published_config_says(stem) -> None:
    name = f"{stem}_pretrain_config"
    recipe = get_recipe(name)
    interpolate(recipe)
    derive(recipe, find_recipe(name).gpus)
    published = {**PUBLISHED[stem].config, "max_position_embeddings": 4096}
    assert differences(recipe.model, published) == []
    assert to_config(published).model.vocab_size == recipe.model.vocab_size
    assert family_for(recipe.model).name == published["model_type"]


def tiny(family: str, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = MAKERS[family]().config.to_dict()
    return config | changes


def yarn(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": tiny("deepseek_v2")["rope_parameters"] | changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05 is not supported (supported: 1e-06)"),
        ({"topk_method": "group_limited_greedy"}, "topk_method = group_limited_greedy is not supported"),
        ({"norm_topk_prob": True}, "norm_topk_prob = True is not supported"),
        ({"scoring_func": "sigmoid"}, "scoring_func = sigmoid is not supported"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2 is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"n_shared_experts": None}, "n_shared_experts = None of moe_intermediate_size = 24 is not supported"),
        ({"num_experts_per_tok": None}, "does not state num_experts_per_tok"),
        (yarn(original_max_position_embeddings=8192), "original_max_position_embeddings = 8192 is not supported"),
        (yarn(beta_fast=16), "rope_parameters.beta_fast = 16 is not supported (supported: 32)"),
        (yarn(attention_factor=1.5), "attention_factor = 1.5 is not supported"),
        (yarn(factor=None), "does not state rope_parameters.factor"),
        (yarn(mscale_all_dim=None), "mscale = 0.707 with mscale_all_dim = None is not supported"),
        (yarn(rope_type="llama3"), "rope_parameters of type llama3 is not supported (supported: default, yarn)"),
    ],
)
def test_deepseek_v2_is_refused_by_the_key(changes, message) -> None:
    with pytest.raises(UserError) as caught:
        to_config(tiny("deepseek_v2", **changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {"q_lora_rank": None, "moe_aux_loss_coeff": [0.001], "moe_router_load_balancing_type": ["seq_aux_loss"]}),
        ({"seq_aux": False, "aux_loss_alpha": 0.01}, {"moe_router_load_balancing_type": ["aux_loss"]}),
        ({"routed_scaling_factor": 16.0}, {"moe_router_topk_scaling_factor": 16.0}),
        ({"first_k_dense_replace": 0}, {"moe_layer_freq": 1}),
        ({"rope_parameters": None, "rope_theta": 5e5}, {"rope_type": "rope", "rotary_base": 500000}),
        (yarn(mscale=None, mscale_all_dim=None), {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.0}),
    ],
)
def test_deepseek_v2_there_and_back(changes, settings) -> None:
    given = tiny("deepseek_v2", **changes)
    model = to_config(given).model
    assert {name: getattr(model, name) for name in settings} == settings
    written = to_hf(model, family_for(model), 70)
    assert differences(model, written) == []
    again = to_config(written).model
    assert again.moe_aux_loss_coeff == model.moe_aux_loss_coeff
    assert again.moe_router_load_balancing_type == model.moe_router_load_balancing_type


def test_no_word_on_the_query_latent_means_what_transformers_class_says() -> None:
    config = tiny("deepseek_v2")
    del config["q_lora_rank"]
    assert to_config(config).model.q_lora_rank == 1536


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layernorm_epsilon": 1e-5}, "layernorm_epsilon is 1e-05, in config.json 1e-06"),
        ({"moe_shared_expert_intermediate_size": 50}, "moe_shared_expert_intermediate_size is 50, in config.json 48"),
        ({"moe_layer_freq": [1, 0]}, "layers with experts is [0], in config.json [0, 1]"),
        ({"moe_router_num_groups": 2, "moe_router_group_topk": 1}, "moe_router_num_groups is 2, in config.json None"),
        ({"num_moe_experts": None}, "no family has multi-latent attention without experts"),
    ],
)
def test_what_deepseek_v2_cannot_say_is_not_exported(changes, message) -> None:
    model = to_config(tiny("deepseek_v2")).model
    for name, value in changes.items():
        setattr(model, name, value)
    with pytest.raises(UserError) as caught:
        to_hf(model, family_for(model), 70)
    assert message in str(caught.value)


def test_one_group_of_all_experts_and_a_factor_of_one_are_no_difference() -> None:
    config = tiny("deepseek_v2")
    model = to_config(config).model
    model.moe_router_num_groups = model.moe_router_group_topk = 1
    model.moe_router_topk_scaling_factor = 1.0
    model.kv_channels = 64
    assert differences(model, config) == []
    model.moe_router_topk_scaling_factor = 2.0
    assert differences(model, config) == ["moe_router_topk_scaling_factor is 2.0, in config.json 1.0"]
