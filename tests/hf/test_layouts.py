"""Every family in every kind of layout: logits, and what is saved, exported and loaded by transformers again."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lockstep.cli import main
from lockstep.hf.check import same_bits
from lockstep.hf.logits import TOLERANCE
from tests.hf.layout_runs import logits_then_train, starting_from, tokens
from tests.hf.tiny import saved
from tests.parallel.spawn import Turn, in_turn

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"model.tensor_model_parallel_size": 2},
    "pp2": {"model.pipeline_model_parallel_size": 2},
    "ep2": {"model.expert_model_parallel_size": 2},
    "fsdp2": {"dist.use_torch_fsdp2": True},
}
FAMILIES = {
    "gpt2": ("tp2", "pp2"),
    "llama32": ("tp2", "pp2", "fsdp2"),
    "qwen3": ("tp2", "pp2"),
    "mixtral": ("tp2", "pp2", "ep2"),
    "qwen3_moe": ("tp2", "pp2", "ep2"),
    "deepseek_v2": ("tp2", "pp2", "ep2", "fsdp2"),
}
CASES = [(family, layout) for family, layouts in FAMILIES.items() for layout in layouts]


@pytest.mark.slow
def test_every_family_in_every_layout_in_and_out(tmp_path, capsys) -> None:
    """Two processes read their parts of a Hugging Face folder and save them; what is exported is the folder's."""
    sources = {family: saved(tmp_path / family, family) for family in FAMILIES}
    turns = []
    for family, layout in CASES:
        where = tmp_path / f"{family}-{layout}"
        changes = {**starting_from(sources[family]), **LAYOUTS[layout], "checkpoint.save": str(where / "saves")}
        turns.append(Turn(2, logits_then_train, (changes, where / "run")))
    found = in_turn(turns)
    assert [
        (case, each) for case, results in zip(CASES, found, strict=True) for each in results if is_error(each)
    ] == []
    for (family, layout), results in zip(CASES, found, strict=True):
        source, where = sources[family], tmp_path / f"{family}-{layout}"
        theirs = AutoModelForCausalLM.from_pretrained(source)
        with torch.no_grad():
            expected = theirs(tokens()).logits
        for array in results:
            if array is not None:
                ours = torch.from_numpy(array)
                assert ((ours - expected).norm() / expected.norm()).item() <= TOLERANCE, (family, layout)
        assert any(array is not None for array in results)
        assert main(["convert", "check", str(source), str(where / "saves"), "--no-logits"]) == 0, capsys.readouterr()
        words = ["convert", "export", str(where / "saves"), str(where / "out"), "--hf-model", str(source)]
        assert main(words) == 0
        before, after = theirs.state_dict(), AutoModelForCausalLM.from_pretrained(where / "out").state_dict()
        assert before.keys() == after.keys()
        assert all(same_bits(before[name], after[name]) for name in before), (family, layout)


def is_error(result: Any) -> bool:
    return isinstance(result, BaseException)
