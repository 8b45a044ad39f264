"""Launch scripts, read without running anything: variables, arrays, continued lines, and the training command."""

import ast
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from lockstep.errors import ConfigError
from lockstep.translation.lexer import Command, Raw, read_commands
from lockstep.translation.words import Word

_TRAINS = re.compile(r"(?:.*/)?(?:pretrain_\w+|train_rl)\.py")
_TRAINS_INSIDE = re.compile(r"\b(?:pretrain_\w+|train_rl)\.py\b")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_]\w*|\d+|[@*#?!-]")
_OPENS = ("if", "for", "while", "until", "case", "select", "{")
_CLOSES = ("fi", "done", "esac", "}")
_BETWEEN = ("then", "else", "elif", "do", "!", "time", "exec", "eval")
_DECLARES = ("export", "declare", "local", "readonly", "typeset")
_MARK = "\0"


@dataclass
class Launch:
    """What a launch script starts: the words after the training script, and the number of processes if it is said."""

    words: list[Word]
    world_size: int | None = None


@dataclass
class _Variables:
    """What the script has set so far; a value is a list of words, one for a plain variable."""

    path: Path
    defined: Mapping[str, str]
    values: dict[str, list[str]] = field(default_factory=dict)
    unread: list[tuple[int, str, str]] = field(default_factory=list)

    def mark(self, line: int, shown: str, why: str, name: str = "NAME") -> str:
        """Return a text that stands for what only running can tell; it matters where an option holds it."""
        self.unread.append((line, f"{shown} {why}", name))
        return f"{_MARK}{len(self.unread) - 1}{_MARK}"

    def set(self, name: str, words: list[str], append: bool) -> None:
        if name in self.defined:
            return
        self.values[name] = self.values.get(name, []) + words if append else words

    def append_text(self, name: str, text: str) -> None:
        earlier = self.get(name)
        self.set(name, ["".join(earlier or []) + text], append=False)

    def get(self, name: str) -> list[str] | None:
        if name in self.defined:
            return [self.defined[name]]
        return self.values.get(name)


def read_script(path: Path, defined: Mapping[str, str]) -> Launch:
    """Return what a launch script starts.

    ``defined`` holds values for variables that the script does not say, or that it computes.

    Raises:
        ConfigError: no file, no training command or several, or an option that depends on what only running the
            script can tell; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    variables = _Variables(path, defined)
    found: list[tuple[int, list[Word], list[Word]]] = []
    depth = 0
    for command in read_commands(text, path):
        depth = _run(command, variables, depth, found)
    if not found:
        raise ConfigError(f"{path}: no training command, such as torchrun ... pretrain_gpt.py, is in it")
    if len(found) > 1:
        lines = " and ".join(str(line) for line, _, _ in found)
        raise ConfigError(f"{path}: lines {lines} start training; leave one in, or translate each with --args")
    _, launcher, words = found[0]
    for word in words:
        if _MARK in word.text:
            raise ConfigError(_unreadable(variables, word))
    return Launch(words, _world_size(launcher))


def _run(command: Command, variables: _Variables, depth: int, found: list[tuple[int, list[Word], list[Word]]]) -> int:
    """Follow one command: what it sets, whether it trains; return how deep in conditions and loops the next one is."""
    raws = list(command.words)
    while raws and raws[0].text in _BETWEEN:
        raws.pop(0)
    if not raws:
        return depth
    first = raws[0].text
    if first in _CLOSES:
        return max(0, depth - 1)
    opens = sum(raw.text in _OPENS for raw in (raws[:1] if first != "function" else raws)) + first.endswith("()")
    if first == "for" and len(raws) > 1:
        _spoil(variables, raws[1].text, raws[1].line, "a loop")
    if opens:
        return depth + opens
    if first in _DECLARES:
        raws = [raw for raw in raws[1:] if not raw.text.startswith("-")]
    count = 0
    while count < len(raws) and _ASSIGNMENT.match(raws[count].text):
        count += 1
    if count == len(raws):
        for raw in raws:
            _assign(raw, variables, depth)
        return depth
    words = [word for raw in raws[count:] for word in _expand(raw, variables)]
    _training(command.line, words, found)
    return depth


def _training(line: int, words: list[Word], found: list[tuple[int, list[Word], list[Word]]]) -> None:
    for index, word in enumerate(words):
        if _TRAINS.fullmatch(word.text):
            found.append((line, words[:index], words[index + 1 :]))
            break
        if " " in word.text and _TRAINS_INSIDE.search(word.text):
            inner = [Word(text, word.place) for text in shlex.split(word.text, comments=True)]
            _training(line, inner, found)
            break


def _spoil(variables: _Variables, name: str, line: int, why: str) -> None:
    variables.set(name, [variables.mark(line, name, f"is set inside {why}", name)], append=False)


def _assign(raw: Raw, variables: _Variables, depth: int) -> None:
    match = _ASSIGNMENT.match(raw.text)
    assert match is not None
    name, append = match[1], bool(match[2])
    if depth:
        _spoil(variables, name, raw.line, "a condition, loop or function")
    elif raw.items is not None:
        words = [word.text for item in raw.items for word in _expand(item, variables)]
        variables.set(name, words, append)
    else:
        value = _text(Raw(raw.text[match.end() :], raw.line), variables)
        if append:
            variables.append_text(name, value)
        else:
            variables.set(name, [value], append=False)


def _text(raw: Raw, variables: _Variables) -> str:
    """Return a value without splitting it into words, as in an assignment."""
    return "".join(text for text, _ in _pieces(raw, variables, quoted=True))


def _expand(raw: Raw, variables: _Variables) -> list[Word]:
    """Return the words that one raw word stands for."""
    words: list[str] = []
    current: str | None = None
    for text, splits in _pieces(raw, variables, quoted=False):
        if splits == "array":
            parts = text.split("\1") if text else []
        elif splits == "words":
            parts = text.split()
            if text[:1].isspace() and current is not None:
                words.append(current)
                current = None
        else:
            parts = [text]
        for number, part in enumerate(parts):
            if number and current is not None:
                words.append(current)
                current = None
            current = (current or "") + part
    if current is not None:
        words.append(current)
    return [Word(text, f"{variables.path} line {raw.line}") for text in words]


def _pieces(raw: Raw, variables: _Variables, quoted: bool) -> list[tuple[str, str]]:
    """Return the texts that a raw word is made of, each with how it splits: not (``""``), at blanks, as an array."""
    pieces: list[tuple[str, str]] = []
    text, index = raw.text, 0
    while index < len(text):
        char = text[index]
        if char == "'":
            end = text.index("'", index + 1)
            pieces.append((text[index + 1 : end], ""))
            index = end + 1
        elif char == '"':
            end = _closing_quote(text, index)
            inner = Raw(text[index + 1 : end], raw.line)
            pieces += [(t, "array" if s == "array" else "") for t, s in _in_quotes(inner, variables)] or [("", "")]
            index = end + 1
        elif char == "\\":
            pieces.append((text[index + 1 : index + 2], ""))
            index += 2
        elif char in "$`":
            piece, index = _reference(text, index, raw.line, variables)
            pieces.append((piece[0], piece[1] if piece[1] == "array" or not quoted else ""))
        else:
            pieces.append((char, ""))
            index += 1
    return pieces


def _in_quotes(raw: Raw, variables: _Variables) -> list[tuple[str, str]]:
    pieces: list[tuple[str, str]] = []
    text, index = raw.text, 0
    while index < len(text):
        char = text[index]
        if char == "\\" and text[index + 1 : index + 2] in ("\\", '"', "$", "`", "\n"):
            pieces.append((text[index + 1].replace("\n", ""), ""))
            index += 2
        elif char in "$`":
            piece, index = _reference(text, index, raw.line, variables)
            pieces.append(piece)
        else:
            pieces.append((char, ""))
            index += 1
    return pieces


def _closing_quote(text: str, start: int) -> int:
    index = start + 1
    while text[index] != '"':
        index += 2 if text[index] == "\\" else 1
    return index


def _reference(text: str, index: int, line: int, variables: _Variables) -> tuple[tuple[str, str], int]:
    """Return what the ``$`` or backtick at ``index`` stands for, how it splits, and where the text goes on."""
    if text[index] == "`":
        end = text.index("`", index + 1) + 1
        return (variables.mark(line, text[index:end], "is the output of a command"), ""), end
    if text.startswith("$((", index):
        end = text.index("))", index) + 2
        return (_arithmetic(text[index:end], line, variables), "words"), end
    if text.startswith("$(", index):
        end = _balanced(text, index + 1, "(", ")")
        return (variables.mark(line, text[index:end], "is the output of a command"), ""), end
    if text.startswith("${", index):
        end = _balanced(text, index + 1, "{", "}")
        return _braces(text[index + 2 : end - 1], line, variables), end
    name = _NAME.match(text, index + 1)
    if name is None:
        return ("$", ""), index + 1
    return _variable(name[0], text[index : name.end()], line, variables), name.end()


def _balanced(text: str, start: int, opening: str, closing: str) -> int:
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == opening) - (text[index] == closing)
        if depth == 0:
            return index + 1
    return len(text)


def _variable(name: str, shown: str, line: int, variables: _Variables) -> tuple[str, str]:
    values = variables.get(name)
    if values is not None:
        return (values[0] if values else ""), "words"
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        return variables.mark(line, shown, "is an argument of the script"), ""
    return f"${{{name}}}", ""


def _braces(inner: str, line: int, variables: _Variables) -> tuple[str, str]:
    shown = "${" + inner + "}"
    array = re.fullmatch(r"([A-Za-z_]\w*)\[([@*])\]", inner)
    if array:
        values = variables.get(array[1])
        if values is None:
            return variables.mark(line, shown, "is an array that the script does not set"), ""
        return ("\1".join(values), "array") if array[2] == "@" else (" ".join(values), "words")
    plain = re.fullmatch(r"[A-Za-z_]\w*|\d+", inner)
    if plain:
        return _variable(inner, shown, line, variables)
    default = re.fullmatch(r"([A-Za-z_]\w*|\d+)(:?[-=])(.*)", inner, re.DOTALL)
    if default is None:
        return variables.mark(line, shown, "is an expansion that is not read"), ""
    values = variables.get(default[1])
    if values is not None and (values != [""] or ":" not in default[2]):
        return values[0], "words"
    value = _text(Raw(default[3], line), variables)
    if default[1].isdecimal() or _MARK in value:
        return variables.mark(line, shown, "is an argument of the script"), ""
    return f"${{{default[1]}{default[2].replace('=', '-')}{value}}}", ""


def _arithmetic(text: str, line: int, variables: _Variables) -> str:
    names = re.sub(r"\$?\{?([A-Za-z_]\w*)\}?", lambda m: "".join(variables.get(m[1]) or [m[0]]), text[3:-2])
    try:
        return str(_number(ast.parse(names.strip(), mode="eval").body))
    except (SyntaxError, ValueError, ZeroDivisionError):
        return variables.mark(line, text, "is arithmetic that is not read")


def _number(node: ast.expr) -> int:
    """Return the value of whole numbers joined by ``+ - * / %``; a shell's division drops the rest."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp):
        left, right = _number(node.left), _number(node.right)
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div():
                return int(left / right)
            case ast.Mod():
                return left % right
    raise ValueError("not arithmetic of whole numbers")


def _unreadable(variables: _Variables, word: Word) -> str:
    line, why, name = variables.unread[int(word.text.split(_MARK)[1])]
    remedy = f"give --define {name}=VALUE"
    if name == "NAME":
        remedy = "write its value into the script, or put it into a variable and give --define NAME=VALUE"
    return f"{variables.path} line {line}: {why}, which is known only when the script runs; {remedy}"


def _world_size(launcher: list[Word]) -> int | None:
    """Return how many processes a launcher's options start, if they say it in numbers."""
    sizes = {}
    texts = [part for word in launcher for part in word.text.split("=")]
    for name, value in pairwise(texts):
        key = name.lstrip("-").replace("-", "_")
        if key in ("nproc_per_node", "nnodes") and value.isdecimal():
            sizes[key] = int(value)
    if "nproc_per_node" not in sizes:
        return None
    named = any("nnodes" in text for text in texts)
    return None if named and "nnodes" not in sizes else sizes["nproc_per_node"] * sizes.get("nnodes", 1)
