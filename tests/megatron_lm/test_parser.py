import json
from pathlib import Path

import pytest

from lockstep.config import all_fields
from lockstep.errors import ConfigError
from lockstep.megatron_lm.composites import COMPOSITES
from lockstep.megatron_lm.parser import flag_table, parse_flags
from tests.commands import FLAGS, TINY


def test_reference_flags_fill_the_tree() -> None:
    config = parse_flags(FLAGS)
    assert (config.model.num_layers, config.model.seq_length, config.optimizer.lr) == (2, 512, 3e-4)
    assert config.mixed_precision.bf16
    assert config.dataset.mock
    assert str(config.origin("model.num_layers")) == "command line (--num-layers)"


def test_every_flag_of_the_facts_is_known_with_its_default(shared: Path) -> None:
    facts = json.loads((shared / "facts/flags.json").read_text())["flags"]
    table = flag_table()
    missing = [name for fact in facts for name in [fact["flag"], *fact.get("aliases", [])] if name not in table]
    assert missing == []
    for fact in facts:
        info = all_fields().get(getattr(table[fact["flag"]], "path", ""))
        if info is None or fact["action"] in ("store_true", "store_false") or "effective_default" in fact:
            continue
        expected = fact["default"]
        if isinstance(info.default, list) and not isinstance(expected, list):
            expected = [expected]
        assert info.default == expected, fact["flag"]


def test_every_composite_says_what_is_done_with_it() -> None:
    for composite in COMPOSITES:
        assert composite.help or composite.holds or composite.refused, composite.flag
        for path in composite.sets:
            assert path in all_fields(), path


def test_unknown_flags_are_listed_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_flags([*TINY, "--num-layer", "2", "--hiden-size=3"])
    assert "unknown flag --num-layer. Did you mean --num-layers" in str(caught.value)
    assert "unknown flag --hiden-size=3. Did you mean --hidden-size" in str(caught.value)


def test_abbreviated_flags_are_unknown() -> None:
    with pytest.raises(ConfigError, match="unknown flag --num-attention-head"):
        parse_flags([*TINY, "--num-attention-head", "2"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-layers", "two"], "--num-layers: expected int, got 'two'"),
        (["--lr", "x"], "--lr: expected float, got 'x'"),
        (["--optimizer", "adamw"], "expected one of adam, sgd"),
        (["--empty-unused-memory-level", "3"], "expected one of 0, 1, 2"),
        (["--rampup-batch-size", "2", "b", "8"], "--rampup-batch-size: expected list of int, got '2 b 8'"),
        (["--num-layers"], "expected one argument"),
        (["stray"], "unexpected word 'stray'"),
        (["--num-query-groups", "2"], "no effect without --group-query-attention"),
        (["--swiglu", "--squared-relu"], "contradict each other"),
        (["--use-dist-ckpt"], "checkpoints have one format"),
    ],
)
def test_bad_words_give_one_message(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_flags([*TINY, *words])
    assert message in str(caught.value)


def test_no_data_is_an_error_on_this_door() -> None:
    with pytest.raises(ConfigError, match="no data set is named"):
        parse_flags([word for word in TINY if word != "--mock-data"])


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--swiglu"], "model.gated_linear_unit", True),
        (["--swiglu"], "model.activation_func", "silu"),
        (["--squared-relu"], "model.activation_func", "squared_relu"),
        (["--use-rotary-position-embeddings"], "model.position_embedding_type", "rope"),
        (["--group-query-attention"], "model.num_query_groups", 1),
        (["--group-query-attention", "--num-query-groups", "2"], "model.num_query_groups", 2),
        (["--grad-reduce-in-bf16"], "ddp.grad_reduce_in_fp32", False),
        (["--untie-embeddings-and-output-weights"], "model.share_embeddings_and_output_weights", False),
        (["--disable-bias-linear"], "model.add_bias_linear", False),
        (["--layernorm-epsilon", "1e-6"], "model.layernorm_epsilon", 1e-6),
        (["--rampup-batch-size", "2", "2", "8"], "train.rampup_batch_size", [2, 2, 8]),
        (["--lr=2e-3"], "optimizer.lr", 2e-3),
    ],
)
def test_flags_set_their_fields(words: list[str], path: str, value: object) -> None:
    assert parse_flags([*TINY, *words]).get(path) == value
