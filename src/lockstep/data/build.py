"""What the trainer calls: datasets from a config, batches from samples.

Shapes: b batch, s sequence.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.config.data import DatasetConfig
from lockstep.config.derive import DEFAULT_SPLIT, MOCK_SPLIT
from lockstep.data.blend import Blend, BlendedDataset, DataPlan, read_plan
from lockstep.data.cache import IndexCache
from lockstep.data.gpt_dataset import NO_PAD, Dataset, GPTDataset, Sample, SampleRules, SplitName, beyond_vocabulary
from lockstep.data.indexed import IndexedDataset
from lockstep.data.mock import MockTokens
from lockstep.data.source import TokenSource
from lockstep.data.splits import SPLITS, Interval, documents_of, normalize, parse_split
from lockstep.data.tokenizers import Tokenizer
from lockstep.errors import UserError

if TYPE_CHECKING:
    import torch

_CHECK_ALL_IDS_UP_TO = 1 << 26  # bytes of .bin; larger files are checked sample by sample as they are read
_WHOLE: Interval = (0.0, 1.0)

SampleCounts = tuple[int | None, int | None, int | None]
"""Samples of train, validation and test: 0 for none, None for one pass over the documents."""


@dataclass(frozen=True)
class Datasets:
    """The three datasets of a run; None where no samples are asked for or the split has weight 0."""

    train: Dataset | None
    valid: Dataset | None
    test: Dataset | None

    def describe(self) -> dict[str, Any]:
        """Return plain values for a run record, a description for each dataset that is there."""
        named = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: dataset.describe() for name, dataset in named.items() if dataset is not None}


def build_datasets(
    dataset: DatasetConfig,
    *,
    seq_length: int,
    seed: int,
    tokenizer: Tokenizer,
    num_samples: SampleCounts,
    vocab_size: int | None = None,
) -> Datasets:
    """Return the datasets of a run.

    Args:
        dataset: where the data lies and how it is cut; its ``random_seed`` wins over ``seed``.
        seq_length: tokens a sample.
        seed: seed of the sample order.
        tokenizer: the tokenizer that the data was prepared with.
        num_samples: samples of train, validation and test.
        vocab_size: ids from this one on are refused; the tokenizer's size when None.

    Raises:
        UserError: files that are missing, damaged or of another vocabulary, a split without documents, no data source.
    """
    if dataset.sft:
        from lockstep.data.sft.build import build_sft_datasets

        by_split = build_sft_datasets(
            dataset,
            seq_length=seq_length,
            seed=seed,
            tokenizer=tokenizer,
            num_samples=dict(zip(SPLITS, num_samples, strict=True)),
            vocab_size=vocab_size,
        )
        return Datasets(by_split.get("train"), by_split.get("valid"), by_split.get("test"))
    builder = _Builder(dataset, seq_length, seed, tokenizer, vocab_size)
    built = builder.build(read_plan(dataset), dict(zip(SPLITS, num_samples, strict=True)))
    return Datasets(built.get("train"), built.get("valid"), built.get("test"))


class _Builder:
    def __init__(
        self, config: DatasetConfig, seq_length: int, seed: int, tokenizer: Tokenizer, vocab_size: int | None
    ) -> None:
        self._config = config
        self._seed = seed if config.random_seed is None else config.random_seed
        self._tokenizer = tokenizer
        self._rules = sample_rules(config, seq_length, tokenizer, vocab_size)
        self._sources: dict[str, IndexedDataset] = {}

    def build(self, plan: DataPlan, counts: dict[SplitName, int | None]) -> dict[SplitName, Dataset]:
        """Return the datasets by split."""
        wanted = {split: count for split, count in counts.items() if count != 0}
        if plan.per_split is not None:
            return {
                split: self._per_split(plan.per_split[split], split, count)
                for split, count in wanted.items()
                if split in plan.per_split
            }
        spelled = MOCK_SPLIT if plan.common is None else self._config.split or DEFAULT_SPLIT
        intervals = dict(zip(SPLITS, parse_split(spelled), strict=True))
        mock = MockTokens(self._tokenizer.vocab_size, self._tokenizer.eod) if plan.common is None else None
        built: dict[SplitName, Dataset] = {}
        for split, count in wanted.items():
            interval = intervals[split]
            if interval is None:
                continue
            if mock is not None:
                built[split] = self._single(mock, interval, split, count)
            elif plan.common is not None:
                built[split] = self._common(plan.common, interval, split, count)
        return built

    def _per_split(self, blend: Blend, split: SplitName, count: int | None) -> Dataset:
        """Return a split with its own blend; the weight of a lone prefix means nothing there."""
        if len(blend.prefixes) == 1:
            return self._single(self._source(blend.prefixes[0]), _WHOLE, split, count)
        return self._blended(blend, _WHOLE, split, count)

    def _common(self, blend: Blend, interval: Interval, split: SplitName, count: int | None) -> Dataset:
        """Return a split of the common blend; a lone prefix with a weight is still a blend and has its surplus."""
        if len(blend.prefixes) == 1 and blend.weights is None:
            return self._single(self._source(blend.prefixes[0]), interval, split, count)
        return self._blended(blend, interval, split, count)

    def _blended(self, blend: Blend, interval: Interval, split: SplitName, count: int | None) -> BlendedDataset:
        surplus = self._config.mid_level_dataset_surplus
        sources = [self._source(prefix) for prefix in blend.prefixes]
        if blend.weights is None:
            parts = [self._single(source, interval, split, None) for source in sources]
            lengths = [float(len(part)) for part in parts]
            size = None if count is None else min(count, int(sum(lengths)))
            return BlendedDataset(parts, lengths, size, cache=self._user_cache())
        if count is None:
            raise UserError(
                f"a full pass over the {split} split needs datasets without weights; drop the weights, or ask for a "
                "number of samples"
            )
        built = blend.sizes(count, surplus)
        parts = [self._single(source, interval, split, n) for source, n in zip(sources, built, strict=True)]
        weights = normalize(blend.weights)
        return BlendedDataset(parts, weights, sum(blend.sizes(count)), surplus=surplus, cache=self._user_cache())

    def _single(self, source: TokenSource, interval: Interval, split: SplitName, count: int | None) -> GPTDataset:
        return GPTDataset(
            source,
            documents_of(interval, len(source.sequence_lengths)),
            split=split,
            num_samples=count,
            rules=self._rules,
            seed=self._seed,
            cache=self._cache_of(source),
        )

    def _source(self, prefix: str) -> IndexedDataset:
        """Open a prefix once, however many splits read it."""
        if prefix not in self._sources:
            source = IndexedDataset(prefix)
            _check_ids_if_small(source, self._rules.vocab_size)
            self._sources[prefix] = source
        return self._sources[prefix]

    def _user_cache(self) -> IndexCache | None:
        path = self._config.path_to_cache
        return None if path is None else IndexCache(Path(path), required=True)

    def _cache_of(self, source: TokenSource) -> IndexCache | None:
        if self._config.path_to_cache is not None or not isinstance(source, IndexedDataset):
            return self._user_cache()
        return IndexCache(Path(source.prefix) / "cache" / "GPTDataset_indices", required=False)


def sample_rules(
    config: DatasetConfig, seq_length: int, tokenizer: Tokenizer, vocab_size: int | None = None
) -> SampleRules:
    """Return how tokens become samples under a config.

    A pad id that is also the end-of-document id masks nothing unless ``allow_ambiguous_pad_tokens`` says so.
    """
    needs_eod = config.eod_mask_loss or config.reset_position_ids or config.reset_attention_mask
    ambiguous = tokenizer.pad == tokenizer.eod_id and not config.allow_ambiguous_pad_tokens
    return SampleRules(
        seq_length=seq_length,
        vocab_size=tokenizer.vocab_size if vocab_size is None else vocab_size,
        eod=tokenizer.eod if needs_eod else tokenizer.eod_id,
        pad=NO_PAD if ambiguous else tokenizer.pad,
        eod_mask_loss=config.eod_mask_loss,
        reset_position_ids=config.reset_position_ids,
        reset_attention_mask=config.reset_attention_mask,
    )


def _check_ids_if_small(source: IndexedDataset, vocab_size: int) -> None:
    tokens = source.tokens
    if tokens.nbytes > _CHECK_ALL_IDS_UP_TO or not len(tokens):
        return
    for worst in (int(tokens.max()), int(tokens.min())):
        if not 0 <= worst < vocab_size:
            raise UserError(beyond_vocabulary(f"{source.prefix}.bin", worst, vocab_size))


def collate(samples: Sequence[Sample]) -> "dict[str, torch.Tensor]":
    """Return the samples stacked, every tensor [b, s] on the CPU, by the names of ``Sample``."""
    import torch

    fields: list[dict[str, Any]] = [dict(sample) for sample in samples]
    return {name: torch.from_numpy(np.stack([sample[name] for sample in fields])) for name in fields[0]}


def batch_hash(tokens: Any, labels: Any) -> str:
    """Return the first 16 hexadecimal digits of a sha256 over a batch.

    It covers, sample after sample, the tokens and the last label as little-endian int64.

    Args:
        tokens: [b, s], numpy array or CPU tensor.
        labels: [b, s], likewise.
    """
    text = np.concatenate([np.asarray(tokens), np.asarray(labels)[:, -1:]], axis=1)
    return hashlib.sha256(text.astype("<i8").tobytes()).hexdigest()[:16]
