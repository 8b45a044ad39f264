"""Small token files for the tests of this folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lockstep.data.gpt_dataset import GPTDataset, SampleRules
from lockstep.data.indexed import DTYPES, IndexedDataset, IndexedDatasetWriter, WrittenFiles

UINT16 = DTYPES[8]


def write_dataset(prefix: Path, documents: Sequence[Sequence[int]], dtype: np.dtype = UINT16) -> WrittenFiles:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for tokens in documents:
            writer.add_document(tokens)
        return writer.finalize()


def toy_documents() -> list[list[int]]:
    """20 documents of 5, 6, ... 24 tokens that count on from document to document."""
    documents, at = [], 0
    for i in range(20):
        documents.append(list(range(at, at + 5 + i)))
        at += 5 + i
    return documents


def blend_documents(number: int, count: int) -> list[list[int]]:
    return [[(100 * number + 3 * i + k) % 500 for k in range(5 + i)] for i in range(count)]


def rules(
    seq_length: int,
    *,
    vocab_size: int = 1000,
    eod: int = 7,
    pad: int = -1,
    eod_mask_loss: bool = False,
    reset_position_ids: bool = False,
    reset_attention_mask: bool = False,
) -> SampleRules:
    return SampleRules(seq_length, vocab_size, eod, pad, eod_mask_loss, reset_position_ids, reset_attention_mask)


def whole(prefix: Path, num_samples: int | None, how: SampleRules, seed: int = 1234) -> GPTDataset:
    """All documents of a prefix as a training split."""
    source = IndexedDataset(prefix)
    documents = np.arange(len(source), dtype=np.int32)
    return GPTDataset(source, documents, split="train", num_samples=num_samples, rules=how, seed=seed)


def flip(path: Path, change: Callable[[bytearray], object]) -> None:
    """Change bytes of a file in place."""
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
