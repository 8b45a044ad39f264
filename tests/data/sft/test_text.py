"""Loss masks, truncation and special tokens, against cases made by hand.

A case is written as its tokens, one item each; ``marked`` writes those that are learned in brackets.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lockstep.config.data import DatasetConfig, TokenizerConfig
from lockstep.data.sft.rows import Row
from lockstep.data.sft.text import Text, TextRules
from lockstep.data.tokenizers import NullTokenizer, Tokenizer, build_tokenizer
from lockstep.errors import UserError
from tests.data.sft.conftest import CHATML, SPECIAL, load, write_tokenizer

Rules = Callable[..., TextRules]
PLACE = "train.jsonl, line 3"


def read(rules: TextRules, columns: dict[str, Any]) -> Text | None:
    row = Row(PLACE, columns)
    return rules.text_of(row, rules.format_of(row))


def marked(rules: TextRules, columns: dict[str, Any]) -> str:
    """Return the text of a row with every learned token in brackets; special tokens are those of the vocabulary."""
    text = read(rules, columns)
    assert text is not None
    words = [rules.tokenizer.detokenize([token]) for token in text.tokens]
    return "".join(f"[{word}]" if learned else word for word, learned in zip(words, text.learned, strict=True))


def pair(prompt: str, completion: str) -> dict[str, Any]:
    return {"input": prompt, "output": completion}


@pytest.mark.parametrize(
    ("fields", "row", "expected"),
    [
        ({}, pair("ab", "cd"), "ab[ ][c][d][<eos>]"),
        ({}, pair(" ab\n", "\tcd "), "ab[ ][c][d][<eos>]"),
        ({"strip_whitespace": False, "separator": ""}, pair("a ", " c"), "a [ ][c][<eos>]"),
        ({"add_eos": False}, pair("ab", "c"), "ab[ ][c]"),
        ({"add_bos": True, "add_sep": True, "separator": ""}, pair("a", "b"), "<bos>a<sep>[b][<eos>]"),
        ({"prompt_template": "Q:{prompt}?"}, pair("a{", "b"), "Q:a{?[ ][b][<eos>]"),
        ({"loss_mode": "all"}, pair("a", "b"), "[a][ ][b][<eos>]"),
        ({"prompt_column": "q", "completion_column": "a"}, {"q": "x", "a": "y", "more": 1}, "x[ ][y][<eos>]"),
    ],
)
def test_a_completion_alone_is_learned(
    rules: Rules, fields: dict[str, Any], row: dict[str, Any], expected: str
) -> None:
    assert marked(rules(**fields), row) == expected


def test_token_ids_are_those_made_by_hand(rules: Rules, tokenizer: Tokenizer) -> None:
    text = read(rules(), pair("hi", "no"))
    first = len(SPECIAL) - 32  # the id of a character is its code plus this
    assert text == Text(
        [first + ord("h"), first + ord("i"), first + ord(" "), first + ord("n"), first + ord("o"), 0],
        [False, False, True, True, True, True],
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "abc[ ][x][y][z][<eos>]"),
        ({"truncation_method": "left"}, "def[ ][x][y][z][<eos>]"),
        ({"truncation_field": "completion"}, "abcdef[ ][x]"),
        ({"truncation_field": "completion", "truncation_method": "left"}, "abcdef[z][<eos>]"),
        ({"add_bos": True}, "<bos>ab[ ][x][y][z][<eos>]"),
    ],
)
def test_one_field_is_cut_at_one_end(rules: Rules, fields: dict[str, Any], expected: str) -> None:
    row = pair("abcdef", "xyz")
    assert marked(rules(8, **fields), row) == expected
    text = read(rules(8, **fields), row)
    assert text is not None
    assert text.cut
    whole = read(rules(20, **fields), row)
    assert whole is not None
    assert not whole.cut


def test_the_other_field_is_cut_when_nothing_is_left(rules: Rules) -> None:
    assert marked(rules(3), pair("abcdef", "xyz")) == "[ ][x][y]"
    assert marked(rules(3, truncation_method="left"), pair("abcdef", "xyz")) == "[y][z][<eos>]"
    gone = read(rules(4, truncation_field="completion", loss_mode="all"), pair("abcdef", "xyz"))
    assert gone is not None
    assert gone.num_learned == 0


@pytest.mark.parametrize("completion", ["", " \n"])
def test_a_row_without_a_completion_has_no_text(rules: Rules, completion: str) -> None:
    assert read(rules(strip_whitespace=False), pair("a", completion)) is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": "x"}, r"train.jsonl, line 3: no columns input and output, and no messages; it has text\..*--sft-pro"),
        ({"input": "x"}, "line 3: no column output for the completion; it has input. Name it in .*completion_column"),
        ({"output": "x", "inputs": ""}, "no column input for the prompt.*Did you mean inputs?"),
        ({"input": "x", "output": 7}, "line 3: column output is '7', not text"),
        ({"messages": "hi"}, "line 3, column messages: expected a list of messages"),
        ({"messages": []}, "expected a list of messages"),
        ({"messages": [{"role": "user", "content": "a"}, "b"]}, "message 2: expected a message with role and content"),
        ({"messages": [{"content": "a"}]}, "message 1: no role; it has content"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1: content is '3', not text"),
        ({"conversations": [{"from": "dog", "value": "a"}]}, "message 1: nobody is called 'dog'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "line 3: the conversation begins with the assistant"),
    ],
)
def test_a_bad_row_names_place_and_remedy(rules: Rules, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(rules(), columns)


def test_special_tokens_that_are_missing_or_not_used_are_said(rules: Rules, characters: Path) -> None:
    config = DatasetConfig(sft=True, add_sep=True, separator="")
    with pytest.raises(UserError, match="add_sep: the tokenizer has no separator token"):
        read(TextRules(config, NullTokenizer(10), 9), pair("1", "2"))
    with pytest.raises(UserError, match="have no effect on conversations"):
        read(rules(add_bos=True), {"messages": chat("u:a", "a:b")["messages"]})
    with pytest.raises(UserError, match="NullTokenizer has no chat templates"):
        read(TextRules(DatasetConfig(sft=True), NullTokenizer(10), 9), chat("u:1", "a:2"))


def chat(*turns: str) -> dict[str, Any]:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]}


@pytest.mark.parametrize(
    ("fields", "columns", "expected"),
    [
        ({}, chat("u:hi", "a:no"), "<|u|>hi<|end|>\n<|a|>[n][o][<|end|>][\n]"),
        (
            {},
            chat("s:x", "u:a", "a:b", "u:c", "a:d"),
            "<|s|>x<|end|>\n<|u|>a<|end|>\n<|a|>[b][<|end|>][\n]<|u|>c<|end|>\n<|a|>[d][<|end|>][\n]",
        ),
        ({}, chat("u:a", "a:b", "u:c"), "<|u|>a<|end|>\n<|a|>[b][<|end|>][\n]<|u|>c<|end|>\n"),
        ({}, chat("u:a", "a:b", "a:c"), "<|u|>a<|end|>\n<|a|>[b][<|end|>][\n][<|a|>][c][<|end|>][\n]"),
        ({"loss_mode": "all"}, chat("u:a", "a:b"), "[<|u|>][a][<|end|>][\n][<|a|>][b][<|end|>][\n]"),
        (
            {},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "<|u|>a<|end|>\n<|a|>[b][<|end|>][\n]",
        ),
        (
            {"messages_column": "m"},
            {"m": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, *chat("a:b")["messages"]]},
            "<|u|>a<|end|>\n<|a|>[b][<|end|>][\n]",
        ),
    ],
)
def test_turns_of_the_assistant_alone_are_learned(
    rules: Rules, fields: dict[str, Any], columns: dict[str, Any], expected: str
) -> None:
    assert marked(rules(**fields), columns) == expected


def test_a_conversation_is_cut_at_one_end(rules: Rules) -> None:
    conversation = chat("u:abc", "a:def")
    assert marked(rules(8), conversation) == "<|u|>abc<|end|>\n<|a|>[d]"
    assert marked(rules(6, truncation_method="left"), conversation) == "<|a|>[d][e][f][<|end|>][\n]"
    gone = read(rules(7), conversation)
    assert gone is not None
    assert gone.num_learned == 0
    assert read(rules(), chat("u:abc")) is None


def test_the_tokens_are_those_of_the_template_of_the_whole(rules: Rules, characters: Path) -> None:
    import transformers

    messages = chat("s:x", "u:a b", "a:c", "u:d", "a:e")["messages"]
    theirs = transformers.AutoTokenizer.from_pretrained(characters).apply_chat_template(messages, return_dict=False)
    text = read(rules(), {"messages": messages})
    assert text is not None
    assert text.tokens == theirs


REASONING = (
    "{% for m in messages %}<|{{ m['role'][0] }}|>"
    "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)
ALTERNATING = "{% if messages|length % 2 %}{{ raise_exception('in pairs, please') }}{% endif %}" + CHATML
REWRITING = "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}{% endfor %}"
SWALLOWING = (
    "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


def with_template(folder: Path, template: str, *pieces: str) -> TextRules:
    tokenizer = load(write_tokenizer(folder, pieces, template))
    return TextRules(DatasetConfig(sft=True), tokenizer, 100)


def test_a_template_that_writes_the_last_turn_otherwise_is_followed(tmp_path: Path) -> None:
    rules = with_template(tmp_path, REASONING)
    found = marked(rules, chat("u:x", "a:b", "u:c", "a:d"))
    assert found == "<|u|>x<|end|><|a|>[b][<|end|>]<|u|>c<|end|><|a|>[<think>][</think>][d][<|end|>]"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (REWRITING, "line 3: the chat template writes the messages before the assistant's turn 1 otherwise when more"),
        (ALTERNATING, "line 3: the chat template refuses the conversation: in pairs, please"),
        ("{{ messages[0]['nothing'] + 1 }}", "line 3: the chat template refuses the conversation"),
        ("", "line 3: the tokenizer has no chat template"),
    ],
)
def test_a_template_that_does_not_tell_is_refused(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(with_template(tmp_path, template), chat("u:x", "a:y"))


def test_a_token_over_the_border_of_a_turn_is_refused(tmp_path: Path) -> None:
    rules = with_template(tmp_path, SWALLOWING, "ab")
    assert marked(rules, chat("u:x", "a:y")) == "ux|a[y][|]"
    with pytest.raises(UserError, match="line 3: a token reaches over the border of the assistant's turn 1"):
        read(rules, chat("u:x", "a:b"))


def test_a_template_of_ones_own_takes_its_place(characters: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(SWALLOWING)
    for given in (SWALLOWING, str(file)):
        rules = TextRules(DatasetConfig(sft=True), load(characters, chat_template=given), 100)
        assert marked(rules, chat("u:x", "a:y")) == "ux|a[y][|]"
    with pytest.raises(UserError, match=r"chat-template.* = nowhere: no template, which has { in it, and no file"):
        load(characters, chat_template="nowhere")


def test_the_identity_format_of_megatron_lm_writes_contents_alone(characters: Path) -> None:
    config = TokenizerConfig(
        tokenizer_type="SFTTokenizer", tokenizer_model=str(characters), tokenizer_prompt_format="identity"
    )
    rules = TextRules(DatasetConfig(sft=True), build_tokenizer(config), 100)
    assert marked(rules, chat("u:x", "a:y", "u:z")) == "x[y]z"
