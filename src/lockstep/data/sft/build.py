"""The three datasets of a fine-tuning run, from what the config names.

A split has data of its own (a folder of three files, or a path for each split), or one set of rows is divided.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lockstep.config.data import DatasetConfig
from lockstep.data.cache import IndexCache
from lockstep.data.gpt_dataset import SplitName
from lockstep.data.sft.dataset import Layout, Order, Packing, SFTDataset
from lockstep.data.sft.mock import MockTexts
from lockstep.data.sft.rows import joined, open_rows, splits_of
from lockstep.data.sft.store import Source, Store, TextSource
from lockstep.data.sft.text import TextRules
from lockstep.data.splits import SPLITS, documents_of, parse_split
from lockstep.data.tokenizers import Tokenizer
from lockstep.errors import UserError
from lockstep.words import is_number

ROOT_FILES: dict[SplitName, str] = {"train": "training.jsonl", "valid": "validation.jsonl", "test": "test.jsonl"}
_ORDERS: dict[str | None, Order] = {"single": "repeated", "batch": "shuffled", "cyclic": "once"}


@dataclass(frozen=True)
class Plan:
    """Where the splits come from: each from a source, and from a share of its texts where they have one in common.

    ``share`` divides the texts of the training source: weights of all splits in the order of rows, or the proportion
    held out for validation, drawn by the seed.
    """

    sources: dict[SplitName, Source]
    share: str | float | None = None


def build_sft_datasets(
    config: DatasetConfig,
    *,
    seq_length: int,
    seed: int,
    tokenizer: Tokenizer,
    num_samples: dict[SplitName, int | None],
    vocab_size: int | None = None,
) -> dict[SplitName, SFTDataset]:
    """Return the datasets of a run by split; a split without data, or without samples to take, is left out.

    Args:
        config: where the data lies and how it becomes samples; its ``random_seed`` wins over ``seed``.
        seq_length: tokens of a sample.
        seed: seed of packs, order and what is held out.
        tokenizer: turns text into tokens.
        num_samples: samples that the run takes of each split; None for each once.
        vocab_size: ids from this one on are refused; the tokenizer's size when None.

    Raises:
        UserError: data that is missing or damaged, or from which there is nothing to learn.
    """
    seed = seed if config.random_seed is None else config.random_seed
    wanted = {split: count for split, count in num_samples.items() if count != 0 and _asked(config, split)}
    plan = make_plan(config, TextRules(config, tokenizer, config.max_single_sequence_length or seq_length))
    layout = Layout(
        seq_length=seq_length,
        pad=_pad(tokenizer),
        vocab_size=tokenizer.vocab_size if vocab_size is None else vocab_size,
        packing=Packing(config.packing_algorithm, config.pad_seq_to_mult) if config.enable_offline_packing else None,
    )
    built: dict[SplitName, SFTDataset] = {}
    for split, source, store in _stores(plan, wanted, seed):
        built[split] = SFTDataset(
            store,
            split=split,
            layout=layout,
            num_samples=wanted[split],
            order=_ORDERS[config.dataloader_type or "single"],
            seed=seed,
            identity={**source.identity(), "share": plan.share},
        )
    return built


def _asked(config: DatasetConfig, split: SplitName) -> bool:
    return {"train": True, "valid": config.do_validation, "test": config.do_test}[split]


def _pad(tokenizer: Tokenizer) -> int:
    """Return the id of padding, which no token attends to and which has no loss."""
    return next((i for i in (tokenizer.pad_id, tokenizer.eod_id) if i is not None and i >= 0), 0)


def make_plan(config: DatasetConfig, rules: TextRules) -> Plan:
    """Return where the splits come from.

    Raises:
        UserError: a path that does not exist or is of no known kind; no data is named.
    """
    if config.mock:
        longest, tokenizer = rules.longest, rules.tokenizer
        return Plan({split: MockTexts(split, tokenizer.vocab_size, tokenizer.eod, longest) for split in SPLITS})
    if config.dataset_root is not None:
        return Plan(_of_root(Path(config.dataset_root), config, rules))
    if config.hf_dataset_path is not None:
        return _of_folder(Path(config.hf_dataset_path), config, rules)
    if config.data_path:
        share = config.hf_validation_proportion
        return Plan({"train": _source(config.data_path, config, rules)}, config.split if share is None else share)
    of_split = {"train": config.train_data_path, "valid": config.valid_data_path, "test": config.test_data_path}
    sources: dict[SplitName, Source] = {
        split: _source(paths, config, rules) for split in SPLITS if (paths := of_split[split])
    }
    if not sources:
        raise UserError(
            "no data for fine-tuning is named; give dataset.dataset_root (--dataset-root), dataset.hf_dataset_path, "
            "dataset.data_path (--data-path) or, for generated data, dataset.mock (--mock-data)"
        )
    return Plan(sources, config.hf_validation_proportion if set(sources) == {"train"} else None)


def _of_root(root: Path, config: DatasetConfig, rules: TextRules) -> dict[SplitName, Source]:
    if not (root / ROOT_FILES["train"]).is_file():
        what = "has no" if root.is_dir() else "is no folder with a"
        raise UserError(
            f"dataset.dataset_root (--dataset-root) = {root} {what} {ROOT_FILES['train']}; put "
            f"{', '.join(ROOT_FILES.values())} there, or name the files in dataset.train_data_path and "
            "dataset.valid_data_path"
        )
    return {
        split: _source([str(root / name)], config, rules)
        for split, name in ROOT_FILES.items()
        if (root / name).is_file()
    }


def _of_folder(path: Path, config: DatasetConfig, rules: TextRules) -> Plan:
    """Return the plan of a data set of Hugging Face: its own splits, but for a named one, which is divided."""
    own = splits_of(path) if config.hf_dataset_split is None else {}
    sources: dict[SplitName, Source] = {}
    for split in SPLITS:
        name = own.get(split, config.hf_dataset_split if split == "train" else None)
        if split == "train" or name is not None:
            sources[split] = TextSource(open_rows(path, name), rules, _cache(config, path))
    return Plan(sources, config.hf_validation_proportion if "valid" not in sources else None)


def _source(paths: Sequence[str], config: DatasetConfig, rules: TextRules) -> TextSource:
    for path in paths:
        if is_number(path):
            raise UserError(f"data of fine-tuning is not weighted: {path} in {' '.join(paths)} is no path; drop it")
    opened = [open_rows(Path(path)) for path in paths]
    return TextSource(joined(opened), rules, _cache(config, Path(paths[0])))


def _cache(config: DatasetConfig, data: Path) -> IndexCache:
    if config.path_to_cache is not None:
        return IndexCache(Path(config.path_to_cache), required=True)
    return IndexCache((data if data.is_dir() else data.parent) / "cache" / "SFT", required=False)


def _stores(plan: Plan, wanted: dict[SplitName, int | None], seed: int) -> Iterator[tuple[SplitName, Source, Store]]:
    """Yield the wanted splits that have data, with it."""
    if plan.share is None:
        for split in (split for split in wanted if split in plan.sources):
            source = plan.sources[split]
            yield split, source, source.build()
        return
    source = plan.sources["train"]
    store = source.build()
    for split, numbers in divided(len(store), plan.share, seed).items():
        if split not in wanted:
            continue
        if not len(numbers):
            raise UserError(
                f"the {split} split of {source.name} has none of {len(store)} texts; give more data, or another "
                "dataset.hf_validation_proportion or dataset.split"
            )
        yield split, source, store.part(numbers)
    for split in (split for split in wanted if split in plan.sources and split != "train"):
        yield split, plan.sources[split], plan.sources[split].build()


def divided(texts: int, share: str | float, seed: int) -> dict[SplitName, np.ndarray]:
    """Return the numbers of each split's texts: stretches by the weights of all, or what a proportion draws."""
    if isinstance(share, str):
        intervals = dict(zip(SPLITS, parse_split(share), strict=True))
        return {split: documents_of(interval, texts) for split, interval in intervals.items() if interval is not None}
    if share == 0:
        return {"train": np.arange(texts)}
    held_out = round(texts * share)
    order = np.random.default_rng(seed).permutation(texts)
    return {"train": np.sort(order[held_out:]), "valid": np.sort(order[:held_out])}
