"""``lockstep adapter merge|export|import``: adapters into their weights, and from and to Hugging Face's PEFT."""

import argparse
from pathlib import Path
from typing import Any


def register(subparsers: Any) -> None:
    """Add the ``adapter`` subcommand to what ``ArgumentParser.add_subparsers`` returned."""
    parser = subparsers.add_parser(
        "adapter", help="merge adapters into their weights, convert them from and to PEFT", description=__doc__
    )
    commands = parser.add_subparsers(dest="adapter_command", required=True, metavar="COMMAND")
    _register_merge(commands)
    _register_export(commands)
    _register_import(commands)


def _register_merge(commands: Any) -> None:
    parser = commands.add_parser(
        "merge",
        help="add adapters to the weights they are for",
        description="Write the weights with their adapters added, in float32 and rounded once.",
        allow_abbrev=False,
    )
    _add_source(parser)
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder that is written")
    parser.add_argument("--hf", action="store_true", help="write a Hugging Face folder instead of a checkpoint")
    parser.set_defaults(func=_merge)


def _register_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write adapters in the format of Hugging Face's PEFT",
        description="Write a checkpoint of adapters as a folder that the peft library loads.",
        allow_abbrev=False,
    )
    _add_source(parser)
    parser.add_argument("target", type=Path, metavar="PEFT_FOLDER", help="folder to write; it must not exist yet")
    parser.set_defaults(func=_export)


def _register_import(commands: Any) -> None:
    parser = commands.add_parser(
        "import",
        help="write adapters of the peft library as a checkpoint",
        description="Write a folder of the peft library as a checkpoint of adapters, from which a run starts with "
        "--load DIR --finetune --pretrained-checkpoint BASE.",
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, metavar="PEFT_FOLDER", help="folder with adapter_config.json")
    parser.add_argument("target", type=Path, metavar="DIR", help="folder that the checkpoint is written into")
    parser.add_argument(
        "--base", type=Path, required=True, metavar="BASE", help="Hugging Face folder or checkpoint they are for"
    )
    parser.add_argument(
        "--fused",
        action="store_true",
        help="make one adapter of those of query, key and value, and of both halves of a gated MLP",
    )
    parser.set_defaults(func=_import)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", type=Path, metavar="DIR", help="folder of checkpoints, or one checkpoint")
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="iteration instead of the newest")
    parser.add_argument(
        "--base", type=Path, metavar="BASE", help="where the weights are now (default: where they were in training)"
    )


def _merge(options: argparse.Namespace) -> int:
    from lockstep.peft.merge import merge

    written = merge(options.adapters, options.target, base=options.base, step=options.ckpt_step, hf=options.hf)
    print(f"{options.adapters} -> {written}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from lockstep.peft.hf import export_adapters

    names = export_adapters(options.adapters, options.target, base=options.base, step=options.ckpt_step)
    print(f"{options.adapters} -> {options.target}: {', '.join(names)}")
    return 0


def _import(options: argparse.Namespace) -> int:
    from lockstep.peft.hf import import_adapters

    folder = import_adapters(options.source, options.base, options.target, fused=options.fused)
    print(f"{options.source} -> {folder}")
    print(
        f"start from it with --load {options.target} --finetune --pretrained-checkpoint {options.base} "
        "--use-checkpoint-args"
    )
    return 0
