import json
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.cli import main
from lockstep.jobfile.job import Job
from lockstep.jobfile.slurm import sbatch_script
from tests.commands import TINY

JOB = Job(
    name="big-run",
    command=("-m", "lockstep.cli", "pretrain-gpt", "--num-layers", "2"),
    nodes=3,
    gpus_per_node=8,
    python="/env/bin/python",
    port=29511,
)
AWKWARD = ("it's", "$HOME", "$(date)", 'say "x"', "a b", "back\\slash", "`id`", "two\nlines", "", "#no", "é*?", "!x")


def check_syntax(script: str) -> None:
    result = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, ""), script


def run_with_stand_ins(script: str, folder: Path, srun: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a batch script with stand-ins for Slurm's commands; ``srun`` is what srun does with its command in $@."""
    folder.mkdir()
    for name, body in {
        "scontrol": "echo localhost; echo other",
        "srun": "while [[ $1 == --* ]]; do shift; done\n" + srun,
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", script], env={**os.environ, **slurm, **environment}, capture_output=True, text=True, check=False
    )


def test_directives_and_torchrun() -> None:
    script = sbatch_script(replace(JOB, time_s=93600, cpus_per_node=64), partition="gpu", account="team")
    check_syntax(script)
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert [line.removeprefix("#SBATCH --") for line in directives] == [
        "job-name=big-run",
        "partition=gpu",
        "account=team",
        "time=1-02:00:00",
        "nodes=3",
        "ntasks-per-node=1",
        "gpus-per-node=8",
        "cpus-per-task=64",
    ]
    # sbatch reads no directive after the first command.
    assert script.index("set -euo") > script.rindex("#SBATCH")
    words = shlex.split(script[script.rindex("srun ") :].replace("\\\n", ""))
    assert words == [
        *"srun --kill-on-bad-exit=1 --cpu-bind=none --cpus-per-task=64".split(),
        *"/env/bin/python -m torch.distributed.run --nnodes=3 --nproc_per_node=8 --rdzv_backend=c10d".split(),
        *"--rdzv_id=$SLURM_JOB_ID --rdzv_endpoint=$head_node:29511".split(),
        *"-m lockstep.cli pretrain-gpt --num-layers 2".split(),
    ]


def test_every_word_and_variable_arrives_as_it_was_given(tmp_path: Path) -> None:
    values = {f"V{number}": value for number, value in enumerate(AWKWARD)}
    job = replace(JOB, command=AWKWARD, environment=values)
    script = sbatch_script(job)
    check_syntax(script)
    show = "import json, os, sys; print(json.dumps([sys.argv[1:], {k: v for k, v in os.environ.items()}]))"
    result = run_with_stand_ins(script, tmp_path / "bin", f'exec {sys.executable} -c {shlex.quote(show)} "$@"')
    assert result.returncode == 0, result.stderr
    words, environment = json.loads(result.stdout)
    assert tuple(words[-len(AWKWARD) :]) == AWKWARD
    assert "--rdzv_endpoint=localhost:29511" in words
    assert "--rdzv_id=7" in words
    assert {name: environment[name] for name in values} == values


def test_a_passed_on_variable_has_to_be_there_and_failure_is_the_exit_code(tmp_path: Path) -> None:
    script = sbatch_script(replace(JOB, passed_on=("LOCKSTEP_TOKEN",)))
    missing = run_with_stand_ins(script, tmp_path / "a", "exit 0")
    assert missing.returncode != 0
    assert "LOCKSTEP_TOKEN: is not set where the job was submitted" in missing.stderr
    given = run_with_stand_ins(script, tmp_path / "b", "echo $LOCKSTEP_TOKEN; exit 3", LOCKSTEP_TOKEN="a $b")
    assert (given.returncode, given.stdout) == (3, "a $b\n")
    assert "a $b" not in script


def test_an_image_is_started_with_the_directory_of_submission() -> None:
    script = sbatch_script(replace(JOB, image="registry/team/image:1"))
    check_syntax(script)
    assert "--container-image=registry/team/image:1 " in script
    assert '--container-mounts="$PWD:$PWD"' in script


def test_the_script_runs_under_real_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    inner = ["pretrain-gpt", *TINY, "--run-dir", str(tmp_path / "a run's $dir"), "--print-config"]
    assert main(["launch", "--slurm", "--rdzv-port", port, "--", *inner]) == 0
    result = run_with_stand_ins(capsys.readouterr().out, tmp_path / "bin", 'exec "$@"')
    assert result.returncode == 0, result.stderr
    assert f"run.dir = {tmp_path}/a run's $dir" in result.stdout
