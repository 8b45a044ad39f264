"""Generation: token by token what transformers generates, whatever the batch."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lockstep.cli import main
from lockstep.errors import UserError
from lockstep.generation import decode
from lockstep.generation.decode import generate
from lockstep.generation.load import load
from lockstep.generation.sampling import Sampling, choose, ranked
from lockstep.guard import USER_ERROR
from tests.hf.tiny import MAKERS, saved, with_tokenizer

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27, 18], [31], [11, 12, 13, 14, 15]]
NEW = 12


@pytest.fixture(scope="module", params=list(MAKERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of every family."""
    return saved(tmp_path_factory.mktemp("hf") / request.param, request.param)


def ours(folder: Path, prompts: list[list[int]], **more: Any) -> list[list[int]]:
    loaded = load(folder, token_ids=True)
    return [c.tokens for c in generate(loaded.model, prompts, max_new_tokens=NEW, **more)]


def theirs(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Return what transformers generates for one prompt at a time, without stop tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    found = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        found.append(ids[0, len(prompt) :].tolist())
    return found


def test_greedy_is_that_of_transformers_for_prompts_of_different_lengths(folder: Path) -> None:
    expected = theirs(folder, PROMPTS)
    assert len({token for text in expected for token in text}) > 2  # not one token over and over
    assert ours(folder, PROMPTS) == expected
    assert ours(folder, PROMPTS, batch_size=3) == expected


def test_logits_of_a_batch_with_kept_keys_are_those_of_each_prompt_alone(folder: Path) -> None:
    model = load(folder, token_ids=True).model
    texts = [[*prompt, 7, 8] for prompt in PROMPTS]
    batch = decode._Batch(model, PROMPTS, room=2)
    found = [batch.logits()]
    for column in (-2, -1):
        batch.append(torch.tensor([text[column] for text in texts]))
        found.append(batch.logits())
    for row, text in enumerate(texts):
        tokens = torch.tensor([text])
        with torch.no_grad():
            alone = model(tokens, torch.arange(len(text))[None])[0, -3:]
        torch.testing.assert_close(torch.stack(found)[:, row], alone, rtol=1e-5, atol=1e-5)


def test_keys_are_turned_by_their_place_in_the_prompt_and_not_in_the_batch(tmp_path: Path) -> None:
    model = load(saved(tmp_path / "hf", "llama"), token_ids=True).model
    batch, alone = (decode._Batch(model, prompts, room=1) for prompts in (PROMPTS, [PROMPTS[1]]))
    batch.logits()
    alone.logits()
    keys, expected = (found._sequence._kept[0] for found in (batch, alone))
    padding = len(PROMPTS[0]) - len(PROMPTS[1])
    torch.testing.assert_close(keys[1, padding : len(PROMPTS[0])], expected[0, : len(PROMPTS[1])])


def test_a_stop_token_ends_its_prompt_alone(folder: Path) -> None:
    free = ours(folder, PROMPTS)
    stop = free[0][1]
    found = ours(folder, PROMPTS, stop=frozenset([stop]))
    for text, whole in zip(found, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else NEW
        assert text == whole[:end]


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        (Sampling(temperature=0.7), []),
        (Sampling(temperature=1.3, top_k=5), [TopKLogitsWarper(5)]),
        (Sampling(temperature=0.9, top_p=0.6), [TopPLogitsWarper(0.6)]),
        (Sampling(temperature=2.0, top_k=9, top_p=0.8), [TopKLogitsWarper(9), TopPLogitsWarper(0.8)]),
    ],
)
def test_probabilities_are_those_of_transformers(settings: Sampling, warpers: list[Any]) -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)) * 2
    processors: Any = LogitsProcessorList([TemperatureLogitsWarper(settings.temperature), *warpers])
    warped = processors(torch.zeros(3, 1).long(), logits.double())
    tokens, shares = ranked(logits, settings)
    found = torch.zeros_like(shares).scatter(-1, tokens, shares)
    torch.testing.assert_close(found, warped.softmax(-1), rtol=1e-9, atol=1e-12)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    settings = Sampling(temperature=1.0, top_k=4)
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0, 0.5, 1.5]])
    tokens, shares = ranked(logits, settings)
    number = 4000
    drawn = choose(logits.expand(number, -1), settings, [settings.chance(n) for n in range(number)])
    expected = torch.zeros_like(shares).scatter(-1, tokens, shares)[0]
    found = torch.bincount(drawn, minlength=6).double() / number
    assert found[[1, 3]].tolist() == [0, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


def test_a_seed_fixes_the_text_whatever_the_batch(tmp_path: Path) -> None:
    folder = saved(tmp_path / "hf", "llama")
    first = ours(folder, PROMPTS, sampling=Sampling(temperature=1.0))
    assert first == ours(folder, PROMPTS, sampling=Sampling(temperature=1.0), batch_size=1)
    assert first != ours(folder, PROMPTS, sampling=Sampling(temperature=1.0, seed=2))
    twice = ours(folder, [PROMPTS[0]] * 2, sampling=Sampling(temperature=1.0))
    assert twice[0] != twice[1]


def test_rows_of_padding_are_never_chosen(tmp_path: Path) -> None:
    folder = saved(tmp_path / "hf", "llama")
    chosen = {token for text in ours(folder, PROMPTS, vocabulary=9) for token in text}
    assert max(chosen) < 9


def test_the_command_reads_text_and_chats_and_stops_as_the_folder_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_tokenizer(saved(tmp_path / "hf", "qwen3"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    output, prompts = tmp_path / "out.jsonl", tmp_path / "prompts.jsonl"
    talk = [
        {"role": "user", "content": "w9"},
        {"role": "assistant", "content": "w8"},
        {"role": "user", "content": "w7"},
    ]
    prompts.write_text(json.dumps({"prompt": "w5 w6"}) + "\n\n" + json.dumps({"messages": talk}) + "\n")
    asked = [str(folder), "--prompt", "w10 w11 w12", "--prompts-file", str(prompts), "--max-new-tokens", "6"]
    assert main(["generate", *asked, "--output", str(output)]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt_tokens"] for line in found] == [[10, 11, 12], [5, 6], [2, 9, 4, 3, 8, 4, 2, 7, 4, 3]]
    assert [line["completion_tokens"] for line in found] == [
        text[:6] for text in ours(folder, [line["prompt_tokens"] for line in found], stop=frozenset([1]))
    ]
    shown = capsys.readouterr().out
    assert f"[2] w5 w6\n--> {found[1]['completion']}\n" in shown
    stop = found[0]["completion_tokens"][2]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [69, stop]}))
    assert main(["generate", *asked, "--chat", "--output", str(output)]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt_tokens"] for line in found][:2] == [[2, 10, 11, 12, 4, 3], [2, 5, 6, 4, 3]]
    assert main(["generate", str(folder), "--prompt", "w10 w11 w12", "--output", str(output)]) == 0
    (line,) = map(json.loads, output.read_text().splitlines())
    assert (line["ended_by"], line["completion_tokens"][-1]) == ("stop token", stop)
    assert f"w{stop}" not in line["completion"].split()


def test_a_checkpoint_answers_as_the_folder_it_came_from(tmp_path: Path) -> None:
    folder = with_tokenizer(saved(tmp_path / "hf", "qwen3_moe"))
    divisor = ["--make-vocab-size-divisible-by", "64"]
    assert main(["convert", "import", str(folder), str(tmp_path / "ours"), *divisor]) == 0
    outputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for source, output in zip([folder, tmp_path / "ours"], outputs, strict=True):
        assert main(["generate", str(source), "--prompt", "w5 w6", "--prompt", "w7", "--output", str(output)]) == 0
    assert outputs[0].read_text() == outputs[1].read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is nothing to continue"),
        (["--prompt", "w1", "--top-k", "3"], "--top-k: without a --temperature above 0 the likeliest token is taken"),
        (["--prompt", "w1", "--temperature", "-1"], "a temperature of -1.0 is below 0"),
        (["--prompt", "w1", "--temperature", "1", "--top-p", "1.5"], "top-p of 1.5 is not above 0"),
        (["--prompt", "w1", "--ckpt-step", "3"], "--ckpt-step 3"),
        (["--prompt", "w1", "--chat"], "the tokenizer has no chat template"),
        (["--prompt", "1 2", "--token-ids", "--chat"], "NullTokenizer has no chat templates"),
        (["--prompt", "1 2", "--token-ids", "--tokenizer", "x"], "drop one of the two"),
        (["--prompt", ""], "prompt 1 is empty"),
        (["--prompt", "w1 w2", "--max-new-tokens", "63"], "more than the 64 positions of the model"),
        (["--prompts-file", "bad.jsonl"], "bad.jsonl, line 2: expected"),
        (["--prompts-file", "none.jsonl"], "none.jsonl cannot be read"),
        (["--prompt", "w1", "--tokenizer", "none"], "tokenizer none does not exist"),
    ],
)
def test_mistakes_give_one_message(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = with_tokenizer(saved(tmp_path / "hf", "gpt2"))
    (folder / "chat_template.jinja").unlink()
    (tmp_path / "bad.jsonl").write_text('{"prompt": "w1"}\n{"text": "w1"}\n')
    monkeypatch.chdir(tmp_path)
    assert main(["generate", str(folder), *options]) == USER_ERROR
    assert message in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "hf", "llama")
    assert main(["generate", str(folder), "--prompt", "5 6"]) == USER_ERROR
    assert "has no tokenizer; give one with --tokenizer FOLDER, or prompts as numbers with --token-ids" in (
        capsys.readouterr().err
    )
    assert main(["generate", str(folder), "--prompt", "5 6", "--token-ids"]) == 0
    with pytest.raises(UserError):
        load(tmp_path / "none")


def test_a_trained_checkpoint_answers_with_its_whole_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 64 --max-position-embeddings 64 "
        "--micro-batch-size 2 --global-batch-size 2 --train-iters 2 --eval-iters 0 --lr 1e-2 --bf16 --mock-data "
        "--tokenizer-type NullTokenizer --vocab-size 50 --num-experts 4 --moe-router-topk 2 "
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-expert-capacity-factor 1.5 "
        "--moe-router-load-balancing-type none --position-embedding-type rope --disable-bias-linear "
        f"--save-interval 2 --save {tmp_path / 'saved'} --run-dir {tmp_path / 'run'} --device cpu"
    )
    assert main(["pretrain-gpt", *shlex.split(flags)]) == 0
    loaded = load(tmp_path / "saved")
    ((_, bias),) = loaded.model.named_buffers()
    assert bias.abs().max() > 0
    assert loaded.model.config.moe_expert_capacity_factor is None
    assert loaded.model.dtype == torch.float32
    capsys.readouterr()
    assert (
        main(["generate", str(tmp_path / "saved"), "--prompt", "3 4 5", "--max-new-tokens", "3", "--dtype", "bfloat16"])
        == 0
    )
    assert capsys.readouterr().out.startswith("[1] 3 4 5\n--> ")
