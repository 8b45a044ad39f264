"""``lockstep data prepare``, ``verify`` and ``show``, and the flags of Megatron-LM's preprocess_data.py."""

import argparse
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lockstep.config.data import DatasetConfig, TokenizerConfig
from lockstep.config.fields import FieldInfo, choices_of, members
from lockstep.config.finetuning import FineTuningData
from lockstep.errors import UserError

_REFUSED: dict[str, str] = {
    "--split-sentences": "documents are written whole, as GPT training reads them; split the text beforehand",
    "--keep-newlines": "it belongs to --split-sentences",
    "--lang": "it belongs to --split-sentences",
    "--find-optimal-num-workers": "set --workers, one a core is a good choice",
    "--workers-to-check": "it belongs to --find-optimal-num-workers",
    "--max-documents": "it belongs to --find-optimal-num-workers",
    "--padded-vocab-size": "files hold the tokenizer's own ids; padding belongs to the model",
}
"""Flags of preprocess_data.py that are not supported, and why."""


def register(subparsers: Any) -> None:
    """Add the ``data`` subcommand to what ``ArgumentParser.add_subparsers`` returned."""
    parser = subparsers.add_parser("data", help="prepare and verify token files", description=__doc__)
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    prepare = commands.add_parser(
        "prepare", help="tokenize JSON lines into .bin/.idx", description="Tokenize JSON lines into .bin/.idx files."
    )
    add_prepare_arguments(prepare)
    prepare.set_defaults(func=run_prepare)
    verify = commands.add_parser(
        "verify", help="check .bin/.idx", description="Check .bin/.idx files; exit code 1 when a problem is found."
    )
    add_verify_arguments(verify)
    verify.set_defaults(func=run_verify)
    show = commands.add_parser(
        "show",
        help="print samples for fine-tuning",
        description="Print samples for fine-tuning, what is learned marked.",
    )
    add_show_arguments(show)
    show.set_defaults(func=run_show)


def add_prepare_arguments(parser: argparse.ArgumentParser, positional_input: bool = True) -> None:
    """Add the arguments of ``prepare``; ``positional_input`` also takes the input without its flag."""
    if positional_input:
        parser.add_argument("corpus", nargs="?", metavar="INPUT", help="JSON lines file, same as --input")
    add = parser.add_argument
    add("--input", help="JSON lines file, plain or .gz; a glob pattern for several")
    add("--output-prefix", required=True, help="files are named PREFIX_KEY_document.bin and .idx")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="text fields (default: text)")
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add("--workers", type=int, help="processes (default: all cores)")
    add("--partitions", type=int, default=1, help="deal documents out to so many parts, joined one after another")
    add("--keep-sequential-samples", action="store_true", help="keep the order of documents with --partitions")
    add("--log-interval", type=int, default=1000, help="documents between progress lines without a terminal")
    _add_tokenizer_arguments(parser)
    for flag, reason in _REFUSED.items():
        _refuse(parser, (flag,), reason)


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``verify``."""
    parser.add_argument("prefix", help="path of the files without .bin and .idx")
    _add_tokenizer_arguments(parser)


def add_show_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``show``."""
    parser.add_argument("data", help="JSON lines or parquet file, folder with training.jsonl, or saved data set")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="how many (default: 3)")
    parser.add_argument("--seq-length", type=int, required=True, metavar="N", help="tokens of a sample")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="seed of packs and order (default: 1234)")
    parser.add_argument("--dataloader-type", choices=["single", "batch"], default="single", help="sample order")
    group = parser.add_argument_group("fine-tuning")
    for info in _text_fields():
        group.add_argument(*info.spec.flags, dest=info.name, default=info.default, **_argument(info))
    _add_tokenizer_arguments(parser)


def _text_fields() -> list[FieldInfo]:
    """Return the fields that decide how rows become samples."""
    paths = ("sft", "dataset_root", "hf_dataset_path", "do_validation", "do_test", "hf_validation_proportion")
    fields = DatasetConfig.fields()
    ours = (fields[name] for name in FineTuningData.__dataclass_fields__ if name not in paths)
    return [info for info in ours if info.spec.flags and not info.spec.refused]


def _add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tokenizer")
    for info in TokenizerConfig.fields().values():
        if not info.spec.flags:
            continue
        if info.spec.refused:
            _refuse(group, info.spec.flags, info.spec.refused)
        else:
            group.add_argument(*info.spec.flags, dest=info.name, default=info.default, **_argument(info))


def _argument(info: FieldInfo) -> dict[str, Any]:
    kinds = [member for member in members(info.type) if member is not type(None)]
    if bool in kinds:
        return {"action": "store_false" if info.spec.negated else "store_true", "help": info.spec.help}
    choices = list(choices_of(info))
    if any(typing.get_origin(kind) is Literal for kind in kinds):
        return {"choices": choices, "metavar": "TYPE", "help": f"{info.spec.help} One of {', '.join(choices)}."}
    return {"type": kinds[0], "help": info.spec.help}


def _refuse(parser: Any, flags: Sequence[str], reason: str) -> None:
    class Refuse(argparse.Action):
        def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
            parser.error(f"{rest[-1]} is not supported: {reason}")

    parser.add_argument(*flags, nargs="*", action=Refuse, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def tokenizer_config(args: argparse.Namespace) -> TokenizerConfig:
    """Return the tokenizer section that the parsed arguments spell."""
    config = TokenizerConfig()
    for info in TokenizerConfig.fields().values():
        value = getattr(args, info.name, info.default)
        if value != info.default:
            setattr(config, info.name, value)
    return config


def run_prepare(args: argparse.Namespace) -> int:
    """Run ``prepare`` and return the exit code."""
    from lockstep.data.prepare import PrepareOptions, prepare

    given = [value for value in (getattr(args, "corpus", None), args.input) if value is not None]
    if len(given) != 1:
        raise UserError("give one input, as the first argument or with --input")
    options = PrepareOptions(
        input=given[0],
        output_prefix=args.output_prefix,
        tokenizer=tokenizer_config(args),
        json_keys=args.json_keys,
        append_eod=args.append_eod,
        workers=args.workers,
        partitions=args.partitions,
        keep_sequential_samples=args.keep_sequential_samples,
        log_interval=args.log_interval,
    )
    for files in prepare(options):
        print(f"{files.prefix}.bin/.idx: {files.documents:,} documents, {files.tokens:,} tokens, {files.dtype}")
        print(f"  .bin sha256 {files.bin_sha256}")
        print(f"  .idx sha256 {files.idx_sha256}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Run ``verify`` and return the exit code: 0 when no problem was found."""
    from lockstep.data.tokenizers import build_tokenizer
    from lockstep.data.verify import summary, verify

    config = tokenizer_config(args)
    tokenizer = build_tokenizer(config) if config.tokenizer_type is not None else None
    report = verify(args.prefix, tokenizer, None if tokenizer else config.vocab_size)
    print(summary(report))
    return 0 if report.ok else 1


def run_show(args: argparse.Namespace) -> int:
    """Run ``show`` and return the exit code."""
    from lockstep.data.sft.build import ROOT_FILES
    from lockstep.data.sft.show import show
    from lockstep.data.tokenizers import build_tokenizer

    path = Path(args.data)
    is_root = (path / ROOT_FILES["train"]).is_file()
    place = "dataset_root" if is_root else "hf_dataset_path" if path.is_dir() else "train_data_path"
    fields = {info.name: getattr(args, info.name) for info in _text_fields()}
    fields |= {place: [args.data] if place == "train_data_path" else args.data, "dataloader_type": args.dataloader_type}
    tokenizer = build_tokenizer(tokenizer_config(args))
    show(DatasetConfig(sft=True, **fields), tokenizer, seq_length=args.seq_length, seed=args.seed, count=args.samples)
    return 0


def preprocess_main(argv: Sequence[str] | None = None) -> int:
    """Run ``prepare`` with exactly the flags of Megatron-LM's preprocess_data.py; returns the exit code."""
    from lockstep.guard import run

    parser = argparse.ArgumentParser(description="Tokenize JSON lines into .bin/.idx files.", allow_abbrev=False)
    add_prepare_arguments(parser, positional_input=False)
    args = parser.parse_args(argv)
    return run(lambda: run_prepare(args))
