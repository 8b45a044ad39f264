import shlex
from pathlib import Path

import pytest
import yaml

from lockstep.cli import main
from lockstep.errors import UserError
from lockstep.guard import USER_ERROR
from lockstep.jobfile.job import seconds_of
from tests.commands import RECIPE, TINY

INNER = ["pretrain-gpt", *TINY]
IMAGE = ["--image", "team/image"]


def test_the_file_is_printed_and_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.sbatch"
    argv = ["launch", "--slurm", "--out", str(file), "--", *INNER]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.out == file.read_text()
    assert captured.out.startswith("#!/bin/bash\n")
    assert captured.err == f"wrote {file}; submit it with: sbatch {file}\n"
    assert main(argv) == USER_ERROR
    assert "exists already" in capsys.readouterr().err
    assert main(["launch", "--slurm", "--out", str(tmp_path / "no" / "job"), "--", *INNER]) == USER_ERROR
    assert "No such file" in capsys.readouterr().err


def test_the_examples_of_the_guide_write_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs/launching.md").read_text().replace("\\\n", " ")
    examples = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("lockstep launch")]
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    for words in examples:
        assert main(words) == 0, capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.sbatch", "job.yaml"]


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (INNER, ["-m", "lockstep.cli", *INNER]),
        (["train", *RECIPE], ["-m", "lockstep.cli", "train", *RECIPE]),
        (["3rdparty/Megatron-LM/pretrain_gpt.py", *TINY], ["3rdparty/Megatron-LM/pretrain_gpt.py", *TINY]),
        (["scripts/training/run_recipe.py", *RECIPE], ["scripts/training/run_recipe.py", *RECIPE]),
    ],
)
def test_either_door_by_name_or_script(
    inner: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for engine in (["--kubernetes"], ["--kubernetes", "job"]):
        assert main(["launch", *engine, *IMAGE, "--", *inner]) == 0
        _, job = yaml.safe_load_all(capsys.readouterr().out)
        words = job["spec"]["template"]["spec"]["containers"][0]["command"]
        assert words[:3] == ["python", "-m", "torch.distributed.run"]
        assert words[-len(expected) :] == expected
    assert main(["launch", "--kubernetes", "trainjob", *IMAGE, "--", *inner]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["spec"]["trainer"]["args"] == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slurm", "--", "pretrain-gpt", *TINY, "--num-layer", "2"], "unknown flag --num-layer. Did you mean"),
        (["--slurm", "--", "train", *RECIPE, "model.num_layer=2"], "unknown key model.num_layer. Did you mean"),
        (["--slurm", "--", "pretrain-gpt", *TINY, "--hidden-size", "15"], "not divisible by --num-attention-heads"),
        (["--slurm", "--gpus-per-node", "2", "--", *INNER, "--tensor-model-parallel-size", "3"], "model-parallel-size"),
        (["--slurm", "--nodes", "3", "--", *INNER], "3 "),
        (["--slurm"], "no training command; give it after --"),
        (["--slurm", "--", "pretrain", *TINY], "begins with 'pretrain'; begin it with pretrain-gpt, train, or"),
        (["--slurm", "--", *TINY], "begins with '--num-layers'"),
        (["--slurm", "--nodes", "0", "--", *INNER], "--nodes 0: give 1 or more"),
        (["--slurm", "--gpus-per-node", "0", "--", *INNER], "--gpus-per-node 0: give 1 or more"),
        (["--slurm", "--cpus-per-node", "-1", "--", *INNER], "--cpus-per-node -1: give 1 or more"),
        (["--slurm", "--rdzv-port", "80", "--", *INNER], "give a port from 1024"),
        (["--slurm", "--name", "My Job", "--", *INNER], "--name My Job: use lower-case letters"),
        (["--slurm", "--name", "a" * 53, "--", *INNER], "at most 52 characters"),
        (["--slurm", "--time", "soon", "--", *INNER], "--time soon: write minutes"),
        (["--slurm", "--partition", "a b", "--", *INNER], "--partition 'a b': use letters"),
        (["--slurm", "--env", "A-B=1", "--", *INNER], "--env A-B=1: write NAME=VALUE"),
        (["--slurm", "--env", "A=1", "--env", "A", "--", *INNER], "--env A is given twice"),
        (["--slurm", "--secret", "x", "--", *INNER], "--secret is for Kubernetes; drop it"),
        (["--slurm", "--volume", "x:/y", "--", *INNER], "--volume is for Kubernetes; drop it"),
        (["--kubernetes", "--", *INNER], "--kubernetes needs --image"),
        (["--kubernetes", *IMAGE, "--partition", "x", "--", *INNER], "--partition is for Slurm; drop it"),
        (["--kubernetes", *IMAGE, "--account", "x", "--", *INNER], "--account is for Slurm; drop it"),
        (["--kubernetes", *IMAGE, "--env", "TOKEN", "--", *INNER], "pods do not see your environment"),
        (["--kubernetes", *IMAGE, "--volume", "x:y", "--", *INNER], "--volume x:y: write CLAIM:/absolute/path"),
        (["--kubernetes", "trainjob", *IMAGE, "--volume", "x:/y", "--", *INNER], "from its training runtime"),
        (["--kubernetes", "trainjob", *IMAGE, "--rdzv-port", "2000", "--", *INNER], "always takes 29500"),
    ],
)
def test_mistakes_are_one_message_and_no_file(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "--out", str(tmp_path / "job"), *words]) == USER_ERROR
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    "words", [[], ["--slurm", "--kubernetes"], ["--slurm", "--node", "2"], ["--kubernetes", "pod"]]
)
def test_options_are_not_guessed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["launch", *words, "--", *INNER])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("1:30", 90), ("2:00:05", 7205), ("1-0", 86400), ("1-2:30", 95400), ("0-0:00:01", 1)],
)
def test_times_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize("time", ["", "0", "1h", "1:2:3:4", "-5", "1-"])
def test_other_times_are_refused(time: str) -> None:
    with pytest.raises(UserError, match="--time"):
        seconds_of(time)
