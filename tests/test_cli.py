import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.cli import main
from lockstep.errors import CommonError, ConfigError, UserError
from lockstep.guard import CLOSED_PIPE, INTERRUPTED, PATIENCE_SECONDS, USER_ERROR, run
from tests.commands import FLAGS, RECIPE, TINY

ROOT = Path(__file__).resolve().parents[1]


def test_import_and_help_are_quick_and_leave_torch_alone() -> None:
    """Seconds of the processor since the interpreter started: those of the clock depend on who else is running."""
    code = (
        "import sys, time; import lockstep; imported = time.process_time()\n"
        "from lockstep.cli import build_parser; build_parser().format_help()\n"
        "parsed = time.process_time()\n"
        "print(imported, parsed, 'torch' in sys.modules)"
    )
    quickest = [float("inf"), float("inf")]
    for _ in range(3):
        words = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        quickest = [min(old, float(new)) for old, new in zip(quickest, words[:2], strict=True)]
        assert words[2] == "False"
    assert quickest[0] < 0.3
    assert quickest[1] < 0.5


def test_a_run_imports_no_more_than_it_needs(tmp_path: Path) -> None:
    """What of PyTorch is for compilers or several processes, and packages of other jobs, would slow every start."""
    torch_parts = ("_dynamo", "_inductor", "distributed.checkpoint", "distributed.fsdp", "distributed.pipelining")
    unneeded = [f"torch.{part}" for part in (*torch_parts, "distributed.tensor", "fx.experimental.symbolic_shapes")]
    unneeded += ["sympy", "transformers", "tokenizers", "matplotlib", "rich", "hydra", "omegaconf", "yaml", "pandas"]
    words = ["pretrain-gpt", *TINY, "--bf16", "--eval-iters", "1", "--max-position-embeddings", "8"]
    code = (
        f"import gc, sys; from lockstep.cli import main; code = main({words})\n"
        "import torch; from lockstep.parallel.plan import Shard\n"
        "Shard(0, blocks=2).part(torch.empty(8, 2, device='meta'), 2, 1)  # as tensor parallelism does\n"
        f"print([name for name in {unneeded} if name in sys.modules], code, gc.get_freeze_count() > 50_000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[] 0 True"


def test_user_errors_become_one_message_and_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise UserError("what is wrong; what to do")

    def interrupt() -> int:
        raise KeyboardInterrupt

    assert run(fail) == USER_ERROR
    assert capsys.readouterr().err == "error: what is wrong; what to do\n"
    assert run(interrupt) == INTERRUPTED
    assert run(lambda: 0) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pretrain-gpt", *TINY, "--num-layer", "2"], "unknown flag --num-layer. Did you mean --num-layers"),
        (["pretrain-gpt", *TINY, "--hidden-size", "15"], "not divisible by --num-attention-heads"),
        (["pretrain-gpt", *TINY, "--global-batch-size", "5"], "not divisible by the micro-batch size 2; use 4 or 6"),
        (["train", *RECIPE, "model.num_layer=2"], "unknown key model.num_layer. Did you mean model.num_layers"),
        (["train", *RECIPE, "model.num_layers=two"], "model.num_layers: expected int or null, got 'two'"),
        (["train", "--recipe", "vanila_gpt"], "unknown recipe vanila_gpt. Did you mean vanilla_gpt_pretrain_config"),
    ],
)
def test_bad_input_on_either_door(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == USER_ERROR
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("argv", [["pretrain-gpt", *FLAGS, "--print-config"], ["train", *RECIPE, "--dry-run"]])
def test_the_resolved_tree_is_printed_with_origins(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "model.num_layers = 2  # command line (" in shown
    assert "model.kv_channels = 64  # derived (model.hidden_size // model.num_attention_heads)" in shown


def test_only_one_process_tells_of_a_mistake_that_all_find(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(kind: type[UserError]) -> int:
        raise kind("what is wrong")

    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    said = "error: what is wrong\n"
    for rank, kind, err, waits in (
        ("0", ConfigError, said, []),
        ("1", ConfigError, "", [PATIENCE_SECONDS]),  # a launcher kills the others when it ends
        ("1", CommonError, "", [PATIENCE_SECONDS]),
        ("1", UserError, said, []),
    ):
        monkeypatch.setenv("RANK", rank)
        slept.clear()
        assert run(lambda kind=kind: fail(kind)) == USER_ERROR  # type: ignore[misc]
        assert (capsys.readouterr().err, slept) == (err, waits)


def test_a_closed_pipe_ends_quietly() -> None:
    command = [sys.executable, "-m", "lockstep.cli", "train", *RECIPE, "--dry-run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == CLOSED_PIPE


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert "vanilla_gpt_pretrain_config" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["3rdparty/Megatron-LM/pretrain_gpt.py", *FLAGS, "--print-config"],
        ["scripts/training/run_recipe.py", *RECIPE, "--dry-run"],
    ],
)
def test_scripts_at_their_usual_paths_run_with_a_foreign_pythonpath(words: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={"PATH": "", "PYTHONPATH": "3rdparty/Megatron-LM"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "model.num_layers = 2" in result.stdout
