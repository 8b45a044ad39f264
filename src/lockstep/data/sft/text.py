"""Rows of text into token ids, with a flag for every token that is learned.

A text is a prompt and its completion, or a conversation.
"""

from dataclasses import dataclass
from typing import Any, Literal

from lockstep.config.data import DatasetConfig
from lockstep.config.finetuning import PREPROCESSING
from lockstep.data.sft.chat import assistant_spans, conversation
from lockstep.data.sft.rows import Row
from lockstep.data.tokenizers import Tokenizer
from lockstep.errors import UserError, nearest

Format = Literal["prompt", "chat"]
CONVERSATIONS = "conversations"
_OF_TEXT = ("sft_format", "messages_column", *PREPROCESSING, "truncation_field")


@dataclass(frozen=True)
class Text:
    """Token ids of a row.

    ``learned`` tells for each whether it belongs to a completion, ``cut`` that the row was shortened.
    """

    tokens: list[int]
    learned: list[bool]
    cut: bool = False

    @property
    def num_learned(self) -> int:
        """Tokens that have a loss: the first one is never predicted."""
        return sum(self.learned[1:])


@dataclass(frozen=True)
class TextRules:
    """How rows become token ids, as a config says.

    ``longest`` is the number of tokens of a text at most.
    """

    config: DatasetConfig
    tokenizer: Tokenizer
    longest: int

    def identity(self) -> dict[str, Any]:
        """Return plain values that change when any token or flag could."""
        return {
            **{name: getattr(self.config, name) for name in _OF_TEXT},
            "longest": self.longest,
            "tokenizer": self.tokenizer.identity(),
            "chat": self.tokenizer.chat_identity(),
        }

    def format_of(self, row: Row) -> Format:
        """Return the format of the data that begins with a row.

        Raises:
            UserError: the row has the columns of neither; the end of a sample is set and the chat template decides it.
        """
        c = self.config
        if c.sft_format != "auto":
            found: Format = c.sft_format
        elif c.messages_column in row.columns or CONVERSATIONS in row.columns:
            found = "chat"
        elif c.prompt_column in row.columns or c.completion_column in row.columns:
            found = "prompt"
        else:
            raise UserError(
                f"{row.place}: no columns {c.prompt_column} and {c.completion_column}, and no {c.messages_column}; it "
                f"has {', '.join(row.columns)}. Name them in dataset.prompt_column (--sft-prompt-column) and "
                "dataset.completion_column (--sft-completion-column), or in dataset.messages_column "
                "(--sft-messages-column)"
            )
        if found == "chat" and (c.add_bos or c.add_sep):
            raise UserError(
                "dataset.add_bos and dataset.add_sep (--sft-add-bos, --sft-add-sep) have no effect on conversations: "
                "the chat template writes all special tokens; drop them"
            )
        return found

    def text_of(self, row: Row, kind: Format) -> Text | None:
        """Return the text of a row; None for one without a completion or an answer.

        Raises:
            UserError: a column is missing or is no text; the chat template refuses the conversation.
        """
        return self._chat(row) if kind == "chat" else self._prompt(row)

    def _prompt(self, row: Row) -> Text | None:
        c, tokenize = self.config, self.tokenizer.tokenize_alone
        prompt = self._column(row, c.prompt_column, "prompt")
        completion = self._column(row, c.completion_column, "completion")
        if not completion.strip():
            return None
        asked = tokenize(c.prompt_template.replace("{prompt}", prompt))
        answer = tokenize(c.separator + completion)
        before = [_special(self.tokenizer.bos_id, "beginning-of-sequence", "add_bos")] if c.add_bos else []
        between = [_special(self.tokenizer.sep_id, "separator", "add_sep")] if c.add_sep else []
        after = [self.tokenizer.eod] if c.add_eos else []
        rest = self.longest - len(before) - len(between)
        kept, answered = self._shortened(asked, answer + after, rest)
        tokens = [*before, *kept, *between, *answered]
        unlearned = len(tokens) - len(answered)
        learned = [c.loss_mode == "all"] * unlearned + [True] * len(answered)
        if not answered:
            learned = [False] * unlearned  # a prompt alone teaches nothing that was asked for
        return Text(tokens, learned, len(kept) + len(answered) < len(asked) + len(answer) + len(after))

    def _column(self, row: Row, name: str, what: str) -> str:
        if name not in row.columns:
            near = nearest(name, row.columns)
            raise UserError(
                f"{row.place}: no column {name} for the {what}; it has {', '.join(row.columns) or 'none'}. Name it in "
                f"dataset.{what}_column (--sft-{what}-column).{near}"
            )
        value = row.columns[name]
        if not isinstance(value, str):
            raise UserError(
                f"{row.place}: column {name} is {str(value)[:40]!r}, not text; mend the row or leave it out"
            )
        return value.strip() if self.config.strip_whitespace else value

    def _shortened(self, prompt: list[int], completion: list[int], room: int) -> tuple[list[int], list[int]]:
        """Return both cut to ``room`` tokens together: the field to cut gives way first, then the other."""
        excess = max(0, len(prompt) + len(completion) - max(0, room))
        first, second = (prompt, completion) if self.config.truncation_field == "prompt" else (completion, prompt)
        of_first = min(excess, len(first))
        first, second = self._cut(first, of_first), self._cut(second, excess - of_first)
        return (first, second) if self.config.truncation_field == "prompt" else (second, first)

    def _cut(self, ids: list[int], excess: int) -> list[int]:
        return ids[: len(ids) - excess] if self.config.truncation_method == "right" else ids[excess:]

    def _chat(self, row: Row) -> Text | None:
        c = self.config
        name = c.messages_column
        if name not in row.columns and CONVERSATIONS in row.columns:
            name = CONVERSATIONS
        if name not in row.columns:
            raise UserError(
                f"{row.place}: no column {name} of messages; it has {', '.join(row.columns) or 'none'}. Name it in "
                f"dataset.messages_column (--sft-messages-column).{nearest(name, row.columns)}"
            )
        messages = conversation(row.columns[name], f"{row.place}, column {name}")
        if not any(message["role"] == "assistant" for message in messages):
            return None
        tokens, spans = assistant_spans(self.tokenizer, messages, row.columns.get("tools"), row.place)
        learned = [c.loss_mode == "all"] * len(tokens)
        for start, end in spans:
            learned[start:end] = [True] * (end - start)
        excess = max(0, len(tokens) - self.longest)
        if c.truncation_method == "right":
            return Text(tokens[: self.longest], learned[: self.longest], excess > 0)
        return Text(tokens[excess:], learned[excess:], excess > 0)


def _special(token: int | None, what: str, setting: str) -> int:
    if token is None:
        raise UserError(f"dataset.{setting}: the tokenizer has no {what} token; drop it")
    return token
