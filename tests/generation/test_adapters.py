"""Generation with adapters: what the peft library generates, without a merge on disk before it."""

import shutil
from pathlib import Path

import pytest
import torch

from lockstep.cli import main
from lockstep.generation.decode import generate
from lockstep.generation.load import load
from lockstep.guard import USER_ERROR
from tests.hf.tiny import saved, with_tokenizer
from tests.peft.test_hf import theirs_at

PROMPTS = [[3, 11, 4, 12, 5], [27, 18], [31]]
NEW = 10


def ours(folder: Path, base: Path | None = None) -> list[list[int]]:
    model = load(folder, token_ids=True, base=base).model
    return [c.tokens for c in generate(model, PROMPTS, max_new_tokens=NEW)]


@pytest.mark.parametrize("dora", [False, True])
def test_tokens_are_those_of_peft(dora: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = with_tokenizer(saved(tmp_path / "hf", "qwen3"))
    model = theirs_at(tmp_path / "peft", base, ["q_proj", "o_proj", "down_proj"], dora=dora).eval()
    model.generation_config.eos_token_id = None
    expected = [
        model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, use_cache=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    adapters = tmp_path / "adapters"
    assert main(["adapter", "import", str(tmp_path / "peft"), str(adapters), "--base", str(base)]) == 0
    assert ours(adapters) == expected != ours(base)
    assert load(adapters).tokenizer.tokenize("w5 w6") == [5, 6]

    shutil.move(base, tmp_path / "moved")
    asked = ["generate", str(adapters), "--token-ids", "--prompt", "3 11", "--max-new-tokens", "2"]
    assert main(asked) == USER_ERROR
    assert "are gone; name where they are with --base" in capsys.readouterr().err
    assert main([*asked, "--base", str(tmp_path / "moved")]) == 0
    assert ours(adapters, tmp_path / "moved") == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hf", "--base", "hf"], "--base hf: hf holds whole weights and no adapters; drop it"),
        (["ours", "--base", "hf"], "--base hf: ours holds whole weights and no adapters; drop it"),
        (["ours/iter_0000000", "--ckpt-step", "0"], "--ckpt-step 0: ours/iter_0000000 is one checkpoint"),
        (["ours", "--ckpt-step", "3"], "ours has no checkpoint of iteration 3"),
    ],
)
def test_mistakes_give_one_message(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("hf"), "llama")
    assert main(["convert", "import", "hf", "ours"]) == 0
    assert main(["generate", *words, "--token-ids", "--prompt", "1 2"]) == USER_ERROR
    assert message in capsys.readouterr().err
