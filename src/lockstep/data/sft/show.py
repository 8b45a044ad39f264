"""Samples as a reader sees them: decoded tokens, which of them are learned, and how texts lie in sequences."""

from collections.abc import Iterator
from dataclasses import dataclass

from lockstep.config.data import DatasetConfig
from lockstep.data.gpt_dataset import SplitName
from lockstep.data.sft.build import build_sft_datasets
from lockstep.data.sft.dataset import SFTDataset
from lockstep.data.tokenizers import Tokenizer
from lockstep.errors import UserError

_LEARNED = "bold green"
_NOT_LEARNED = "dim"


@dataclass(frozen=True)
class Piece:
    """Tokens in a row that are all learned, or all not, as text."""

    text: str
    learned: bool


def pieces(dataset: SFTDataset, tokenizer: Tokenizer, member: int) -> list[Piece]:
    """Return a text of the dataset in pieces; the first token is never predicted, so it is never learned."""
    tokens, learned = dataset.store.text(member)
    flags = [False, *learned[1:].tolist()]
    found, start = [], 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or flags[end] != flags[start]:
            found.append(Piece(tokenizer.detokenize(tokens[start:end].tolist()), flags[start]))
            start = end
    return found


def samples_as_text(dataset: SFTDataset, tokenizer: Tokenizer, count: int) -> Iterator[str]:
    """Yield the lines of the first ``count`` samples of a run; what is learned stands between ``[[`` and ``]]``."""
    for member, line in _lines(dataset, count):
        if member is None:
            yield line
            continue
        shown = (f"[[{piece.text}]]" if piece.learned else piece.text for piece in pieces(dataset, tokenizer, member))
        yield f"{line}\n{''.join(shown)}"


def print_samples(dataset: SFTDataset, tokenizer: Tokenizer, count: int) -> None:
    """Print the first ``count`` samples of a run: in colour on a terminal, with brackets into a pipe."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        print("\n".join(samples_as_text(dataset, tokenizer, count)))
        return
    for member, line in _lines(dataset, count):
        console.print(Text(line, style="bold" if member is None else "cyan"))
        if member is not None:
            text = Text()
            for piece in pieces(dataset, tokenizer, member):
                text.append(piece.text, style=_LEARNED if piece.learned else _NOT_LEARNED)
            console.print(text)


def _lines(dataset: SFTDataset, count: int) -> Iterator[tuple[int | None, str]]:
    """Yield headings, those of a text with its number: the summary, then each sample with the texts in it."""
    yield None, dataset.summary()
    for index in range(min(count, len(dataset))):
        sequence = dataset.sequence_of(index)
        members, size = dataset.texts_of(sequence), dataset.layout.seq_length
        places = int(dataset.store.places[members].sum())
        learned = int(dataset[index]["loss_mask"].sum())
        texts = f"{len(members)} text{'s' if len(members) > 1 else ''}"
        yield None, f"--- sample {index}: {texts}, {places} of {size} places filled, {learned} tokens learned"
        for member in members:
            cut = ", shortened" if dataset.store.shortened[member] else ""
            yield member, f"- row {int(dataset.store.rows[member])}{cut}"


def show(config: DatasetConfig, tokenizer: Tokenizer, *, seq_length: int, seed: int, count: int) -> None:
    """Print the first ``count`` training samples of a run.

    Raises:
        UserError: the data is not for fine-tuning, is missing or damaged, or ``count`` is not above 0.
    """
    if not config.sft:
        raise UserError("--show-samples shows samples for fine-tuning; add dataset.sft (--sft)")
    if count < 1:
        raise UserError(f"--show-samples {count}: give 1 or more")
    counts: dict[SplitName, int | None] = {"train": count, "valid": 0, "test": 0}
    built = build_sft_datasets(config, seq_length=seq_length, seed=seed, tokenizer=tokenizer, num_samples=counts)
    if "train" not in built:
        raise UserError("the train split has no data; give it some")
    print_samples(built["train"], tokenizer, count)
