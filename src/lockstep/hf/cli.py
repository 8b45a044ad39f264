"""``lockstep convert import|export|check``: Hugging Face folders and checkpoints of Lockstep."""

import argparse
import re
from pathlib import Path
from typing import Any

from lockstep.hf import SHARD_BYTES

DIFFERENT = 1
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def register(subparsers: Any) -> None:
    """Add the ``convert`` subcommand to what ``ArgumentParser.add_subparsers`` returned."""
    parser = subparsers.add_parser(
        "convert", help="convert weights from and to Hugging Face, and prove it", description=__doc__
    )
    commands = parser.add_subparsers(dest="convert_command", required=True, metavar="COMMAND")
    _register_import(commands)
    _register_export(commands)
    _register_check(commands)


def _register_import(commands: Any) -> None:
    parser = commands.add_parser(
        "import",
        help="write a Hugging Face folder as a checkpoint",
        description="Write the weights of a Hugging Face folder as a checkpoint, from which a run starts with "
        "--load DIR --finetune.",
        allow_abbrev=False,
    )
    _add_model(parser)
    parser.add_argument("checkpoints", type=Path, metavar="DIR", help="folder that the checkpoint is written into")
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=_positive,
        default=1,
        metavar="N",
        help="pad the vocabulary with rows of zeros to a multiple of N (default: no padding)",
    )
    parser.set_defaults(func=_import)


def _register_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a checkpoint as a Hugging Face folder",
        description="Write a checkpoint of any layout as a Hugging Face folder, which transformers loads.",
        allow_abbrev=False,
    )
    _add_checkpoint(parser)
    parser.add_argument("model", type=Path, metavar="HF_FOLDER", help="folder to write; it must not exist yet")
    parser.add_argument(
        "--hf-model",
        type=Path,
        metavar="FOLDER",
        help="take config.json, tokenizer and generation files from this Hugging Face folder (default: those that "
        "were imported with the weights, if any)",
    )
    parser.add_argument(
        "--vocab-size", type=_positive, metavar="N", help="vocabulary without padding, where no --hf-model tells it"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="number format of the weights (default: kept)"
    )
    parser.add_argument(
        "--max-shard-size", type=_bytes, default=SHARD_BYTES, metavar="SIZE", help="such as 500MB (default: 5GB)"
    )
    parser.set_defaults(func=_export)


def _register_check(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="prove that a Hugging Face folder and a checkpoint are one model",
        description="Compare settings, every bit of the weights in both directions, and the logits of random tokens "
        "against transformers. The exit code is 0 where all is the same and 1 where not.",
        allow_abbrev=False,
    )
    _add_model(parser)
    _add_checkpoint(parser)
    parser.add_argument(
        "--tokens", type=_positive, default=64, metavar="N", help="of each of two samples (default: 64)"
    )
    parser.add_argument(
        "--no-logits", action="store_true", help="compare weights alone, for a model larger than memory"
    )
    parser.set_defaults(func=_check)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="HF_FOLDER", help="folder with config.json and safetensors files")


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", type=Path, metavar="DIR", help="folder of checkpoints, or one checkpoint")
    parser.add_argument("--ckpt-step", type=_step, metavar="N", help="iteration instead of the newest")


def _step(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: give 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0")
    return int(text)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text)
    if match is None or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a size such as 500MB or 5GB")
    return int(match[1]) * _UNITS[match[2]]


def _import(options: argparse.Namespace) -> int:
    from lockstep.hf.convert import import_model

    folder = import_model(options.model, options.checkpoints, divisor=options.make_vocab_size_divisible_by)
    print(f"{options.model} -> {folder}")
    print(f"start from it with --load {options.checkpoints} --finetune --use-checkpoint-args")
    return 0


def _export(options: argparse.Namespace) -> int:
    from lockstep.hf.convert import export_model

    names = export_model(
        options.checkpoints,
        options.model,
        step=options.ckpt_step,
        reference=options.hf_model,
        size=options.vocab_size,
        dtype=options.dtype,
        shard_bytes=options.max_shard_size,
    )
    print(f"{options.checkpoints} -> {options.model}: {', '.join(names)}")
    return 0


def _check(options: argparse.Namespace) -> int:
    from lockstep.hf.check import check_model

    findings = check_model(
        options.model, options.checkpoints, step=options.ckpt_step, tokens=options.tokens, logits=not options.no_logits
    )
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        print(f"{finding.what:<{width}}  {'same' if finding.same else 'DIFFERENT'}  {finding.result}")
    return 0 if all(finding.same for finding in findings) else DIFFERENT
