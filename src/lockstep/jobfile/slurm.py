"""A batch script for Slurm: one torchrun on every node, started by srun."""

import shlex

from lockstep.jobfile.job import Job

_WIDTH = 100


def sbatch_script(job: Job, *, partition: str | None = None, account: str | None = None) -> str:
    """Return the text of a script for sbatch.

    The nodes meet at the first of them. With an image, srun starts containers by the Pyxis plugin, which see the
    directory that the job was submitted from.
    """
    note = "# Written by lockstep launch --slurm; submit it with sbatch."
    lines = ["#!/bin/bash", note, *_directives(job, partition, account), "", "set -euo pipefail", ""]
    lines += [f': "${{{name}:?is not set where the job was submitted}}"; export {name}' for name in job.passed_on]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()]
    # sed, unlike head, reads its input to the end: scontrol is not killed while it writes.
    lines += ['head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)', ""]
    meeting = ["--rdzv_backend=c10d", '--rdzv_id="$SLURM_JOB_ID"', f'--rdzv_endpoint="$head_node:{job.port}"']
    launcher = [shlex.quote(word) for word in (*job.launcher, *job.size)]
    command = [shlex.quote(word) for word in job.command]
    lines.append(_wrapped([*_srun(job), *launcher, *meeting, *command]))
    return "\n".join(lines) + "\n"


def _directives(job: Job, partition: str | None, account: str | None) -> list[str]:
    options = {
        "job-name": job.name,
        "partition": partition,
        "account": account,
        "time": _clock(job.time_s) if job.time_s else None,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus_per_node,
        "cpus-per-task": job.cpus_per_node,
    }
    return [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]


def _srun(job: Job) -> list[str]:
    # One task is all processes of a node: bound to the cores of one task they would share a single core.
    words = ["srun", "--kill-on-bad-exit=1", "--cpu-bind=none"]
    if job.cpus_per_node:
        words.append(f"--cpus-per-task={job.cpus_per_node}")
    if job.image:
        words += [f"--container-image={shlex.quote(job.image)}", '--container-mounts="$PWD:$PWD"']
        words.append('--container-workdir="$PWD"')
    return words


def _clock(seconds: int) -> str:
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hour:02}:{minute:02}:{second:02}"


def _wrapped(words: list[str]) -> str:
    """Join shell words to a command over several lines; a flag and its values stay on one."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) >= _WIDTH and (word.startswith("-") or "=" in word):
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}"
    return " \\\n".join(lines)
