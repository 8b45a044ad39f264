"""Run a set of short jobs in Megatron-LM and in Lockstep on one GPU and print how far their curves are apart.

Needs a GPU and a checkout of Megatron-LM that runs there without Transformer Engine (``--megatron-lm PATH``; its data
helpers are compiled with pybind11). Megatron-LM gets the flags that it needs for that, Lockstep the same flags. The
console logs of both are parsed by the lab and compared at their printed digits. Jobs on real text take part where
``--data-path PREFIX --tokenizer DIR`` names a prepared corpus.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lockstep.lab.logs import Log, parse_log

ROOT = Path(__file__).resolve().parents[1]
ENGINE = (
    "--transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm --no-masked-softmax-fusion "
    "--use-mcore-models"
).split()
COMMON = (
    "--num-layers 2 --hidden-size 256 --num-attention-heads 4 --seq-length 512 --max-position-embeddings 512 "
    "--micro-batch-size 4 --global-batch-size 32 --eval-iters 2 --eval-interval 5 --log-interval 1 "
    "--lr 3e-4 --min-lr 3e-5"
).split()
MOCK = "--mock-data --tokenizer-type NullTokenizer --vocab-size 32000".split()
NO_DROPOUT = "--attention-dropout 0 --hidden-dropout 0".split()
TEN = "--train-iters 10"

CASES: dict[str, str] = {
    "gpt": f"--bf16 {TEN}",
    "seed 77": f"--bf16 {TEN} --seed 77",
    "llama-like": f"--bf16 {TEN} --normalization RMSNorm --swiglu --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --disable-bias-linear --group-query-attention --num-query-groups 2",
    "fp32": TEN,
    "fp16, 13 skipped steps": "--fp16 --train-iters 14",
    "cosine, warm-up, clipping": "--bf16 --train-iters 12 --lr-decay-style cosine --lr-warmup-iters 3 "
    "--lr-decay-iters 10 --adam-beta2 0.95 --clip-grad 0.3 --weight-decay 0.1",
    "WSD, squared ReLU, no biases": "--bf16 --train-iters 12 --lr-decay-style WSD --lr-wsd-decay-iters 5 "
    "--lr-wsd-decay-style linear --squared-relu --disable-bias-linear --no-bias-gelu-fusion",
    "QK norm, half rotary, head size 32": f"--bf16 {TEN} --qk-layernorm --position-embedding-type rope "
    "--rotary-percent 0.5 --rotary-base 500000 --normalization RMSNorm --swiglu --disable-bias-linear --kv-channels 32",
    "rope scaling": f"--bf16 {TEN} --position-embedding-type rope --use-rope-scaling --swiglu --ffn-hidden-size 512",
    "interleaved rotary, FP32 softmax": f"--bf16 {TEN} --position-embedding-type rope --rotary-interleaved "
    "--rotary-seq-len-interpolation-factor 2 --add-qkv-bias --disable-bias-linear --attention-softmax-in-fp32",
    "per-token loss, EOD masks": f"--bf16 {TEN} --calculate-per-token-loss --eod-mask-loss --reset-position-ids "
    "--reset-attention-mask",
    "SGD, rising weight decay": f"--bf16 {TEN} --optimizer sgd --sgd-momentum 0.8 --lr 0.1 --min-lr 0.01 "
    "--weight-decay-incr-style linear --start-weight-decay 0.0 --end-weight-decay 0.1",
    "counted in samples, inverse square root": "--bf16 --train-samples 320 --lr-decay-style inverse-square-root "
    "--lr-warmup-samples 64 --eval-micro-batch-size 8 --eval-global-batch-size 16",
}

_EXPERTS = (
    "--normalization RMSNorm --swiglu --position-embedding-type rope --disable-bias-linear --num-experts 8 "
    "--moe-router-topk 2"
)
CASES |= {
    "experts": f"--bf16 {TEN} {_EXPERTS} --moe-aux-loss-coeff 0.01",
    "experts, fp32": f"{TEN} {_EXPERTS} --moe-aux-loss-coeff 0.01",
    "experts, fp16": f"--fp16 --initial-loss-scale 65536 {TEN} {_EXPERTS} --moe-aux-loss-coeff 0.01",
    "experts, per-token loss, z-loss": f"--bf16 {TEN} {_EXPERTS} --moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001 "
    "--calculate-per-token-loss --moe-router-dtype fp32",
    "shared experts, first layer dense": f"--bf16 {TEN} {_EXPERTS} --moe-layer-freq [0]+[1] --moe-ffn-hidden-size 192 "
    "--moe-shared-expert-intermediate-size 384 --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.01 "
    "--moe-router-pre-softmax --moe-router-topk-scaling-factor 1.5 --moe-router-dtype fp32",
    "sigmoid, groups, expert bias": f"--bf16 {TEN} {_EXPERTS} --moe-router-score-function sigmoid "
    "--moe-router-enable-expert-bias --moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-dtype fp32",
}


@dataclass(frozen=True)
class Apart:
    """Largest differences of two logs: losses, gradient norms (relative), learning rates, evaluation losses."""

    iterations: int
    first_loss: float
    loss: float
    norm: float
    lr: float
    evaluation: float


def apart(theirs: Log, ours: Log) -> Apart:
    """Compare two logs of one job.

    Raises:
        ValueError: they do not print the same iterations and evaluations.
    """
    if theirs.lines.keys() != ours.lines.keys() or theirs.evaluations.keys() != ours.evaluations.keys():
        raise ValueError(f"{theirs.path} and {ours.path} print other iterations or evaluations")
    pairs = [(line, ours.lines[i]) for i, line in sorted(theirs.lines.items())]
    losses = [abs(a.lm_loss - b.lm_loss) for a, b in pairs if a.lm_loss is not None and b.lm_loss is not None]
    norms = [abs(a.grad_norm - b.grad_norm) / a.grad_norm for a, b in pairs if a.grad_norm and b.grad_norm]
    rates = [abs((a.next_lr or 0.0) - (b.next_lr or 0.0)) for a, b in pairs]
    evaluations = [abs(e.lm_loss - ours.evaluations[key].lm_loss) for key, e in theirs.evaluations.items()]
    return Apart(len(pairs), losses[0], max(losses), max(norms), max(rates), max(evaluations))


def run(script: Path, words: list[str], log: Path, port: int, search: str) -> Log:
    """Run one job through torch.distributed.run and parse what it prints.

    Raises:
        RuntimeError: the job failed; names its log.
    """
    environment = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [search, environment.get("PYTHONPATH", "")]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", f"--master_port={port}"]
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [*launcher, str(script), *words], stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{script.name} failed with exit code {done.returncode}; see {log}")
    return parse_log(log)


def compare_case(number: int, words: list[str], megatron: Path, out: Path) -> Apart | str:
    """Run one job on both sides; return how far they are apart, or why that cannot be said."""
    folder = out / f"{number:02d}"
    folder.mkdir(parents=True)
    rope = ["--no-rope-fusion"] if "rope" in words else []
    cache = ["--data-cache-path", str(folder / "cache")]
    port = 29_600 + 2 * number
    try:
        theirs = run(
            megatron / "pretrain_gpt.py", [*words, *ENGINE, *rope, *cache], folder / "megatron.log", port, str(megatron)
        )
        ours = run(
            ROOT / "3rdparty/Megatron-LM/pretrain_gpt.py",
            [*words, *ENGINE, *rope, *cache, "--run-dir", str(folder / "run")],
            folder / "lockstep.log",
            port + 1,
            "",
        )
        return apart(theirs, ours)
    except (RuntimeError, ValueError) as error:
        return str(error)


def cases(data_path: str | None, tokenizer: str | None) -> dict[str, list[str]]:
    """Return the flags of every job by name; those on real text only where a corpus is named."""
    jobs = {name: [*COMMON, *MOCK, *NO_DROPOUT, *flags.split()] for name, flags in CASES.items()}
    jobs["dropout 0.1"] = [*COMMON, *MOCK, "--bf16", *TEN.split()]
    if data_path and tokenizer:
        text = [*COMMON, *NO_DROPOUT, "--bf16", *TEN.split(), "--tokenizer-type", "HuggingFaceTokenizer"]
        text += ["--tokenizer-model", tokenizer, "--seq-length", "256"]
        jobs["text"] = [*text, "--data-path", data_path, "--split", "969,30,1"]
        jobs["text, blend, EOD mask"] = [*text, "--data-path", "0.7", data_path, "0.3", data_path]
        jobs["text, blend, EOD mask"] += ["--split", "90,8,2", "--eod-mask-loss"]
    return jobs


def main() -> int:
    """Run the jobs, several at a time, and print the table; return 1 where a job could not be compared."""
    parser = argparse.ArgumentParser(description="Compare Lockstep's curves with Megatron-LM's on one GPU.")
    parser.add_argument("--megatron-lm", type=Path, required=True, metavar="PATH", help="checkout of Megatron-LM")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for logs and runs")
    parser.add_argument("--data-path", metavar="PREFIX", help="prepared corpus for the jobs on real text")
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer of that corpus")
    parser.add_argument("--parallel", type=int, default=6, metavar="N", help="jobs at a time on the GPU")
    options = parser.parse_args()
    jobs = cases(options.data_path, options.tokenizer)
    with ThreadPoolExecutor(options.parallel) as pool:
        running = [
            pool.submit(compare_case, number, words, options.megatron_lm.resolve(), options.out.resolve())
            for number, words in enumerate(jobs.values())
        ]
        results = [job.result() for job in running]
    print("| job | iterations | first loss | losses | grad norms | learning rates | evaluations |")
    print("|---|---|---|---|---|---|---|")
    for name, found in zip(jobs, results, strict=True):
        if isinstance(found, str):
            print(f"| {name} | {found} | | | | | |")
        else:
            print(
                f"| {name} | {found.iterations} | {found.first_loss:.1e} | {found.loss:.1e} | {found.norm:.2%} | "
                f"{found.lr:.0e} | {found.evaluation:.1e} |"
            )
    return int(any(isinstance(found, str) for found in results))


if __name__ == "__main__":
    sys.exit(main())
