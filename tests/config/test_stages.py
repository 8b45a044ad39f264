import re

import pytest

from lockstep.config import ConfigContainer, Origin, resolve
from lockstep.config.model import ModelConfig
from lockstep.config.stages import stage_layers
from lockstep.errors import ConfigError
from lockstep.megatron_lm.parser import parse_flags

JOB = (
    "--num-layers 8 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 1 --global-batch-size 8 --train-iters 1 --lr 1e-3 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 100"
).split()


def counts(stages: int, chunks: int | None = None, *, layers: int = 8, **settings) -> list[int]:
    model = ModelConfig(
        num_layers=layers,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks,
        **settings,
    )
    spans = stage_layers(model)
    assert [number for span in spans for number in span] == list(range(layers))
    return [len(span) for span in spans]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"stages": 1}, [8]),
        ({"stages": 4}, [2, 2, 2, 2]),
        ({"stages": 2, "chunks": 2}, [2, 2, 2, 2]),
        ({"stages": 2, "num_layers_in_first_pipeline_stage": 3}, [3, 5]),
        ({"stages": 4, "num_layers_in_last_pipeline_stage": 2}, [2, 2, 2, 2]),
        (
            {"stages": 3, "num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 1},
            [1, 6, 1],
        ),
        ({"stages": 2, "chunks": 2, "num_layers_in_first_pipeline_stage": 2}, [1, 3, 1, 3]),
        ({"stages": 3, "account_for_embedding_in_pipeline_split": True}, [2, 3, 3]),
        ({"stages": 3, "account_for_loss_in_pipeline_split": True}, [3, 3, 2]),
        ({"stages": 2, "pipeline_model_parallel_layout": "Et*3|t*5L"}, [3, 5]),
        ({"stages": 2, "chunks": 2, "pipeline_model_parallel_layout": "E,(t*3|)*2,t*2|L"}, [3, 3, 2, 0]),
    ],
)
def test_layers_are_shared_out(given, expected) -> None:
    assert counts(**given) == expected


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"stages": 3}, "8 layers cannot be shared out evenly to 3"),
        ({"stages": 2, "num_layers_in_first_pipeline_stage": 9}, "cannot be shared out"),
        ({"stages": 2, "chunks": 3}, "not divisible by its 3 virtual"),
        ({"stages": 3, "num_layers_in_first_pipeline_stage": 8}, "no layers"),
        ({"stages": 2, "pipeline_model_parallel_layout": "t*3|t*5L"}, "must begin with E"),
        ({"stages": 2, "pipeline_model_parallel_layout": "Et*3|x5L"}, "is not written as"),
        ({"stages": 2, "pipeline_model_parallel_layout": "Et*3|t*4L"}, "has 7 layers, the model 8"),
        ({"stages": 4, "pipeline_model_parallel_layout": "Et*3|t*5L"}, "has 2 stages, there are 4"),
    ],
)
def test_layers_that_cannot_be_shared_out(given, part: str) -> None:
    with pytest.raises(ValueError, match=re.escape(part)):
        counts(**given)


def test_layers_of_a_virtual_stage_become_a_number_of_virtual_stages() -> None:
    flags = [*JOB, "--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage"]
    config = resolve(parse_flags([*flags, "1"]), world_size=2)
    assert config.model.virtual_pipeline_model_parallel_size == 4
    assert config.origin("model.virtual_pipeline_model_parallel_size").detail == flags[-1]
    for words, part in ((["3"], "does not divide the 4 layers"), (["none"], "expected int above 0")):
        with pytest.raises(ConfigError, match=part):
            parse_flags([*flags, *words])
    with pytest.raises(ConfigError, match="exclude each other"):
        parse_flags([*flags, "1", "--num-virtual-stages-per-pipeline-rank", "2"])


def test_a_layout_says_how_many_virtual_stages_there_are() -> None:
    flags = [*JOB, "--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "Et|t*3|t*3|tL"]
    assert resolve(parse_flags(flags), world_size=2).model.virtual_pipeline_model_parallel_size == 2


@pytest.mark.parametrize(
    ("flags", "world", "part"),
    [
        ("--pipeline-model-parallel-size 3", 3, "cannot be shared out evenly to 3"),
        ("--pipeline-model-parallel-size 2", 3, "3 processes are not a multiple of --pipeline-model-parallel-size = 2"),
        ("--decoder-first-pipeline-num-layers 3", 1, "has no effect with"),
        ("--num-virtual-stages-per-pipeline-rank 2", 1, "has no effect with"),
        (
            "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 9",
            2,
            "use a multiple of 2",
        ),
        ("--pipeline-model-parallel-size 0", 1, "give 1 or more"),
    ],
)
def test_a_pipeline_that_cannot_be(flags: str, world: int, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(parse_flags([*JOB, *flags.split()]), world_size=world)
    assert part in str(caught.value)


def test_processes_of_a_pipeline_share_a_micro_batch() -> None:
    config = ConfigContainer()
    for path, value in {
        **dict.fromkeys(("model.num_layers", "model.num_attention_heads"), 2),
        "model.hidden_size": 8,
        "model.seq_length": 8,
        "model.pipeline_model_parallel_size": 2,
        "train.micro_batch_size": 3,
        "train.train_iters": 1,
        "optimizer.lr": 1e-3,
        "dataset.mock": True,
    }.items():
        config.set(path, value, Origin("python"))
    assert resolve(config, world_size=4).train.global_batch_size == 6
