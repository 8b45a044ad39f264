"""From the options of ``lockstep launch`` to the text of a job file."""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import PurePosixPath

from lockstep.errors import ConfigError, UserError
from lockstep.jobfile.command import check_command
from lockstep.jobfile.job import Job, check_name, seconds_of, split_environment
from lockstep.jobfile.kubernetes import TRAINJOB_PORT, indexed_job, train_job
from lockstep.jobfile.slurm import sbatch_script

_SLURM_NAME = re.compile(r"[\w.,-]+")


def job_file(options: argparse.Namespace) -> str:
    """Return the text of the job file that the options ask for.

    Raises:
        UserError: an option cannot be taken, or the training command cannot run.
    """
    problems = list(_problems(options))
    if problems:
        raise ConfigError(problems)
    values, passed_on = split_environment(options.env)
    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    command = check_command(words, options.nodes * options.gpus_per_node)
    job = Job(
        name=check_name(options.name),
        command=tuple(command),
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        python=options.python or ("python" if options.image else sys.executable),
        port=options.rdzv_port or TRAINJOB_PORT,
        environment=values,
        passed_on=passed_on,
        cpus_per_node=options.cpus_per_node,
        time_s=seconds_of(options.time) if options.time is not None else None,
        image=options.image,
    )
    if options.slurm:
        return sbatch_script(job, partition=options.partition, account=options.account)
    if passed_on and options.secret is None:
        raise UserError(
            f"--env {passed_on[0]}: pods do not see your environment; write {passed_on[0]}=VALUE, or name the secret "
            "that holds it with --secret"
        )
    if options.kubernetes == "trainjob":
        return train_job(job, secret=options.secret)
    return indexed_job(job, secret=options.secret, volumes=dict(map(_claim, options.volume)))


def _problems(options: argparse.Namespace) -> Iterator[str]:
    for option in ("nodes", "gpus_per_node", "cpus_per_node"):
        value = getattr(options, option)
        if value is not None and value < 1:
            yield f"--{option.replace('_', '-')} {value}: give 1 or more"
    if options.rdzv_port is not None and not 1024 <= options.rdzv_port <= 65535:
        yield f"--rdzv-port {options.rdzv_port}: give a port from 1024 to 65535"
    yield from _misplaced(options)
    for option in ("partition", "account"):
        value = getattr(options, option)
        if value is not None and not _SLURM_NAME.fullmatch(value):
            yield f"--{option} {value!r}: use letters, digits and '_', '-', '.', ','"
    if not options.slurm and options.image is None:
        yield "--kubernetes needs --image, the container image that has Lockstep in it"


def _misplaced(options: argparse.Namespace) -> Iterator[str]:
    foreign = ("secret", "volume") if options.slurm else ("partition", "account")
    engine = "Kubernetes" if options.slurm else "Slurm"
    for option in foreign:
        if getattr(options, option):
            yield f"--{option} is for {engine}; drop it"
    if options.kubernetes == "trainjob":
        if options.volume:
            yield "--volume is for --kubernetes job; a TrainJob takes its volumes from its training runtime"
        if options.rdzv_port is not None:
            yield f"--rdzv-port is for --kubernetes job; Kubeflow Trainer always takes {TRAINJOB_PORT}"


def _claim(word: str) -> tuple[str, str]:
    claim, _, path = word.partition(":")
    if not claim or not PurePosixPath(path).is_absolute():
        raise UserError(f"--volume {word}: write CLAIM:/absolute/path")
    return check_name(claim), path
