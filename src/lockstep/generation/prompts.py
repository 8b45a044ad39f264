"""Prompts from words of the command line and from JSON lines, as token ids."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.data.tokenizers import Tokenizer
from lockstep.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A prompt as it is shown, and its token ids."""

    text: str
    tokens: list[int]


def read_prompts(texts: Sequence[str], file: Path | None, tokenizer: Tokenizer, *, chat: bool = False) -> list[Prompt]:
    """Return the prompts of the command line, then those of a file.

    Each line of the file has ``prompt``, a text, or ``messages``, a conversation. With ``chat`` a text is what a user
    says; a conversation always goes through the chat template.

    Raises:
        UserError: a file or line that cannot be read, or a tokenizer without a chat template.
    """
    given: list[str | list[dict[str, Any]]] = [*texts, *(_lines(file) if file is not None else [])]
    if not given:
        raise UserError("there is nothing to continue; give --prompt TEXT or --prompts-file FILE")
    return [_prompt([{"role": "user", "content": p}] if chat and isinstance(p, str) else p, tokenizer) for p in given]


def _prompt(given: str | list[dict[str, Any]], tokenizer: Tokenizer) -> Prompt:
    if isinstance(given, str):
        return Prompt(given, tokenizer.tokenize(given))
    text = tokenizer.chat_text(given, generate=True)
    return Prompt(text, tokenizer.tokenize_alone(text))


def _lines(file: Path) -> list[str | list[dict[str, Any]]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    return [_line(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _line(line: str, where: str) -> str | list[dict[str, Any]]:
    try:
        value = json.loads(line)
    except ValueError:
        raise UserError(f"{where} is no JSON; write one object a line") from None
    keys = set(value) if isinstance(value, dict) else set()
    if keys & {"prompt", "messages"} == {"prompt"} and isinstance(value["prompt"], str):
        text: str = value["prompt"]
        return text
    if keys & {"prompt", "messages"} == {"messages"} and _are_messages(value["messages"]):
        messages: list[dict[str, Any]] = value["messages"]
        return messages
    raise UserError(
        f'{where}: expected {{"prompt": "text"}} or {{"messages": [{{"role": ..., "content": ...}}]}}, '
        f"got {line[:60]!r}"
    )


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, dict) and {"role", "content"} <= set(message) for message in value)
    )
