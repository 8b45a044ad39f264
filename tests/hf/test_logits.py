"""What the comparison of logits says of models that are not the same: where they part, and what rounding excuses."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.hf import families
from lockstep.hf.checkpoint import Checkpoint
from lockstep.hf.convert import import_model, open_weights
from lockstep.hf.folder import Folder
from lockstep.hf.logits import Finding, compare_logits, next_tokens
from lockstep.models import decoder
from tests.hf.tiny import saved


@dataclass(frozen=True)
class Altered(Checkpoint):
    """A checkpoint that gives one parameter with its rows reversed."""

    name: str = ""

    def whole(self, name: str) -> Tensor:
        value = super().whole(name)
        return value.flip(0) if name == self.name else value


def found(folder: Path, family: str, altered: str = "") -> dict[str, Finding]:
    source = saved(folder / "hf", family)
    checkpoint = Checkpoint.open(import_model(source, folder / "ours"))
    weights = open_weights(Folder(source), checkpoint.model)
    other = Altered(checkpoint.folder, checkpoint.model, checkpoint.tensors, altered)
    return {finding.what: finding for finding in compare_logits(weights, other, tokens=48)}


ATTENTION, MLP = "decoder.layers.1.self_attention", "decoder.layers.1.mlp"


@pytest.mark.parametrize(
    ("family", "altered", "named"),
    [
        (
            "gpt2",
            f"{ATTENTION}.linear_qkv.bias",
            "the attention of layer 1: either the places of transformer.h.1.attn.",
        ),
        ("llama", f"{ATTENTION}.linear_proj.weight", "the places of model.layers.1.self_attn.o_proj.weight, "),
        (
            "mixtral",
            f"{MLP}.router.weight",
            "the MLP of layer 1: either the places of model.layers.1.block_sparse_moe.",
        ),
        ("deepseek_v2", f"{MLP}.shared_experts.linear_fc1.weight", "the MLP of layer 1"),
        ("deepseek_v2", f"{ATTENTION}.kv_layernorm.weight", "model.layers.1.self_attn.kv_a_layernorm.weight"),
        ("qwen3", "embedding.word_embeddings.weight", "the embeddings differ"),
        ("qwen3", "output_layer.weight", "in the final norm or the output layer"),
    ],
)
def test_the_first_block_that_differs_is_named(family, altered, named, tmp_path) -> None:
    finding = found(tmp_path, family, altered)["logits in float32"]
    assert not finding.same
    assert named in finding.result


def test_modules_of_another_name_are_no_error(tmp_path, monkeypatch) -> None:
    renamed = dataclasses.replace(families.QWEN3, blocks={**families.QWEN3.blocks, "mlp": "model.layers.{layer}.ffn"})
    monkeypatch.setitem(families.FAMILIES, "qwen3", renamed)
    finding = found(tmp_path, "qwen3", f"{MLP}.linear_fc2.weight")["logits in float32"]
    assert finding.result.endswith("the weights are the same, but the models compute something else")


def test_a_mistake_in_bfloat16_alone_shows(tmp_path, monkeypatch) -> None:
    right = decoder.rotary_cos_sin

    def wrong(config: Any, positions: Tensor, dtype: torch.dtype) -> Any:
        return right(config, positions * 2 if dtype == torch.bfloat16 else positions, dtype)

    monkeypatch.setattr(decoder, "rotary_cos_sin", wrong)
    findings = found(tmp_path, "qwen3")
    assert [what for what, finding in findings.items() if not finding.same] == ["next token in bfloat16"]


def one_hot_logits(*margins: float) -> Tensor:
    """Return logits [1, s, 4] of positions whose second token leads the third by a margin."""
    logits = torch.zeros(1, len(margins), 4)
    logits[..., 1] = torch.tensor(margins)
    return logits


def test_rounding_excuses_close_tokens_alone() -> None:
    exact = one_hot_logits(*[1.0] * 9, 0.1)
    theirs = exact + 0.1  # no logit moves by more
    close, far = exact.clone(), exact.clone()
    close[0, 9, 2] = 0.2
    far[0, 0, 2] = 1.2
    assert next_tokens(exact, theirs, theirs) == next_tokens(exact, theirs, exact)
    excused, wrong = next_tokens(exact, theirs, close), next_tokens(exact, theirs, far)
    assert excused.same
    assert excused.result == (
        "the same for 9 of 9 positions that rounding (about 0.1) cannot decide, and for 0 of the other 1"
    )
    assert not wrong.same
    assert wrong.result.startswith("the same for 8 of 9 positions")


def test_one_position_that_rounding_moves_far_excuses_itself_alone() -> None:
    exact = one_hot_logits(*[1.0] * 20)
    theirs = exact + 0.01
    theirs[0, 3] += 5.0  # as where another expert is chosen
    there, elsewhere = exact.clone(), exact.clone()
    there[0, 3, 2] = elsewhere[0, 4, 2] = 2.0
    assert next_tokens(exact, theirs, there).same
    assert not next_tokens(exact, theirs, elsewhere).same


def test_no_evidence_is_no_proof() -> None:
    exact = one_hot_logits(0.1, 0.1)
    finding = next_tokens(exact, exact + 0.2, exact)
    assert not finding.same
    assert finding.result == "there is no position that rounding (about 0.2) cannot decide; give more --tokens"
