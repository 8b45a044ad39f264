"""A shell script cut into commands of raw words: quotes and expansions stay as written, with their line numbers."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.errors import ConfigError

_ARRAY = re.compile(r"[A-Za-z_]\w*\+?=")


@dataclass(frozen=True)
class Raw:
    """A word as written, the line it starts on, and the items of an array assignment."""

    text: str
    line: int
    items: "tuple[Raw, ...] | None" = None


@dataclass
class Command:
    """The raw words of one command, and its line."""

    line: int
    words: list[Raw] = field(default_factory=list)


def read_commands(text: str, path: Path) -> Iterator[Command]:
    """Yield the commands of a script in order; redirections and here-documents are left out.

    Raises:
        ConfigError: a quote or bracket that is never closed; names the line.
    """
    yield from _Lexer(text, path).commands()


class _Lexer:
    def __init__(self, text: str, path: Path) -> None:
        self.text, self.path, self.index, self.line = text, path, 0, 1
        self.documents: list[str] = []

    def commands(self) -> Iterator[Command]:
        command = Command(self.line)
        while self.index < len(self.text):
            char = self.text[self.index]
            if char == "\\" and self.text.startswith("\\\n", self.index):
                self._skip(2)
            elif char in " \t\r":
                self._skip(1)
            elif char == "#":
                self._skip_to("\n")
            elif char in "\n;&|()" and not self._redirects():
                self._end_of_line(char)
                if command.words:
                    yield command
                command = Command(self.line)
            elif char in "<>" or self._redirects():
                self._redirection()
            else:
                if not command.words:
                    command.line = self.line
                command.words.append(self._word())
        if command.words:
            yield command

    def _skip(self, count: int) -> str:
        piece = self.text[self.index : self.index + count]
        self.line += piece.count("\n")
        self.index += count
        return piece

    def _skip_to(self, mark: str) -> None:
        end = self.text.find(mark, self.index)
        self._skip((end if end >= 0 else len(self.text)) - self.index)

    def _redirects(self) -> bool:
        return re.compile(r"\d*[<>]|&>").match(self.text, self.index) is not None

    def _redirection(self) -> None:
        """Leave out a redirection with its target; remember the end of a here-document."""
        match = re.compile(r"(\d*|&)(<<<|<<-?|[<>]+[&|]?)").match(self.text, self.index)
        assert match is not None
        self._skip(match.end() - self.index)
        while self.text[self.index : self.index + 1] in (" ", "\t"):
            self._skip(1)
        if self.index < len(self.text) and self.text[self.index] not in "\n;&|()<>":
            target = self._word().text
            if match[2] in ("<<", "<<-"):
                self.documents.append(target.strip("'\"\\"))

    def _end_of_line(self, char: str) -> None:
        self._skip(1)
        if char != "\n":
            return
        for end in self.documents:
            while self.index < len(self.text):
                stop = self.text.find("\n", self.index)
                line = self._skip((stop if stop >= 0 else len(self.text)) + 1 - self.index)
                if line.strip() == end:
                    break
        self.documents = []

    def _word(self) -> Raw:
        line, start = self.line, self.index
        pieces: list[str] = []
        while self.index < len(self.text):
            char = self.text[self.index]
            if self.text.startswith("\\\n", self.index):
                self._skip(2)
                continue
            if char == "(" and _ARRAY.fullmatch("".join(pieces)):
                return Raw("".join(pieces), line, self._items())
            if char == "(" and pieces and self.text.startswith("()", self.index):
                self._skip(2)
                return Raw("".join(pieces) + "()", line)
            if char in " \t\r\n;&|()<>":
                break
            pieces.append(self._piece(char))
        assert self.index > start
        return Raw("".join(pieces), line)

    def _piece(self, char: str) -> str:
        if char == "\\":
            return self._skip(2)
        if char == "'":
            return self._through("'", 1)
        if char == "`":
            return self._through("`", 1)
        if char == '"':
            return self._double_quotes()
        if self.text.startswith("$(", self.index):
            return self._skip(1) + self._brackets("(", ")")
        if self.text.startswith("${", self.index):
            return self._skip(1) + self._brackets("{", "}")
        return self._skip(1)

    def _unclosed(self, what: str, line: int) -> ConfigError:
        return ConfigError(f"{self.path} line {line}: {what} is never closed")

    def _through(self, mark: str, offset: int) -> str:
        end = self.text.find(mark, self.index + offset)
        if end < 0:
            raise self._unclosed(mark, self.line)
        return self._skip(end + 1 - self.index)

    def _double_quotes(self) -> str:
        line, pieces = self.line, [self._skip(1)]
        while self.index < len(self.text):
            char = self.text[self.index]
            if char == '"':
                return "".join([*pieces, self._skip(1)])
            if self.text.startswith("\\\n", self.index):
                self._skip(2)
            elif char == "\\":
                pieces.append(self._skip(2))
            elif self.text.startswith("$(", self.index):
                pieces.append(self._skip(1) + self._brackets("(", ")"))
            else:
                pieces.append(self._skip(1))
        raise self._unclosed('"', line)

    def _brackets(self, opening: str, closing: str) -> str:
        line, start, depth = self.line, self.index, 0
        while self.index < len(self.text):
            char = self.text[self.index]
            depth += (char == opening) - (char == closing)
            if char in "'\"" and depth and closing == ")":
                self._through("'", 1) if char == "'" else self._double_quotes()
            else:
                self._skip(1)
            if depth == 0:
                return self.text[start : self.index]
        raise self._unclosed(opening, line)

    def _items(self) -> tuple[Raw, ...]:
        line = self.line
        items: list[Raw] = []
        self._skip(1)
        while self.index < len(self.text):
            char = self.text[self.index]
            if char == ")":
                self._skip(1)
                return tuple(items)
            if char in " \t\r\n" or self.text.startswith("\\\n", self.index):
                self._skip(2 if char == "\\" else 1)
            elif char == "#":
                self._skip_to("\n")
            else:
                items.append(self._word())
        raise self._unclosed("(", line)
