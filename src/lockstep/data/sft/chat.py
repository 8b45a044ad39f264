"""Conversations through a chat template, and which of their tokens an assistant says."""

from collections.abc import Sequence
from typing import Any

from lockstep.data.tokenizers import Tokenizer
from lockstep.errors import UserError

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}

Message = dict[str, Any]
Span = tuple[int, int]


def conversation(value: Any, place: str) -> list[Message]:
    """Return messages with role and content, from such messages or ShareGPT's from and value.

    Raises:
        UserError: it is no list of messages; names the place, the message and what is missing.
    """
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{place}: expected a list of messages such as {{'role': 'user', 'content': '...'}}, got "
            f"{str(value)[:40]!r}; mend the row or leave it out"
        )
    return [_message(item, f"{place}, message {number}") for number, item in enumerate(value, start=1)]


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, dict):
        raise UserError(f"{place}: expected a message with role and content, got {str(item)[:40]!r}")
    if "from" in item and "role" not in item:
        role = _SHAREGPT_ROLES.get(str(item["from"]).lower())
        if role is None:
            raise UserError(f"{place}: nobody is called {item['from']!r}; known are {', '.join(_SHAREGPT_ROLES)}")
        return {"role": role, "content": _content(item.get("value"), "value", place)}
    if not isinstance(item.get("role"), str):
        raise UserError(f"{place}: no role; it has {', '.join(item) or 'nothing'}. Give it a role, such as user")
    if item.get("content") is None and item.get("tool_calls"):
        return {**item, "content": ""}
    return {
        **{k: v for k, v in item.items() if v is not None},
        "content": _content(item.get("content"), "content", place),
    }


def _content(value: Any, name: str, place: str) -> str:
    """Return the text of a message; parts of it are joined."""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise UserError(f"{place}: {name} is {str(value)[:40]!r}, not text; mend the row or leave it out")
    return value


def assistant_spans(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Any, place: str
) -> tuple[list[int], list[Span]]:
    """Return the token ids of a conversation and, for each turn of the assistant, where its tokens begin and end.

    A turn begins after the head that the template writes to have an answer generated. The places come from prefixes:
    what the template makes of the messages before the turn must begin the whole text, and its tokens the whole tokens.

    Raises:
        UserError: a prefix does not begin the whole, so that it is not known which tokens the assistant says.
    """
    try:
        text, spans = _text_spans(tokenizer, messages, tools or None)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    tokens = tokenizer.tokenize_alone(text)

    def index(characters: int, turn: int) -> int:
        ids = tokenizer.tokenize_alone(text[:characters])
        if tokens[: len(ids)] != ids:
            raise UserError(
                f"{place}: a token reaches over the border of the assistant's turn {turn}, so its loss would be that "
                "of the prompt too; use a chat template with a special token or a line break there"
            )
        return len(ids)

    return tokens, [(index(start, turn), index(end, turn)) for turn, (start, end) in enumerate(spans, start=1)]


def _text_spans(tokenizer: Tokenizer, messages: Sequence[Message], tools: Any) -> tuple[str, list[Span]]:
    """Return the text of a conversation and the characters that each turn of the assistant has of it."""
    whole = tokenizer.chat_text(messages, tools=tools)
    spans = []
    for turn, (first, last) in enumerate(_turns(messages), start=1):
        if first == 0:
            raise UserError("the conversation begins with the assistant; begin it with a user's message")
        head = tokenizer.chat_text(messages[:first], generate=True, tools=tools)
        if not whole.startswith(head):
            raise UserError(_no_prefix(turn, "before"))
        spans.append((len(head), _end(tokenizer, messages, last, whole, len(head), tools, turn)))
    return whole, spans


def _turns(messages: Sequence[Message]) -> list[Span]:
    """Return the runs of messages of the assistant, as the numbers of their first and after their last."""
    turns: list[Span] = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            joins = bool(turns) and turns[-1][1] == number
            turns[-1:] = [(turns[-1][0], number + 1)] if joins else [*turns[-1:], (number, number + 1)]
    return turns


def _end(
    tokenizer: Tokenizer, messages: Sequence[Message], last: int, whole: str, start: int, tools: Any, turn: int
) -> int:
    """Return where in the whole text a turn that begins at ``start`` ends."""
    if last == len(messages):
        return len(whole)
    upto = tokenizer.chat_text(messages[:last], tools=tools)
    if len(upto) > start and whole.startswith(upto):
        return len(upto)
    # Some templates write the last turn otherwise than earlier ones, with its reasoning: its ending is the same.
    content = str(messages[last - 1]["content"]).strip()
    _, found, ending = upto.rpartition(content)
    if found and content and ending and whole.startswith(content + ending, start):
        return start + len(content + ending)
    raise UserError(_no_prefix(turn, "up to the end of"))


def _no_prefix(turn: int, where: str) -> str:
    return (
        f"the chat template writes the messages {where} the assistant's turn {turn} otherwise when more follow, so it "
        "is not known which tokens the assistant says; make a row of each turn, or give another chat template in "
        "tokenizer.chat_template (--chat-template)"
    )
