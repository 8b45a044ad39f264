"""Checks of the settings of fine-tuning data."""

from collections.abc import Callable, Iterator

from lockstep.config.container import ConfigContainer, all_fields
from lockstep.config.finetuning import FineTuningData

_OF_PACKING = (
    "packed_sequence_size",
    "packing_algorithm",
    "pad_seq_to_mult",
)
_OF_PRETRAINING = (
    "dataset.reset_position_ids",
    "dataset.reset_attention_mask",
    "dataset.eod_mask_loss",
    "dataset.data_args_path",
    "dataset.per_split_data_args_path",
)
_PROMPT_FORMATS = ("default", "identity")


def finetuning_problems(c: ConfigContainer, name: Callable[[str], str]) -> Iterator[str]:
    """Yield what is wrong with the settings of fine-tuning; ``name`` spells a path as the user gave it."""
    yield from _tokenizer(c, name)
    if not c.dataset.sft:
        yield from _without(c, name)
        return
    yield from _sources(c, name)
    yield from _lengths(c, name)
    for path in _OF_PRETRAINING:
        if c.get(path):
            yield f"{name(path)} has no effect on fine-tuning data; drop it"
    if "{prompt}" not in c.dataset.prompt_template:
        yield f"{name('dataset.prompt_template')} = {c.dataset.prompt_template!r} has no {{prompt}}; write it in"


def _without(c: ConfigContainer, name: Callable[[str], str]) -> Iterator[str]:
    for field in FineTuningData.__dataclass_fields__:
        info = all_fields()[f"dataset.{field}"]
        if info.spec.support == "implemented" and c.get(info.path) != info.default:
            yield f"{name(info.path)} has no effect without dataset.sft (--sft); add that or drop this one"
    if c.dataset.dataloader_type == "batch":
        yield f"{name('dataset.dataloader_type')} = batch is the order of fine-tuning data; add dataset.sft (--sft)"


def _tokenizer(c: ConfigContainer, name: Callable[[str], str]) -> Iterator[str]:
    t, kind = c.tokenizer, c.tokenizer.tokenizer_type
    if kind == "SFTTokenizer" and t.chat_template is None and t.tokenizer_prompt_format not in _PROMPT_FORMATS:
        yield (
            f"{name('tokenizer.tokenizer_prompt_format')} = {t.tokenizer_prompt_format}: NVIDIA's templates are not "
            f"part of Lockstep; give {' or '.join(_PROMPT_FORMATS)}, or a template in tokenizer.chat_template "
            "(--chat-template)"
        )
    if t.chat_template is not None and kind not in ("HuggingFaceTokenizer", "SFTTokenizer"):
        yield f"{name('tokenizer.chat_template')} has no effect with {kind}; use HuggingFaceTokenizer or drop it"


def _sources(c: ConfigContainer, name: Callable[[str], str]) -> Iterator[str]:
    d = c.dataset
    per_split = any((d.train_data_path, d.valid_data_path, d.test_data_path))
    given = [
        path
        for path, value in (
            ("dataset.dataset_root", d.dataset_root),
            ("dataset.hf_dataset_path", d.hf_dataset_path),
            ("dataset.data_path", d.data_path),
            ("dataset.train_data_path", per_split),
        )
        if value
    ]
    if len(given) > 1:
        yield f"{' and '.join(map(name, given))} exclude each other: one place for the data; drop one"
    if not given and not d.mock:
        yield (
            "no data for fine-tuning is named; give dataset.dataset_root (--dataset-root), dataset.hf_dataset_path "
            "(--hf-dataset-path) or dataset.data_path (--data-path), or dataset.mock (--mock-data) for generated data"
        )
    proportion = d.hf_validation_proportion
    if proportion is not None and not 0 <= proportion < 1:
        yield f"{name('dataset.hf_validation_proportion')} = {proportion}: give a share from 0 up to, not including, 1"
    if proportion is not None and d.split is not None and d.data_path:
        yield f"{name('dataset.hf_validation_proportion')} and {name('dataset.split')} exclude each other; drop one"
    if d.hf_dataset_split is not None and d.hf_dataset_path is None:
        yield f"{name('dataset.hf_dataset_split')} has no effect without dataset.hf_dataset_path; give it or drop this"


def _lengths(c: ConfigContainer, name: Callable[[str], str]) -> Iterator[str]:
    d, length = c.dataset, c.model.seq_length
    if not d.enable_offline_packing:
        for field in _OF_PACKING:
            asked = c.origin(f"dataset.{field}").kind != "recipe"
            if asked and getattr(d, field) != all_fields()[f"dataset.{field}"].default:
                yield (
                    f"{name(f'dataset.{field}')} has no effect without dataset.enable_offline_packing (--sft-packing); "
                    "add that or drop this one"
                )
    elif not d.pad_to_max_length:
        yield f"{name('dataset.pad_to_max_length')} has no effect on packed sequences, which are full; drop it"
    if d.packed_sequence_size is not None and length and d.packed_sequence_size != length:
        yield (
            f"{name('dataset.packed_sequence_size')} = {d.packed_sequence_size} is not {name('model.seq_length')} = "
            f"{length}; a pack is one sequence, so give one of them, or both alike"
        )
    most = d.max_single_sequence_length
    if most is not None and (most < 2 or (length and most > length)):
        yield f"{name('dataset.max_single_sequence_length')} = {most}: give 2 to model.seq_length = {length}"
    if d.pad_seq_to_mult < 1:
        yield f"{name('dataset.pad_seq_to_mult')} = {d.pad_seq_to_mult}: give 1 or more"
    if not d.pad_to_max_length and d.dataloader_type == "cyclic":
        yield f"{name('dataset.pad_to_max_length')} = false needs dataset.dataloader_type single or batch; give that"
