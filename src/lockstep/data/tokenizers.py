"""Tokenizers: text to token ids and back, by the names that Megatron-LM gives them."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lockstep.config.data import TokenizerConfig
from lockstep.data.gpt_dataset import NO_PAD
from lockstep.errors import UserError

_END_OF_TEXT = "<|endoftext|>"
_IDENTITY_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_CALLS = {"__call__", "_encode_plus", "_batch_encode_plus", "encode_plus", "batch_encode_plus"}
"""Methods of transformers that turn a text into ids; a class with its own may do more than the tokenizers library."""
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # before version 5 of transformers, and since
_PROBE = "The quick brown fox, aged 37,\n\tdidn't re-read naïve 中文 tokenizers?! <|endoftext|> x=1;"


class Tokenizer(ABC):
    """What data and training need of a tokenizer.

    Attributes:
        name: its type, as in ``--tokenizer-type``.
        vocab_size: number of token ids, before padding.
        eod_id: end-of-document id, None when it has none.
        pad_id: padding id, None when it has none.
        bos_id: beginning-of-sequence id, None when it has none.
        sep_id: id between prompt and completion, None when it has none.
    """

    name: str
    vocab_size: int
    eod_id: int | None
    pad_id: int | None
    bos_id: int | None
    sep_id: int | None = None

    @property
    def eod(self) -> int:
        """End-of-document id; raises ``UserError`` when the tokenizer has none."""
        if self.eod_id is None:
            raise UserError(f"the {self.name} has no end-of-document token; set eos_token in its tokenizer_config.json")
        return self.eod_id

    @property
    def pad(self) -> int:
        """Padding id, -1 when the tokenizer has none."""
        return NO_PAD if self.pad_id is None else self.pad_id

    @property
    def bos(self) -> int | None:
        """Beginning-of-sequence id, None when the tokenizer has none."""
        return self.bos_id

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text."""

    def tokenize_alone(self, text: str) -> list[int]:
        """Return the token ids of a piece of text, without what the tokenizer adds to a whole one."""
        return self.tokenize(text)

    def chat_text(
        self, messages: Sequence[dict[str, Any]], *, generate: bool = False, tools: list[Any] | None = None
    ) -> str:
        """Return a conversation as the chat template writes it; ``generate`` adds the head of the next answer.

        Raises:
            UserError: the tokenizer has no chat template, or the template refuses the conversation.
        """
        raise UserError(
            f"{self.name} has no chat templates; use HuggingFaceTokenizer, or data of prompts and completions"
        )

    def chat_identity(self) -> dict[str, Any] | None:
        """Return what else decides how conversations are written; None without chat templates."""
        return None

    @property
    def backend(self) -> Any:
        """The object of the tokenizers library that alone decides the ids of a text; None where there is none."""
        return None

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, as ``tokenize`` gives them."""
        return [self.tokenize(text) for text in texts]

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return plain values that tell it from tokenizers that give other ids, independent of where it lies."""


class NullTokenizer(Tokenizer):
    """Numbers in, numbers out: the text ``"5 17"`` is the tokens 5 and 17.

    Args:
        vocab_size: number of ids.
        eod_id: end-of-document id; the last id when None.
        pad_id: padding id; -1 for none.
    """

    name = "NullTokenizer"

    def __init__(self, vocab_size: int, eod_id: int | None = None, pad_id: int = NO_PAD) -> None:
        self.vocab_size = vocab_size
        self.eod_id = vocab_size - 1 if eod_id is None else eod_id
        self.pad_id = pad_id
        self.bos_id = None

    def tokenize(self, text: str) -> list[int]:
        """Return the numbers of a text that has single spaces between them."""
        try:
            return [int(word) for word in text.split(" ")]
        except ValueError:
            raise UserError(
                f"NullTokenizer reads numbers with single spaces between them, got {text[:40]!r}; "
                "use a real tokenizer for text"
            ) from None

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the numbers with spaces between them."""
        return " ".join(str(i) for i in ids)

    def identity(self) -> dict[str, Any]:
        """Return the parameters."""
        return {"type": self.name, "vocab_size": self.vocab_size, "eod": self.eod_id, "pad": self.pad_id}


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the transformers library.

    Args:
        model: folder with the tokenizer's files, or a tokenizer.json.
        include_special_tokens: let the tokenizer add what it adds to a text, such as a beginning-of-sequence token.
        trust_remote_code: let the folder's own Python code run.
        chat_template: a chat template in place of its own.

    Raises:
        UserError: no such folder or file, or transformers cannot read it.
    """

    name = "HuggingFaceTokenizer"

    def __init__(
        self,
        model: str,
        include_special_tokens: bool = True,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
    ) -> None:
        self._tokenizer = _load_hugging_face(Path(model), trust_remote_code)
        self._tokenizer("", verbose=False)  # takes truncation and padding out of a file that sets them
        self._include_special_tokens = include_special_tokens
        self.vocab_size = len(self._tokenizer)
        ends = (self._tokenizer.eos_token_id, getattr(self._tokenizer, "sep_token_id", None))
        self.eod_id = next((i for i in ends if i is not None), None)
        self.pad_id = self._tokenizer.pad_token_id
        starts = (self._tokenizer.bos_token_id, getattr(self._tokenizer, "cls_token_id", None))
        self.bos_id = next((i for i in starts if i is not None), None)
        self.sep_id = getattr(self._tokenizer, "sep_token_id", None)
        self._chat_template = chat_template

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self._tokenizer(text, add_special_tokens=self._include_special_tokens, verbose=False).input_ids

    def tokenize_alone(self, text: str) -> list[int]:
        """Return the token ids of a piece of text, without what the tokenizer adds to a whole one."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    @property
    def backend(self) -> Any:
        """The object of the tokenizers library behind it, where the class of the tokenizer adds nothing of its own."""
        import transformers

        classes = type(self._tokenizer).__mro__
        if transformers.PreTrainedTokenizerFast not in classes:
            return None
        own = classes[: classes.index(transformers.PreTrainedTokenizerFast)]
        return None if any(_CALLS & vars(each).keys() for each in own) else self._tokenizer.backend_tokenizer

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        if (backend := self.backend) is None:
            return super().tokenize_batch(texts)
        return _batch(backend, texts, self._include_special_tokens)

    def chat_text(
        self, messages: Sequence[dict[str, Any]], *, generate: bool = False, tools: list[Any] | None = None
    ) -> str:
        """Return a conversation as the chat template writes it; see ``Tokenizer``."""
        import jinja2

        if self._chat_template is None and not self._tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template; give one as text or file in tokenizer.chat_template "
                "(--chat-template)"
            )
        try:
            # transformers renders in a sandbox: a template of a stranger cannot reach Python.
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self._chat_template,
                add_generation_prompt=generate,
                tokenize=False,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"the chat template refuses the conversation: {reason}") from None
        return text

    def chat_identity(self) -> dict[str, Any] | None:
        """Return the template, and the version of the library that renders it."""
        import transformers

        template = self._chat_template or self._tokenizer.chat_template
        return {"template": template, "transformers": transformers.__version__} if template else None

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens spelled out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def identity(self) -> dict[str, Any]:
        """Return a hash over vocabulary, merges and what a probe text becomes, and the special ids."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return {"type": self.name, **_fingerprint(self, self._tokenizer.get_vocab(), backend)}


def _load_hugging_face(path: Path, trust_remote_code: bool) -> Any:
    if not path.exists():
        raise UserError(
            f"tokenizer {path} does not exist; --tokenizer-model takes a local folder with the tokenizer's files or a "
            "tokenizer.json (download a model's tokenizer first)"
        )
    import transformers

    alone = path.is_file() and not (path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").is_file())
    try:
        if alone:
            return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
        folder = path.parent if path.is_file() else path
        if _is_generic(folder):
            return transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the library raises bare Exception for malformed files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"tokenizer {path} cannot be read: {reason}") from None


def _is_generic(folder: Path) -> bool:
    """Say whether AutoTokenizer must choose the class that reads tokenizer.json alone: asking it imports torch."""
    config = folder / "tokenizer_config.json"
    if (folder / "config.json").exists() or not (folder / "tokenizer.json").is_file() or not config.is_file():
        return False
    settings = json.loads(config.read_text(encoding="utf-8"))
    return settings.get("tokenizer_class") in _GENERIC_CLASSES and "auto_map" not in settings


class GPT2BPETokenizer(Tokenizer):
    """Byte-level BPE of GPT-2 from its vocabulary and merges files.

    Raises:
        UserError: a file is missing or malformed.
    """

    name = "GPT2BPETokenizer"

    def __init__(self, vocab_file: str, merge_file: str) -> None:
        for path in (vocab_file, merge_file):
            if not Path(path).is_file():
                raise UserError(
                    f"tokenizer file {path} does not exist; give --vocab-file and --merge-file of GPT-2's BPE"
                )
        import tokenizers

        try:
            model = tokenizers.models.BPE.from_file(vocab_file, merge_file)
        except Exception as error:  # the library raises bare Exception for malformed files
            raise UserError(f"{vocab_file} and {merge_file} are not a BPE: {error}") from None
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = tokenizers.decoders.ByteLevel()
        self._tokenizer.add_special_tokens([_END_OF_TEXT])
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.eod_id = self.bos_id = self._tokenizer.token_to_id(_END_OF_TEXT)
        self.pad_id = None

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self._tokenizer.encode(text).ids

    @property
    def backend(self) -> Any:
        """The object of the tokenizers library behind it."""
        return self._tokenizer

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return _batch(self._tokenizer, texts, True)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens spelled out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def identity(self) -> dict[str, Any]:
        """Return a hash over vocabulary, merges and what a probe text becomes, and the special ids."""
        return {"type": self.name, **_fingerprint(self, self._tokenizer.get_vocab(), self._tokenizer)}


def _batch(backend: Any, texts: Sequence[str], special: bool) -> list[list[int]]:
    """Return the ids of each text from an object of the tokenizers library; ``special`` adds its special tokens."""
    return [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=special)]


def _fingerprint(tokenizer: Tokenizer, vocab: dict[str, int], backend: Any) -> dict[str, Any]:
    """Hash what decides the ids; ``backend`` is an object of the tokenizers library, None for a tokenizer in Python.

    Only the lasting parts of the serialised model count, since the rest of its spelling changes between versions of
    the library: what normalises and splits text shows in the probe.
    """
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    scored = model.get("vocab")
    scores = scored if isinstance(scored, list) else []  # a unigram model has a score for each token
    content = json.dumps([sorted(vocab.items()), scores, merges, tokenizer.tokenize(_PROBE)])
    return {
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod_id,
        "pad": tokenizer.pad_id,
        "bos": tokenizer.bos_id,
    }


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Return the tokenizer that a config asks for.

    Raises:
        UserError: a type that is not supported, or a setting that its type needs is missing.
    """
    match config.tokenizer_type:
        case "NullTokenizer":
            return _build_null(config)
        case "HuggingFaceTokenizer" | "SFTTokenizer" as kind:
            model = _needed(config.tokenizer_model, kind, "--tokenizer-model")
            return HuggingFaceTokenizer(
                model,
                not config.tokenizer_hf_no_include_special_tokens,
                config.trust_remote_code,
                chat_template(config),
            )
        case "GPT2BPETokenizer":
            vocab = _needed(config.vocab_file, "GPT2BPETokenizer", "--vocab-file")
            return GPT2BPETokenizer(vocab, _needed(config.merge_file, "GPT2BPETokenizer", "--merge-file"))
        case None:
            raise UserError(
                "no tokenizer: set --tokenizer-type to HuggingFaceTokenizer, GPT2BPETokenizer or NullTokenizer"
            )
        case other:
            raise UserError(
                f"tokenizer type {other} is not supported; use HuggingFaceTokenizer (its files often come in that "
                "format too), GPT2BPETokenizer or NullTokenizer"
            )


def chat_template(config: TokenizerConfig) -> str | None:
    """Return the chat template that takes the place of the tokenizer's own; None for its own.

    Raises:
        UserError: the file of the template cannot be read.
    """
    given = config.chat_template
    if given is None:
        identity = config.tokenizer_type == "SFTTokenizer" and config.tokenizer_prompt_format == "identity"
        return _IDENTITY_TEMPLATE if identity else None
    if "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"tokenizer.chat_template (--chat-template) = {given}: no template, which has {{ in it, and no file of one "
            f"({error})"
        ) from None


def _needed(value: str | None, kind: str, flag: str) -> str:
    if value is None:
        raise UserError(f"{kind} needs {flag}")
    return value


def _build_null(config: TokenizerConfig) -> NullTokenizer:
    size = config.vocab_size
    if size is None:
        raise UserError("NullTokenizer needs --vocab-size")
    if size < 1:
        raise UserError(f"--vocab-size {size} is not above 0")
    eod = config.null_tokenizer_eod_id
    if eod is not None and not 0 <= eod < size:
        raise UserError(f"--null-tokenizer-eod-id {eod} is not in the vocabulary of {size} tokens (0 to {size - 1})")
    return NullTokenizer(size, eod, config.null_tokenizer_pad_id)


def padded_vocab_size(vocab_size: int, divisible_by: int, tp: int = 1, pad: bool = True) -> int:
    """Return the number of embedding rows: ``vocab_size`` rounded up to a multiple of ``divisible_by * tp``."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple if pad else vocab_size
