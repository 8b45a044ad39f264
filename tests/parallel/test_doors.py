"""Both doors on two processes under torchrun, and the lab's verdict against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.lab.compare import compare_paths
from lockstep.megatron_lm.parser import parse_flags
from lockstep.recipes.translate import overrides_from_config

ROOT = Path(__file__).resolve().parents[2]
JOB = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128 "
    "--micro-batch-size 2 --global-batch-size 8 --train-iters 4 --eval-iters 2 --eval-interval 4 --mock-data --bf16 "
    "--tokenizer-type NullTokenizer --vocab-size 1024 --lr 1e-4 --log-interval 1 --device cpu"
).split()
TENSOR = [*JOB, "--tensor-model-parallel-size", "2", "--sequence-parallel"]
PLAIN = [*JOB, "--hidden-dropout", "0", "--attention-dropout", "0"]


def torchrun(processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def flags(processes: int, run_dir: Path, *words: str) -> str:
    done = torchrun(processes, "3rdparty/Megatron-LM/pretrain_gpt.py", *words, "--run-dir", str(run_dir))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_both_doors_on_two_processes_and_against_one(tmp_path: Path) -> None:
    printed = flags(2, tmp_path / "flags", *TENSOR)
    assert printed.count("iteration        4/") == 1
    recipe = ["scripts/training/run_recipe.py", "--recipe", "vanilla_gpt_pretrain_config"]
    overrides = overrides_from_config(parse_flags(TENSOR))
    done = torchrun(2, *recipe, *overrides, f"run.dir={tmp_path / 'recipe'}")
    assert done.returncode == 0, done.stderr
    assert compare_paths(tmp_path / "flags", tmp_path / "recipe").decision.verdict == "identical"
    flags(1, tmp_path / "one", *JOB)
    assert compare_paths(tmp_path / "flags", tmp_path / "one").decision.verdict == "rounding"
    flags(2, tmp_path / "context", *JOB, "--context-parallel-size", "2")  # with the dropout masks of one process
    assert compare_paths(tmp_path / "context", tmp_path / "one").decision.verdict == "rounding"


@pytest.mark.slow
def test_data_parallel_runs_differ_by_rounding(tmp_path: Path) -> None:
    flags(1, tmp_path / "one", *PLAIN)
    flags(2, tmp_path / "two", *PLAIN)
    flags(2, tmp_path / "sharded", *PLAIN, "--use-distributed-optimizer")
    flags(2, tmp_path / "fsdp", *PLAIN, "--use-torch-fsdp2")
    for sharded in ("sharded", "fsdp"):
        assert compare_paths(tmp_path / "two", tmp_path / sharded).decision.verdict in ("identical", "rounding")
    layout = json.loads((tmp_path / "fsdp" / "run.json").read_text())["features"]["layout"]
    assert (layout["sharding"], layout["shards"], layout["instances"]) == ("optim_grads_params", 2, 1)
    assert compare_paths(tmp_path / "one", tmp_path / "two").decision.verdict in ("identical", "rounding")


@pytest.mark.slow
def test_a_bad_layout_is_said_once(tmp_path: Path) -> None:
    words = [*JOB, "--tensor-model-parallel-size", "2", "--ffn-hidden-size", "33", "--run-dir", str(tmp_path / "run")]
    done = torchrun(2, "3rdparty/Megatron-LM/pretrain_gpt.py", *words)
    assert done.returncode != 0
    said = "error: --ffn-hidden-size = 33 is not divisible by --tensor-model-parallel-size = 2"
    assert done.stderr.count(said) == 1
    assert not (tmp_path / "run").exists()
