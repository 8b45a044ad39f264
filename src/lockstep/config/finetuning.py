"""The part of the data section that says how text for fine-tuning becomes samples."""

from dataclasses import dataclass
from typing import Any, Literal

from lockstep.config.fields import opt
from lockstep.config.section import Section

_HUB = "data sets of the Hugging Face hub are not downloaded; save one to a folder and name that in "
_HUB += "dataset.hf_dataset_path (--hf-dataset-path)"
_ADAPTERS = "rows are read as they are; name their columns in dataset.prompt_column and dataset.completion_column"
_OWN_SPLIT = "give separate files in dataset.valid_data_path (--valid-data-path) and dataset.test_data_path"
_PICKLES = "Bridge's packed files are pickles, which are not read; packs are built from the text and kept in a cache"


@dataclass(kw_only=True)
class FineTuningData(Section):
    """Where text for fine-tuning comes from, which tokens of it have a loss, and how samples are packed."""

    sft: bool = opt(False, "--sft", help="Fine-tune: the data is prompts with completions, or conversations.")
    dataset_root: str | None = opt(
        None, "--dataset-root", help="Folder with training.jsonl, validation.jsonl and test.jsonl.", effect="path"
    )
    hf_dataset_path: str | None = opt(
        None, "--hf-dataset-path", help="Folder of a data set that Hugging Face datasets saved, or its files."
    )
    hf_dataset_name: str | None = opt(None, "--hf-dataset-name", refused=_HUB)
    hf_dataset_split: str | None = opt(
        None,
        "--hf-dataset-split",
        help="Split of the data set to train on; train when it has splits and this is unset.",
    )
    hf_dataset_subset: str | None = opt(None, refused=_HUB)
    hf_dataset_load_kwargs: dict[str, Any] | None = opt(None, refused=_HUB)
    hf_dataset_schema_adapter: str | None = opt(None, refused=_ADAPTERS)
    hf_dataset_adapter_kwargs: dict[str, Any] | None = opt(None, refused=_ADAPTERS)
    hf_validation_dataset: str | None = opt(None, refused=_OWN_SPLIT)
    hf_test_dataset: str | None = opt(None, refused=_OWN_SPLIT)
    hf_validation_proportion: float | None = opt(
        None,
        "--hf-validation-proportion",
        help="Share of the training rows, drawn by the data seed, that is held out where there is no validation data.",
    )
    do_validation: bool = opt(True, "--sft-no-validation", negated=True, help="Evaluate on validation data.")
    do_test: bool = opt(True, "--sft-no-test", negated=True, help="Evaluate on test data after training.")

    sft_format: Literal["auto", "prompt", "chat"] = opt(
        "auto", "--sft-format", help="Columns of the rows: prompt and completion, or messages; auto asks the first row."
    )
    prompt_column: str = opt("input", "--sft-prompt-column", help="Column of the prompt.")
    completion_column: str = opt("output", "--sft-completion-column", help="Column of the completion.")
    messages_column: str = opt(
        "messages", "--sft-messages-column", help="Column of a conversation; conversations is taken in its place."
    )
    prompt_template: str = opt("{prompt}", "--sft-prompt-template", help="Text around {prompt}.")
    separator: str = opt(" ", "--sft-separator", help="Text between prompt and completion; it counts as completion.")
    loss_mode: Literal["completion", "all"] = opt(
        "completion", "--sft-loss-mode", help="Loss on completions and assistant turns only, or on all tokens."
    )
    strip_whitespace: bool = opt(
        True, "--sft-keep-whitespace", negated=True, help="Strip white space around prompt and completion."
    )
    add_bos: bool = opt(False, "--sft-add-bos", help="Begin a sample with the beginning-of-sequence token.")
    add_sep: bool = opt(False, "--sft-add-sep", help="Put the separator token between prompt and completion.")
    add_eos: bool = opt(True, "--sft-no-eos", negated=True, help="End a completion with the end-of-document token.")
    truncation_method: Literal["right", "left"] = opt(
        "right", "--sft-truncation-method", help="End at which a sample that is too long is cut."
    )
    truncation_field: Literal["prompt", "completion"] = opt(
        "prompt", "--sft-truncation-field", help="What is cut first; the other is cut when nothing of this one is left."
    )
    pad_to_max_length: bool = opt(
        True,
        "--sft-pad-to-longest",
        negated=True,
        help="Pad samples to the sequence length, or only to the longest of their global batch.",
        effect="speed",
    )

    enable_offline_packing: bool = opt(False, "--sft-packing", help="Put several samples into one sequence.")
    packed_sequence_size: int | None = opt(
        None, "--sft-packed-sequence-size", help="Tokens of a packed sequence; model.seq_length, which it must equal."
    )
    packing_algorithm: Literal["first_fit_shuffle", "first_fit_decreasing"] = opt(
        "first_fit_shuffle", "--sft-packing-algorithm", help="Order in which samples are dealt out to packs."
    )
    max_single_sequence_length: int | None = opt(
        None, "--sft-max-single-sequence-length", help="Tokens of one sample at most; packed_sequence_size when unset."
    )
    pad_seq_to_mult: int = opt(1, "--sft-pad-seq-to-mult", help="Pad each sample of a pack to a multiple of this.")
    pad_cu_seqlens: bool = opt(False, holds="samples of a pack are told apart by number, not by offsets")
    packing_tokenizer_model_name: str | None = opt(
        None, holds="the cache of packs knows the tokenizer itself", effect="path"
    )
    num_tokenizer_workers: int = opt(-1, holds="packs are the same for any number of workers", effect="speed")
    packed_train_data_path: str | None = opt(None, refused=_PICKLES)
    packed_val_data_path: str | None = opt(None, refused=_PICKLES)
    packed_metadata_path: str | None = opt(None, refused=_PICKLES)


PREPROCESSING = (
    "prompt_column",
    "completion_column",
    "prompt_template",
    "separator",
    "loss_mode",
    "strip_whitespace",
    "add_bos",
    "add_sep",
    "add_eos",
    "truncation_method",
)
_PACKING = {
    "packed_sequence_size": "packed_sequence_size",
    "max_single_sequence_length": "max_single_sequence_length",
    "tokenizer_model_name": "packing_tokenizer_model_name",
    "num_tokenizer_workers": "num_tokenizer_workers",
    "packed_train_data_path": "packed_train_data_path",
    "packed_val_data_path": "packed_val_data_path",
    "packed_metadata_path": "packed_metadata_path",
    "pad_cu_seqlens": "pad_cu_seqlens",
    "pad_seq_to_mult": "pad_seq_to_mult",
}
_HF_DATASET = {
    "dataset_name": "hf_dataset_name",
    "path_or_dataset": "hf_dataset_path",
    "split": "hf_dataset_split",
    "subset": "hf_dataset_subset",
    "load_kwargs": "hf_dataset_load_kwargs",
    "schema_adapter": "hf_dataset_schema_adapter",
    "adapter_kwargs": "hf_dataset_adapter_kwargs",
}
_KWARGS = {
    "prompt_template": "prompt_template",
    "label_key": "completion_column",
    "truncation_method": "truncation_method",
    "truncation_field": "truncation_field",
    "add_bos": "add_bos",
    "add_sep": "add_sep",
    "add_eos": "add_eos",
    "pad_to_max_length": "pad_to_max_length",
}

BRIDGE_KEYS: dict[str, str] = {
    "dataset.seed": "dataset.random_seed",
    "dataset.dataset_kwargs.pad_to_max_length": "dataset.pad_to_max_length",
    "dataset.dataset_kwargs.truncation_field": "dataset.truncation_field",
    **{f"dataset.preprocessing.{name}": f"dataset.{name}" for name in PREPROCESSING},
    **{f"dataset.offline_packing_specs.{theirs}": f"dataset.{ours}" for theirs, ours in _PACKING.items()},
    **{f"dataset.hf_dataset.{theirs}": f"dataset.{ours}" for theirs, ours in _HF_DATASET.items()},
}
"""Megatron Bridge's keys, which lie deeper, by the key of the tree."""

FORMER_BRIDGE_KEYS: dict[str, str] = {
    **{f"dataset.packed_sequence_specs.{theirs}": f"dataset.{ours}" for theirs, ours in _PACKING.items()},
    **{f"dataset.dataset_kwargs.{theirs}": f"dataset.{ours}" for theirs, ours in _KWARGS.items()},
}
"""What Bridge called some of them up to 0.5."""


def former_settings(key: str, value: Any) -> list[tuple[str, Any]] | None:
    """Return what a key of Bridge sets whose value means something else in the tree; None for all other keys."""
    if key in ("dataset.offline_packing_specs", "dataset.packed_sequence_specs") and value is None:
        return [("dataset.enable_offline_packing", False)]
    if key == "dataset.packed_sequence_specs.packed_sequence_size" and isinstance(value, int):
        packs = value > 0
        return [("dataset.enable_offline_packing", packs), ("dataset.packed_sequence_size", value if packs else None)]
    if key == "dataset.dataset_kwargs.answer_only_loss" and isinstance(value, bool):
        return [("dataset.loss_mode", "completion" if value else "all")]
    return None
