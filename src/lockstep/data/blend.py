"""Blends: several datasets read as one, by weight or whole."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.config.data import DatasetConfig
from lockstep.data.cache import Arrays, IndexCache
from lockstep.data.gpt_dataset import GPTDataset, Sample, SplitName
from lockstep.data.splits import SPLITS, normalize
from lockstep.errors import UserError, nearest

_MAX_DATASETS = 32766
_SCALAR_UP_TO = 12  # datasets; beyond it a numpy operation a sample is quicker than a Python loop over the datasets


@dataclass(frozen=True)
class Blend:
    """Dataset prefixes and, when the user gave them, their weights."""

    prefixes: list[str]
    weights: list[float] | None

    def sizes(self, total: int, surplus: float = 0.0) -> list[int]:
        """Return how many of ``total`` samples each dataset contributes, and with ``surplus`` (a share) builds."""
        shares = normalize(self.weights or [])
        return [math.ceil(math.ceil(total * share) * (1 + surplus)) for share in shares]


def parse_blend(parts: list[str], key: str) -> Blend:
    """Return the blend that a list of prefixes, or of weights each followed by its prefix, spells.

    Raises:
        UserError: empty, some weights missing, or a weight that is not positive; names ``key``.
    """
    parts = [part.strip() for part in parts]
    if not parts:
        raise UserError(f"{key} is empty; give dataset prefixes, optionally each preceded by its weight")
    if len(parts) % 2:
        return Blend(parts, None)
    weights = [_number(part) for part in parts[::2]]
    if all(weight is None for weight in weights):
        return Blend(parts, None)
    for part, weight in zip(parts[::2], weights, strict=True):
        if weight is None:
            raise UserError(f"{key}: expected a weight, got {part!r}; precede every prefix with its weight, or none")
        if not 0 < weight < math.inf:
            raise UserError(f"{key}: weight {part} is not above 0; leave the dataset out instead")
    if len(weights) > _MAX_DATASETS:
        raise UserError(f"{key} has {len(weights)} datasets; at most {_MAX_DATASETS} can be blended")
    return Blend(parts[1::2], [weight for weight in weights if weight is not None])


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@dataclass(frozen=True)
class DataPlan:
    """Where the samples come from: ``common`` for all splits by ``split``, or ``per_split``; neither is mock data."""

    common: Blend | None = None
    per_split: dict[SplitName, Blend] | None = None


def read_plan(config: DatasetConfig) -> DataPlan:
    """Return the data sources that a config names.

    Raises:
        UserError: no source, more than one kind of source, or a file of sources that cannot be read.
    """
    given = {
        "--mock-data": config.mock or None,
        "--data-path": config.data_path,
        "--data-args-path": config.data_args_path,
        "--train-data-path, --valid-data-path, --test-data-path": config.train_data_path
        or config.valid_data_path
        or config.test_data_path,
        "--per-split-data-args-path": config.per_split_data_args_path,
    }
    named = [flag for flag, value in given.items() if value is not None]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} are given together; keep one source of data")
    if not named:
        raise UserError("no data: give --data-path with the prefix of a .bin/.idx pair, or --mock-data")
    if config.mock:
        return DataPlan()
    if config.data_path is not None:
        return DataPlan(common=parse_blend(config.data_path, "--data-path"))
    if config.data_args_path is not None:
        words = _read_text(config.data_args_path, "--data-args-path").split()
        return DataPlan(common=parse_blend(words, config.data_args_path))
    if config.split is not None:
        raise UserError(
            f"split {config.split!r} is given with a path for each split; drop --split, each path is used whole"
        )
    if config.per_split_data_args_path is not None:
        return DataPlan(per_split=_read_per_split(config.per_split_data_args_path))
    lists = (config.train_data_path, config.valid_data_path, config.test_data_path)
    blends = {
        split: parse_blend(parts, f"--{split}-data-path") for split, parts in zip(SPLITS, lists, strict=True) if parts
    }
    return DataPlan(per_split=blends)


def _read_text(path: str, flag: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: cannot read {path} ({error})") from None


def _read_per_split(path: str) -> dict[SplitName, Blend]:
    flag = "--per-split-data-args-path"
    try:
        content = json.loads(_read_text(path, flag))
    except json.JSONDecodeError as error:
        raise UserError(f"{flag}: {path} is not JSON: {error}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{flag}: {path} must be a mapping with the lists train, valid and test")
    for name in content:
        if name not in SPLITS:
            raise UserError(f"{flag}: {path} has unknown key {name}.{nearest(name, SPLITS)}")
    blends: dict[SplitName, Blend] = {}
    for split in SPLITS:
        parts = content.get(split)
        parts = parts.split() if isinstance(parts, str) else parts
        if parts is None:
            continue
        if not isinstance(parts, list) or not all(isinstance(part, str | int | float) for part in parts):
            raise UserError(f"{flag}: {split} in {path} must be a list of prefixes, got {parts!r}")
        blends[split] = parse_blend([str(part) for part in parts], f"{split} in {path}")
    return blends


def blending_indices(weights: list[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the order in which samples are drawn from datasets in proportion to ``weights``.

    Each sample comes from the dataset that is furthest behind its share; the first of equals.

    Args:
        weights: share of each dataset; they sum to 1.
        size: number of samples.

    Returns:
        dataset of each sample, int16 [size], and its number within that dataset, int64 [size].
    """
    datasets = _draw_scalar(weights, size) if len(weights) <= _SCALAR_UP_TO else _draw_vector(weights, size)
    return datasets, _running_count(datasets)


def _draw_scalar(weights: list[float], size: int) -> np.ndarray:
    counts = [0] * len(weights)
    pairs = list(enumerate(weights))
    chosen = np.empty(size, np.int16)
    for i in range(size):
        at = float(i) if i else 1.0
        best, furthest = 0, -math.inf
        for dataset, weight in pairs:
            behind = weight * at - counts[dataset]
            if behind > furthest:
                best, furthest = dataset, behind
        counts[best] += 1
        chosen[i] = best
    return chosen


def _draw_vector(weights: list[float], size: int) -> np.ndarray:
    shares = np.array(weights, np.float64)
    counts = np.zeros(len(weights), np.float64)
    chosen = np.empty(size, np.int16)
    for i in range(size):
        best = int(np.argmax(shares * max(i, 1) - counts))
        counts[best] += 1.0
        chosen[i] = best
    return chosen


def exhaustive_indices(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return an order that draws every dataset's samples once, evenly mixed; arrays as in ``blending_indices``."""
    total = sum(sizes)
    shares = np.array(sizes, np.float64) / float(total)
    counts = np.zeros(len(sizes), np.float64)
    chosen = np.empty(total, np.int16)
    spent = np.array(sizes) == 0
    for i in range(total):
        behind = shares * max(i, 1) - counts
        behind[spent] = -np.inf
        best = int(np.argmax(behind))
        counts[best] += 1.0
        spent[best] = counts[best] == sizes[best]
        chosen[i] = best
    return chosen, _running_count(chosen)


def _running_count(datasets: np.ndarray) -> np.ndarray:
    """Return for each entry how many equal entries precede it, int64."""
    order = np.argsort(datasets, kind="stable")
    counts = np.bincount(datasets) if len(datasets) else np.zeros(0, np.int64)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    result = np.empty(len(datasets), np.int64)
    result[order] = np.arange(len(datasets), dtype=np.int64) - firsts
    return result


class BlendedDataset:
    """Samples of several datasets in one order; the order itself is not shuffled.

    Args:
        datasets: what is blended, all of one split.
        weights: share of each dataset, any positive scale; its own length when the user gave no weights.
        size: number of samples; None for every sample of every dataset once.
        surplus: share of extra samples the datasets were built with, for the message when it was too small.
        cache: where to keep the order; None to build it each time.

    Raises:
        UserError: a dataset has fewer samples than the blend takes from it.
    """

    def __init__(
        self,
        datasets: list[GPTDataset],
        weights: list[float],
        size: int | None,
        *,
        surplus: float = 0.0,
        cache: IndexCache | None = None,
    ) -> None:
        self.datasets = datasets
        self.weights = normalize(weights)
        self.size = size
        sizes = [int(weight) for weight in weights]

        def build() -> Arrays:
            drawn = exhaustive_indices(sizes) if size is None else blending_indices(self.weights, size)
            return {"dataset_index": drawn[0], "dataset_sample_index": drawn[1]}

        key = {"weights": [float(weight).hex() for weight in weights], "size": size}
        arrays = build() if cache is None else cache.load_or_build(f"Blend-{datasets[0].split}", key, build)
        self.dataset_index = arrays["dataset_index"]
        self.dataset_sample_index = arrays["dataset_sample_index"]
        _check_enough(datasets, self.dataset_index, surplus)

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> Sample:
        """Return a sample of the dataset whose turn it is."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.datasets[int(self.dataset_index[index])][int(self.dataset_sample_index[index])]

    def describe(self) -> dict[str, Any]:
        """Return plain values for a run record."""
        return {
            "kind": "blend",
            "split": self.datasets[0].split,
            "num_samples": len(self),
            "weights": self.weights,
            "datasets": [dataset.describe() for dataset in self.datasets],
        }


def _check_enough(datasets: list[GPTDataset], dataset_index: np.ndarray, surplus: float) -> None:
    for number, taken in enumerate(np.bincount(dataset_index, minlength=len(datasets))):
        if taken > len(datasets[number]):
            raise UserError(
                f"the {datasets[number].split} blend takes {taken} samples of dataset {number + 1}, which has "
                f"{len(datasets[number])}; raise --mid-level-dataset-surplus (now {surplus}), for example tenfold"
            )
