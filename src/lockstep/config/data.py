"""Sections that say what is trained on."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from lockstep.config.fields import opt
from lockstep.config.finetuning import FineTuningData
from lockstep.config.section import Section
from lockstep.config.variants import ObjectStores, TokenizerBackends


@dataclass(kw_only=True)
class DatasetConfig(FineTuningData, ObjectStores, Section):
    """Data and the order of its samples."""

    section_name: ClassVar[str] = "dataset"

    random_seed: int | None = opt(None, help="Seed of the sample order; rng.seed when unset.")
    data_sharding: bool = opt(True, holds="with one data-parallel rank there is one bucket of samples")
    dataloader_type: Literal["single", "cyclic", "batch", "external"] | None = opt(
        None,
        "--dataloader-type",
        help="Sample order: as the dataset gives it, or reshuffled every epoch; batch is that of fine-tuning.",
    )
    pin_memory: bool = opt(True, holds="batches on their way to a GPU are pinned", effect="speed")
    persistent_workers: bool = opt(True, holds="samples are read by the process that trains", effect="speed")
    data_path: list[str] | None = opt(
        None, "--data-path", help="Dataset prefixes, optionally each preceded by its weight."
    )
    split: str | None = opt(None, "--split", help="Weights of train, validation and test documents.")
    train_data_path: list[str] | None = opt(None, "--train-data-path", help="Dataset prefixes of the training split.")
    valid_data_path: list[str] | None = opt(None, "--valid-data-path", help="Dataset prefixes of the validation split.")
    test_data_path: list[str] | None = opt(None, "--test-data-path", help="Dataset prefixes of the test split.")
    data_args_path: str | None = opt(None, "--data-args-path", help="File that holds what --data-path would.")
    per_split_data_args_path: str | None = opt(
        None, "--per-split-data-args-path", help="JSON file with the lists train, valid and test."
    )
    per_dataset_sequences_path: str | None = opt(
        None, "--per-dataset-sequences-path", refused="this data option is not supported yet"
    )
    fast_cache_load: bool = opt(False, "--dataloader-fast-cache-load", refused="this data option is not supported yet")
    defer_npy_index_mmap: bool = opt(
        False, "--dataloader-defer-npy-index-mmap", refused="this data option is not supported yet"
    )
    path_to_cache: str | None = opt(
        None, "--data-cache-path", help="Folder for the built sample indices.", effect="path"
    )
    mmap_bin_files: bool = opt(
        True, "--no-mmap-bin-files", negated=True, holds="the same bytes are read either way", effect="speed"
    )
    mock: bool | None = opt(None, "--mock-data", help="Train on generated data; on when no data set is named.")
    num_workers: int = opt(2, "--num-workers", holds="samples are the same for any number of workers", effect="speed")
    reset_position_ids: bool = opt(
        False, "--reset-position-ids", help="Restart positions after each end-of-document token."
    )
    reset_attention_mask: bool = opt(False, "--reset-attention-mask", help="Keep attention within documents.")
    inter_document_masking: bool = opt(
        False, "--dataloader-inter-document-masking", refused="this data option is not supported yet"
    )
    eod_mask_loss: bool = opt(False, "--eod-mask-loss", help="No loss on end-of-document tokens.")
    create_attention_mask: bool = opt(
        True,
        "--no-create-attention-mask-in-dataloader",
        negated=True,
        holds="the causal mask is built into attention",
        effect="speed",
    )
    num_dataset_builder_threads: int = opt(
        1, "--num-dataset-builder-threads", holds="indices are the same for any number of threads", effect="speed"
    )
    mid_level_dataset_surplus: float = opt(
        0.005, "--mid-level-dataset-surplus", help="Extra share of samples built for each blended dataset."
    )
    allow_ambiguous_pad_tokens: bool = opt(
        False, "--allow-ambiguous-pad-tokens", help="Allow a pad token that is also another special token."
    )


@dataclass(kw_only=True)
class TokenizerConfig(TokenizerBackends, Section):
    """The tokenizer."""

    section_name: ClassVar[str] = "tokenizer"

    vocab_size: int | None = opt(None, "--vocab-size", help="Vocabulary size, for tokenizers that do not bring one.")
    pad_vocab_size: bool = opt(
        True, "--no-pad-vocab-size", "--disable-pad-vocab-size", negated=True, help="Pad the vocabulary at all."
    )
    vocab_file: str | None = opt(None, "--vocab-file", help="Vocabulary file of GPT2BPETokenizer.")
    merge_file: str | None = opt(None, "--merge-file", help="Merges file of GPT2BPETokenizer.")
    vocab_extra_ids: int = opt(0, "--vocab-extra-ids", refused="this tokenizer option is not supported yet")
    tokenizer_type: (
        Literal[
            "BertWordPieceLowerCase",
            "BertWordPieceCase",
            "GPT2BPETokenizer",
            "SentencePieceTokenizer",
            "GPTSentencePieceTokenizer",
            "HuggingFaceTokenizer",
            "Llama2Tokenizer",
            "TikTokenizer",
            "MultimodalTokenizer",
            "NullTokenizer",
            "NullMultimodalTokenizer",
            "SFTTokenizer",
        ]
        | None
    ) = opt(None, "--tokenizer-type", help="Kind of tokenizer.")
    tokenizer_model: str | None = opt(None, "--tokenizer-model", help="Folder or file of the tokenizer.")
    metadata_path: str | None = opt(None, "--tokenizer-metadata", refused="this tokenizer option is not supported yet")
    special_tokens: list[str] | None = opt(
        None, "--tokenizer-special-tokens", refused="this tokenizer option is not supported yet"
    )
    tiktoken_pattern: Literal["v1", "v2"] | None = opt(
        None, "--tiktoken-pattern", refused="this tokenizer option is not supported yet"
    )
    tiktoken_num_special_tokens: int = opt(
        1000, "--tiktoken-num-special-tokens", refused="this tokenizer option is not supported yet"
    )
    tokenizer_sentencepiece_legacy: bool = opt(
        False, "--tokenizer-sentencepiece-legacy", refused="this tokenizer option is not supported yet"
    )
    tokenizer_sentencepiece_ignore_extra_whitespaces: bool = opt(
        True,
        "--no-tokenizer-sentencepiece-ignore-extra-whitespaces",
        "--disable-tokenizer-sentencepiece-ignore-extra-whitespaces",
        negated=True,
        refused="this tokenizer option is not supported yet",
    )
    tokenizer_hf_no_use_fast: bool = opt(
        False, "--tokenizer-hf-no-use-fast", refused="this tokenizer option is not supported yet"
    )
    tokenizer_hf_no_include_special_tokens: bool = opt(
        False, "--tokenizer-hf-no-include-special-tokens", help="Add no special tokens when encoding text."
    )
    trust_remote_code: bool = opt(
        False, "--trust-remote-code", help="Let a Hugging Face tokenizer run code of its own.", effect="path"
    )
    null_tokenizer_eod_id: int | None = opt(
        None, "--null-tokenizer-eod-id", help="End-of-document id of NullTokenizer; the last id when unset."
    )
    null_tokenizer_pad_id: int = opt(-1, "--null-tokenizer-pad-id", help="Padding id of NullTokenizer.")
    chat_template: str | None = opt(
        None, "--chat-template", help="Chat template, or the file that has it, in place of the tokenizer's own."
    )
    tokenizer_prompt_format: str = opt(
        "nemotron-h-aligned",
        "--sft-tokenizer-prompt-format",
        help="Chat template of SFTTokenizer: default, the tokenizer's own, or identity, contents without more.",
    )
