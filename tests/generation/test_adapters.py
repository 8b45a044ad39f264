"""Generation with adapters: what the peft library generates, without a merge on disk before it."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch

from lockstep.cli import main
from lockstep.generation.decode import generate
from lockstep.generation.load import _Stored, _tokenizer_settings, load
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


def test_a_chat_goes_through_the_template_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = with_tokenizer(saved(tmp_path / "hf", "llama"))
    (tmp_path / "rows.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]}\n'
    )
    words = (
        f"--model vanilla_gpt --mode lora --dataset local-jsonl dataset.data_path=[{tmp_path / 'rows.jsonl'}] -sl 16 "
        f"-ms 1 -gb 1 --warmup_iters 0 validation.eval_iters=0 run.device=cpu run.dir={tmp_path / 'run'} "
        f"dataset.hf_validation_proportion=null --pretrained_checkpoint {base} --save_interval 1 "
        f"--save_dir {tmp_path / 'saved'}"
    )
    (tmp_path / "template.jinja").write_text(
        "{% for m in messages %}{{ 'w7' if m.role == 'user' else 'w8' }} {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}w8{% endif %}"
    )
    assert main(["train", *shlex.split(words), f"tokenizer.chat_template={tmp_path / 'template.jinja'}"]) == 0
    for moved in ([], ["--base", str(tmp_path / "moved")]):
        capsys.readouterr()
        asked = ["--chat", "--prompt", "w9", "--max-new-tokens", "1"]
        assert main(["generate", str(tmp_path / "saved"), *moved, *asked]) == 0
        assert capsys.readouterr().out.startswith("[1] w7 w9 w8\n")
        if not moved:
            shutil.move(base, tmp_path / "moved")


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


def test_a_checkpoint_cannot_let_the_code_of_a_tokenizer_run(tmp_path: Path) -> None:
    model = load(saved(tmp_path / "hf", "llama"), token_ids=True).model
    said = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "there", "trust_remote_code": True}
    stored = _Stored(model.config, lambda name: torch.empty(0), "float32", None, {"tokenizer": said})
    found = _tokenizer_settings(stored, tmp_path)
    assert (found.tokenizer_model, found.trust_remote_code) == ("there", False)
