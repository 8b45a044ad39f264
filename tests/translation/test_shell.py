"""Launch scripts are read and never run."""

from pathlib import Path

import pytest

from lockstep.errors import ConfigError
from lockstep.translation.shell import read_script

TORCHRUN = "torchrun --nproc_per_node 4 --nnodes=2 pretrain_gpt.py"


def words(tmp_path: Path, text: str, **defined: str) -> list[str]:
    script = tmp_path / "run.sh"
    script.write_text(text)
    return [word.text for word in read_script(script, defined).words]


def problem(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        words(tmp_path, text)
    return str(caught.value).removeprefix(str(tmp_path / "run.sh"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{TORCHRUN} --num-layers 2 \\\n  --bf16", ["--num-layers", "2", "--bf16"]),
        (f"N=12\n{TORCHRUN} --num-layers $N --hidden-size ${{N}}0", ["--num-layers", "12", "--hidden-size", "120"]),
        (f'A="--bf16 --lr 1"\nA+=" --seed 3"\n{TORCHRUN} $A', "--bf16 --lr 1 --seed 3".split()),
        (f"A=(--bf16\n  --lr 1 # fast\n)\nA+=(--seed 3)\n{TORCHRUN} ${{A[@]}}", "--bf16 --lr 1 --seed 3".split()),
        (f'A=(--data-path "a b")\n{TORCHRUN} "${{A[@]}}"', ["--data-path", "a b"]),
        (f"{TORCHRUN} --save $OUT --load '$OUT'", ["--save", "${OUT}", "--load", "$OUT"]),
        (f"TP=${{TP:-2}}\n{TORCHRUN} --tensor-model-parallel-size $TP", ["--tensor-model-parallel-size", "${TP:-2}"]),
        (f"A=2\nB=$((A*3+1))\n{TORCHRUN} --num-layers $B", ["--num-layers", "7"]),
        (f"export A=2; readonly B=3\nA=1 {TORCHRUN} --seed $A$B", ["--seed", "23"]),
        (f"{TORCHRUN} --bf16 2>&1 | tee log.txt", ["--bf16"]),
        (f"cat <<EOF > x\n{TORCHRUN} --fp16\nEOF\n{TORCHRUN} --bf16", ["--bf16"]),
        (f"D=$(date)\nif [ -z $X ]; then\n  Y=2\nfi\n{TORCHRUN} --bf16 > log-$D", ["--bf16"]),
        (f'CMD="{TORCHRUN} --bf16 --seed 2"\nsrun sh -c "$CMD"', ["--bf16", "--seed", "2"]),
        ("python -u ./pretrain_hybrid.py --bf16 # the end", ["--bf16"]),
        ("SCRIPT=pretrain_gpt.py\ntorchrun $SCRIPT --bf16", ["--bf16"]),
    ],
)
def test_scripts_are_read(tmp_path: Path, text: str, expected: list[str]) -> None:
    assert words(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"A=1\n{TORCHRUN} --seed $(date +%s)", " line 2: $(date +%s) is the output of a command"),
        (f"S=`date`\n{TORCHRUN} --seed $S", " line 1: `date` is the output of a command"),
        (f"S=$1\n{TORCHRUN} --save $S", " line 1: $1 is an argument of the script"),
        (f"if true; then\n  S=1\nfi\n{TORCHRUN} --seed $S", " line 2: S is set inside a condition, loop or function"),
        (f"for S in 1 2; do\n{TORCHRUN} --seed $S\ndone", " line 1: S is set inside a loop"),
        (f"{TORCHRUN} ${{A[@]}}", " line 1: ${A[@]} is an array that the script does not set"),
        (f"{TORCHRUN} --seed ${{A##*/}}", " line 1: ${A##*/} is an expansion that is not read"),
        (f"B=$((A*2))\n{TORCHRUN} --seed $B", " line 1: $((A*2)) is arithmetic"),
        (f"{TORCHRUN} --save 'x", " line 1: ' is never closed"),
        (f"{TORCHRUN} --bf16\n{TORCHRUN} --fp16", ": lines 1 and 2 start training"),
        ("echo hello", ": no training command"),
    ],
)
def test_what_has_to_run_to_be_read_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    assert problem(tmp_path, text).startswith(said)


def test_definitions_replace_what_cannot_be_read(tmp_path: Path) -> None:
    assert words(tmp_path, f"S=$(date)\n{TORCHRUN} --seed $S", S="3") == ["--seed", "3"]


def test_the_launcher_says_how_many_processes(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(f"{TORCHRUN} --bf16")
    assert read_script(script, {}).world_size == 8
    script.write_text("torchrun --nproc_per_node=$N pretrain_gpt.py --bf16")
    assert read_script(script, {}).world_size is None


def test_nothing_is_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    words(tmp_path, f"touch {witness}\nA=$(touch {witness})\n{TORCHRUN} --bf16")
    assert not witness.exists()


def test_a_missing_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.sh: cannot be read: No such file"):
        read_script(tmp_path / "none.sh", {})
