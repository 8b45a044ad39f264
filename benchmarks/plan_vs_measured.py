"""Compare the peak memory that ``lockstep plan`` gives with what a GPU's allocator counts in a short training run.

Needs one GPU (``--gpus 1``) or two (``--gpus 2``). Every setting trains three iterations through the flag door, in
processes of its own; ``torch.cuda.max_memory_allocated`` of the process that the plan names is compared with the plan.
Prints a table; writes ``plan_vs_measured.jsonl`` and the logs of the runs into a folder.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lockstep.errors import UserError
from lockstep.megatron_lm.parser import parse_flags
from lockstep.plan.gpus import GIB, gpu_type
from lockstep.plan.planner import Planner

_COMMON = (
    "--train-iters 3 --eval-iters 1 --eval-interval 100 --lr 1e-4 --log-interval 1 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 128256"
)
_LLAMA = (
    "--normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope --rotary-base 500000 "
    "--group-query-attention --num-query-groups 8 --num-attention-heads 32 --attention-dropout 0 --hidden-dropout 0"
)
_1B = (
    f"{_LLAMA} --num-layers 16 --hidden-size 2048 --ffn-hidden-size 8192 --seq-length 2048 "
    "--max-position-embeddings 2048 --bf16"
)
_8B = (
    f"{_LLAMA} --num-layers 4 --hidden-size 4096 --ffn-hidden-size 14336 --untie-embeddings-and-output-weights --bf16 "
    "--max-position-embeddings 8192"
)
_GPT = (
    "--num-layers 12 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --max-position-embeddings 1024 "
    "--micro-batch-size 8 --global-batch-size 16"
)
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

# Flags by name; the last of a repeated flag counts.
_ONE_GPU = {
    "Llama 1B": f"{_1B} --micro-batch-size 2 --global-batch-size 4",
    "Llama 1B, selective recomputation": f"{_1B} --micro-batch-size 4 --global-batch-size 8 "
    "--recompute-granularity selective",
    "Llama 1B, gradients in BF16": f"{_1B} --micro-batch-size 2 --global-batch-size 4 --grad-reduce-in-bf16",
    "Llama 8B, 4 layers": f"{_8B} --seq-length 4096 --micro-batch-size 1 --global-batch-size 2",
    "Llama 8B, 4 layers, full recomputation": f"{_8B} --seq-length 8192 --micro-batch-size 1 --global-batch-size 2 "
    f"{_FULL}",
    "GPT, vocabulary of 256000": f"{_GPT} --vocab-size 256000 --attention-dropout 0 --hidden-dropout 0 --bf16",
    "GPT, dropout": f"{_GPT} --vocab-size 50257 --bf16",
    "GPT, FP32": f"{_GPT} --vocab-size 50257 --attention-dropout 0 --hidden-dropout 0",
    "GPT, FP16, dropout": f"{_GPT} --vocab-size 50257 --fp16",
}
_TWO_GPUS = {
    "Llama 1B, TP2+SP": f"{_1B} --micro-batch-size 4 --global-batch-size 8 --tensor-model-parallel-size 2 "
    "--sequence-parallel",
    "Llama 1B, PP2": f"{_1B} --micro-batch-size 1 --global-batch-size 8 --pipeline-model-parallel-size 2",
    "Llama 1B, PP2 interleaved": f"{_1B} --micro-batch-size 1 --global-batch-size 8 --pipeline-model-parallel-size 2 "
    "--num-virtual-stages-per-pipeline-rank 2",
    "Llama 1B, DP2": f"{_1B} --micro-batch-size 2 --global-batch-size 8",
    "Llama 1B, sharded DP2": f"{_1B} --micro-batch-size 2 --global-batch-size 8 --use-distributed-optimizer",
    "GPT, dropout, TP2": f"{_GPT} --vocab-size 50257 --bf16 --tensor-model-parallel-size 2",
    "Llama 8B, 4 layers, full recomputation, TP2+SP": f"{_8B} --seq-length 8192 --micro-batch-size 1 "
    f"--global-batch-size 2 --tensor-model-parallel-size 2 --sequence-parallel {_FULL}",
}


def plan(words: list[str], gpus: int) -> dict[str, Any]:
    """Return rank, peak, memory between iterations and parts of a plan for H100s or H200s, which differ in size only.

    Raises:
        UserError: the setting cannot run.
    """
    memory = Planner(parse_flags(words), gpu_type("h100")).ask(gpus).memory
    return {
        "rank": memory.rank,
        "planned_bytes": memory.peak_bytes,
        "planned_resident_bytes": memory.resident_bytes,
        "moment": memory.moment,
        "parts": memory.parts,
    }


def measure(folder: Path, words: list[str], gpus: int) -> list[dict[str, Any]]:
    """Train in processes of their own; return what each found, by rank.

    Raises:
        RuntimeError: the run failed; names its log.
    """
    folder.mkdir(parents=True)
    command = [sys.executable]
    if gpus > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    command += [__file__, "--worker", str(folder), "--", *words, "--run-dir", str(folder / "run")]
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}; see {log}")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(gpus)]


def work(folder: Path, words: list[str]) -> int:
    """Train in this process, and write what its GPU held."""
    import torch

    from lockstep.cli import main
    from lockstep.training import loop

    resident: list[int] = []
    finish = loop.finish

    def watched(*args: Any) -> Any:
        report = finish(*args)
        resident.append(torch.cuda.memory_allocated())
        return report

    loop.finish = watched  # type: ignore[assignment]
    code = main(["pretrain-gpt", *words])
    found = {
        "measured_bytes": torch.cuda.max_memory_allocated(),
        "measured_resident_bytes": resident[-1] if resident else None,
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "used_bytes": torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0],
        "device": torch.cuda.get_device_name(),
        "device_bytes": torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory,
        "torch": torch.__version__,
    }
    (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    return code


def compare(name: str, number: int, words: list[str], gpus: int, out: Path) -> dict[str, Any]:
    """Return one setting's line: plan, measurement and error, or what went wrong."""
    line: dict[str, Any] = {"setting": name, "gpus": gpus}
    started = time.monotonic()
    try:
        line |= plan(words, gpus)
        line["plan_seconds"] = round(time.monotonic() - started, 2)
        ranks = measure(out / f"{gpus}gpu-{number:02d}", words, gpus)
    except (UserError, RuntimeError, FileExistsError) as error:
        return line | {"failed": str(error)}
    line |= ranks[line["rank"]]
    line["highest_bytes"] = max(found["measured_bytes"] for found in ranks)
    line["error_percent"] = round(100 * (line["planned_bytes"] / line["measured_bytes"] - 1), 2)
    return line | {"seconds": round(time.monotonic() - started, 1), "words": words}


def main() -> int:
    """Compare every setting; return 1 where one failed or is more than 10 percent off."""
    parser = argparse.ArgumentParser(description="Compare planned with measured peak memory.")
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=1, help="GPUs of each run (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new or empty folder for results and logs")
    parser.add_argument("--only", default="", metavar="TEXT", help="settings whose name has this in it")
    parser.add_argument("--plan-only", action="store_true", help="print the plans; needs no GPU")
    parser.add_argument("--worker", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        return work(options.worker, options.words)
    if options.out is None and not options.plan_only:
        parser.error("--out is needed")
    settings = _ONE_GPU if options.gpus == 1 else _TWO_GPUS
    failed = False
    print(f"{'setting':50} {'planned':>9} {'measured':>9} {'error':>8} {'reserved':>9}  GiB, peak in")
    for number, (name, flags) in enumerate(settings.items()):
        if options.only not in name:
            continue
        words = [*_COMMON.split(), *flags.split()]
        if options.plan_only:
            line = plan(words, options.gpus)
            print(f"{name:50} {line['planned_bytes'] / GIB:9.2f} {'':28}  {line['moment']}", flush=True)
            continue
        line = compare(name, number, words, options.gpus, options.out)
        with (options.out / "plan_vs_measured.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        failed |= abs(line.get("error_percent", 100.0)) > 10
        print(_row(line), flush=True)
    return int(failed)


def _row(line: dict[str, Any]) -> str:
    if "failed" in line:
        return f"{line['setting']:50} {line['failed']}"
    planned, measured, reserved = (line[f"{kind}_bytes"] / GIB for kind in ("planned", "measured", "reserved"))
    return (
        f"{line['setting']:50} {planned:9.2f} {measured:9.2f} {line['error_percent']:+7.2f}% {reserved:9.2f}  "
        f"{line['moment']}"
    )


if __name__ == "__main__":
    sys.exit(main())
