"""The ``launch`` subcommand."""

import argparse
import sys
from pathlib import Path

from lockstep.errors import UserError

_DEFAULT_PORT = 29500


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``lockstep launch``."""
    parser = subparsers.add_parser(
        "launch",
        help="write a job file for Slurm or Kubernetes",
        description="Check a training command and write the job file that runs it. Nothing is started.",
        usage="%(prog)s (--slurm | --kubernetes [KIND]) [options] -- COMMAND ...",
        allow_abbrev=False,
    )
    engine = parser.add_mutually_exclusive_group(required=True)
    engine.add_argument("--slurm", action="store_true", help="a script for sbatch")
    engine.add_argument(
        "--kubernetes",
        nargs="?",
        const="job",
        choices=("job", "trainjob"),
        metavar="KIND",
        help="a manifest: job, an indexed Job with a headless Service (default), or trainjob, for Kubeflow Trainer",
    )
    _add_options(parser)
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="COMMAND", help="pretrain-gpt or train, and its arguments"
    )
    parser.set_defaults(func=_launch)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="lockstep", metavar="NAME", help="name of the job (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: %(default)s)")
    parser.add_argument(
        "--gpus-per-node", type=int, default=1, metavar="N", help="GPUs, and processes, of each (default: %(default)s)"
    )
    parser.add_argument("--cpus-per-node", type=int, metavar="N", help="CPU cores of each")
    parser.add_argument("--time", metavar="TIME", help="longest running time: minutes, h:mm:ss or days-h:mm:ss")
    parser.add_argument("--image", metavar="IMAGE", help="container image")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="set a variable, or pass one on: from where a Slurm job is submitted, from --secret with Kubernetes",
    )
    parser.add_argument(
        "--python", metavar="PATH", help="interpreter on the machines (default: this one; python with an image)"
    )
    parser.add_argument(
        "--rdzv-port", type=int, metavar="PORT", help=f"port where processes meet (default: {_DEFAULT_PORT})"
    )
    parser.add_argument("--partition", metavar="NAME", help="Slurm partition")
    parser.add_argument("--account", metavar="NAME", help="Slurm account")
    parser.add_argument("--secret", metavar="NAME", help="Kubernetes secret that holds the variables of --env NAME")
    parser.add_argument(
        "--volume",
        action="append",
        default=[],
        metavar="CLAIM:PATH",
        help="persistent volume claim of Kubernetes, and where the job sees it",
    )
    parser.add_argument("--out", metavar="FILE", help="also write the file; it must not exist")


def _launch(arguments: argparse.Namespace) -> int:
    from lockstep.jobfile.options import job_file

    text = job_file(arguments)
    submit = "sbatch" if arguments.slurm else "kubectl create -f"
    if arguments.out is not None:
        _write(Path(arguments.out), text)
        print(f"wrote {arguments.out}; submit it with: {submit} {arguments.out}", file=sys.stderr)
    print(text, end="")
    return 0


def _write(file: Path, text: str) -> None:
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UserError(f"--out {file} exists already; name another file or remove it") from None
    except OSError as error:
        raise UserError(f"--out {file}: {error.strerror}") from None
