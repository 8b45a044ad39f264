"""Time training steps of named settings, beside what the GPU's matrix and attention rates allow.

    python benchmarks/gpu_speed.py --settings llama32_1b-mb1 llama32_1b-mb4 reference-pair --json speed.json
    python benchmarks/gpu_speed.py --gpus 2 --settings llama3_8b llama3_8b+fsdp llama3_8b+fp8 --profile profiles

Every setting runs in processes of its own, one for each GPU, on random tokens, through the trainer's own step: forward
and backward passes of all micro-batches, clipping, AdamW. As in a run, a step is launched before the results of the one
before are read; the time of a step is the mean over all that count. What follows a + is a change: see _CHANGES;
+16micro makes a step of 16 micro-batches for each GPU. The floor is the time of its matrix products (in BF16) and
attention at the rates that this GPU reaches on products of 8192 x 8192 matrices, and with the kernel and heads of the
setting. Tokens a second are those of one GPU.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lockstep.config import ConfigContainer, Origin, resolve
from lockstep.models.flops import flops_per_sequence
from lockstep.models.kernels import Kernel, fused_attention
from lockstep.models.layers import required
from lockstep.models.mask import CausalMask
from lockstep.parallel import Mesh
from lockstep.parallel.mesh import start_processes
from lockstep.recipes.deepseek import deepseek_v2_lite_pretrain_config
from lockstep.recipes.llama import llama3_8b_pretrain_config, llama32_1b_pretrain_config
from lockstep.training.attention import choose_attention
from lockstep.training.compiling import choose_compilation, compile_blocks
from lockstep.training.device import choose_device, switches
from lockstep.training.feed import Batch
from lockstep.training.graphs import choose_graphs
from lockstep.training.kernel_times import profiled
from lockstep.training.optimizer import Optimizer
from lockstep.training.precision import params_dtype
from lockstep.training.setup import build_parallel_model, build_passes, graphed
from lockstep.training.step import Launched, TrainStep

# Steps before those that count.
WARM_UP = 3
# micro-batch size, global batch size, changes to the base
_BATCHES = {"mb1": (1, 8), "mb2": (2, 8), "mb4": (4, 8)}
_NO_RECOMPUTATION = {
    "model.recompute_granularity": None,
    "model.recompute_method": None,
    "model.recompute_num_layers": None,
    "scheduler.lr_warmup_iters": 0,
}
_PAIR = {
    "model.num_layers": 2,
    "model.hidden_size": 256,
    "model.num_attention_heads": 4,
    "model.seq_length": 512,
    "model.hidden_dropout": 0.1,
    "model.attention_dropout": 0.1,
    "model.vocab_size": 32128,
    "mixed_precision.bf16": True,
    "optimizer.lr": 1e-4,
}
_TINY = {**_PAIR, "model.hidden_size": 32, "model.seq_length": 32, "model.vocab_size": 128}
_CHANGES: dict[str, dict[str, Any]] = {
    "fsdp": {
        "dist.use_torch_fsdp2": True,
        "ddp.use_distributed_optimizer": False,
        "ddp.overlap_grad_reduce": False,
        "ddp.overlap_param_gather": False,
    },
    "kept": {"ddp.torch_fsdp2_reshard_after_forward": False},
    "lowgrads": {"ddp.grad_reduce_in_fp32": False},
    "once": {"run.gradient_sync": "step"},
    "rowwise": {"mixed_precision.fp8": "e4m3", "mixed_precision.fp8_recipe": "rowwise"},
    "fp8": {"mixed_precision.fp8": "hybrid", "mixed_precision.fp8_recipe": "tensorwise"},
    "fp8gather": {"mixed_precision.fp8_param_gather": True},
    "tp2": {"model.tensor_model_parallel_size": 2, "model.sequence_parallel": True},
    "cp2": {"model.context_parallel_size": 2},
    "8layers": {"model.num_layers": 8},
    "ep2": {"model.expert_model_parallel_size": 2},
    "6layers": {"model.num_layers": 6, "model.moe_layer_freq": "[0]+[1]*5"},
    "alltoall": {"model.moe_token_dispatcher_type": "alltoall"},
    "allgather": {"model.moe_token_dispatcher_type": "allgather"},
    "kept-activations": _NO_RECOMPUTATION,
}


@dataclass(frozen=True)
class Timing:
    """What was found for a setting; tokens and operations are those of one GPU, ``kernels_ms`` those of a profile.

    ``reserved_gib`` is what is held at the end, with the memory of CUDA graphs, which the peak counts at capture only.
    """

    setting: str
    device: str
    torch: str
    attention: str
    compilation: str
    cuda_graphs: str
    first_step_s: float
    step_s: float
    spread_s: float
    tokens_per_s: float
    peak_gib: float
    operations: float
    floor_s: float | None
    losses: list[float]
    gpus: int = 1
    kernels_ms: dict[str, float] | None = None
    floors_ms: dict[str, float] | None = None
    reserved_gib: float = 0.0


def configured(setting: str, compilation: str, changes: list[str], gpus: int = 1) -> ConfigContainer:
    """Return the resolved configuration of a setting."""
    name, *named = setting.split("+")
    base, _, batch = name.partition("-mb")
    values: dict[str, Any]
    if base in ("llama32_1b", "llama32_1b_32k"):
        config = llama32_1b_pretrain_config()
        micro, whole = _BATCHES[f"mb{batch or 1}"]
        values = {"model.vocab_size": 128_256, **_NO_RECOMPUTATION}
        if base.endswith("32k"):
            micro, whole, values["model.seq_length"] = 1, 2, 32768
    elif base == "llama3_8b":
        config = llama3_8b_pretrain_config()
        micro, whole = int(batch or 1), int(batch or 1) * gpus
        values = {"model.context_parallel_size": 1, **_NO_RECOMPUTATION}
    elif base == "deepseek_v2_lite":
        config = deepseek_v2_lite_pretrain_config()
        micro = int(batch or 1)
        whole = 4 * micro * gpus
        values = {
            "model.expert_model_parallel_size": 1,
            "ddp.use_distributed_optimizer": True,
            "ddp.grad_reduce_in_fp32": False,
            "scheduler.lr_warmup_iters": 0,
        }
    else:
        config = ConfigContainer()
        micro, whole = 4, 32
        values = dict({"reference-pair": _PAIR, "reference-pair-plain": _plain(_PAIR), "tiny": _TINY}[name])
    values |= {"train.micro_batch_size": micro, "train.global_batch_size": whole, "train.train_iters": 100}
    values["run.compile"] = compilation
    values |= _named(named, micro, gpus)
    for path, value in [*values.items(), *(_changed(change) for change in changes)]:
        config.set(path, value, Origin("python"))
    return resolve(config, world_size=gpus)


def _named(changes: list[str], micro_batch: int, gpus: int) -> dict[str, Any]:
    """Return what named changes set; +16micro is 16 micro-batches for each data-parallel process."""
    values: dict[str, Any] = {}
    count = 0
    for change in changes:
        if re.fullmatch(r"\d+micro", change):
            count = int(change.removesuffix("micro"))
        else:
            values |= _CHANGES[change]
    if count:
        sharing = values.get("model.tensor_model_parallel_size", 1) * values.get("model.context_parallel_size", 1)
        values["train.global_batch_size"] = count * micro_batch * gpus // sharing
    return values


def _changed(change: str) -> tuple[str, Any]:
    """Return path and value of KEY=VALUE: a number, true, false or null, else text."""
    path, _, text = change.partition("=")
    try:
        return path, json.loads(text)
    except ValueError:
        return path, text


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"model.hidden_dropout": 0.0, "model.attention_dropout": 0.0}


def measure(setting: str, config: ConfigContainer, steps: int, profile: Path | None) -> Timing:
    """Take steps and time them from result to result; those of the warm-up, where layers are compiled, do not count."""
    device = choose_device("auto")
    with switches(config, device), start_processes(config, device) as mesh:
        model, spans, _ = build_parallel_model(config, mesh, device, params_dtype(config), fingerprint=False)
        samples, length = required(config.train.global_batch_size), required(config.model.seq_length)
        operations = flops_per_sequence(config.model) * samples / mesh.world.size
        compilation = choose_compilation(config, device, operations * required(config.train.train_iters))
        if compilation.on:
            compile_blocks(model)
        micro = required(config.train.micro_batch_size)
        graphs = choose_graphs(config, device, mesh, flops_per_sequence(config.model) * micro)
        optimizer = Optimizer(model, config, mesh)
        passes = graphed(build_passes(config, model, spans, mesh, device), optimizer, graphs, mesh)
        step = TrainStep(passes, optimizer, dp=mesh.dp)

        def launch(number: int) -> Launched:
            return step.launch(batches[number].to(device), micro, 1e-4, 0.01)

        # Graphs are captured in the warm-up, for steps of the size that counts.
        batches = [_batch(config, number, mesh, graphs.on) for number in range(WARM_UP + steps)]
        if device.type == "cuda":
            batches = [batch.pinned() for batch in batches]
        losses, seconds = [], []
        queued: Launched | None = None
        _wait(device)
        started = time.perf_counter()
        for number in range(WARM_UP + steps):
            running = queued or launch(number)
            late = WARM_UP <= number < WARM_UP + steps - 1
            queued = launch(number + 1) if late else None
            # A step ends when its loss is known; weights may still be on their way to the next one.
            losses.append(running.result().lm_loss)
            ended = time.perf_counter()
            seconds.append(ended - started)
            started = ended
            _say(mesh, f"{setting}: step {number} {seconds[-1]:.3f} s, loss {losses[-1]:.5f}")
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        reserved = torch.cuda.memory_reserved() / 2**30 if device.type == "cuda" else 0.0
        kernels = profiled(lambda: launch(number).result(), profile, mesh.leads) if profile is not None else None
        floors = None
        if device.type == "cuda":
            weights = sum(weight.numel() for weight in model.parameters())
            floors = _floors(config, device, mesh, operations, weights)
    timed = seconds[WARM_UP:]
    mean = statistics.fmean(timed)
    return Timing(
        setting,
        torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        torch.__version__,
        str(choose_attention(config, device)),
        str(compilation),
        str(graphs),
        round(seconds[0], 3),
        round(mean, 5),
        round(max(timed) - min(timed), 5),
        round(samples * length / mean / mesh.world.size, 1),
        round(peak, 2),
        operations,
        None if floors is None else round((floors["matrix products"] + floors["attention"]) / 1e3, 5),
        losses,
        mesh.world.size,
        kernels,
        floors,
        round(reserved, 2),
    )


def _say(mesh: Mesh, text: str) -> None:
    if mesh.leads:
        print(text, file=sys.stderr, flush=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _batch(config: ConfigContainer, number: int, mesh: Mesh, whole: bool = False) -> Batch:
    """Return this process's micro-batches of random tokens in a step, on the host.

    Those of a step of the warm-up are the first two, unless ``whole``.
    """
    samples, length = required(config.train.global_batch_size), required(config.model.seq_length)
    generator = torch.Generator().manual_seed(number)
    text = torch.randint(0, required(config.model.vocab_size), (samples, length + 1), generator=generator)
    text = text.unflatten(0, (-1, mesh.dp.size, required(config.train.micro_batch_size)))[:, mesh.dp.rank].flatten(0, 1)
    text = text if whole or number >= WARM_UP else text[: 2 * required(config.train.micro_batch_size)]
    positions = torch.arange(length).repeat(len(text), 1)
    return Batch(text[:, :-1], text[:, 1:], torch.ones(positions.shape), positions)


def _floors(
    config: ConfigContainer, device: torch.device, mesh: Mesh, operations: float, weights: int
) -> dict[str, float] | None:
    """Return the milliseconds that each kind of work needs at this GPU's rates; None without a fused kernel."""
    kernel = choose_attention(config, device).kernel
    if kernel == "explicit" or config.model.multi_latent_attention:
        return None
    model, dtype = config.model, params_dtype(config)
    samples = required(config.train.global_batch_size) / mesh.world.size
    matrix = torch.randn(8192, 8192, device=device, dtype=dtype)
    product_s = _seconds(lambda: matrix @ matrix)
    attention_s = _attention_seconds(config, kernel, device) * required(model.num_layers) * samples
    # Causal scores count half: two products forward, four backward.
    width = required(model.num_attention_heads) * required(model.kv_channels)
    scores = 6 * required(model.num_layers) * width * required(model.seq_length) ** 2 * samples
    found = {"matrix products": (operations - scores) / (2 * 8192**3 / product_s), "attention": attention_s}
    if mesh.dp.size == mesh.world.size > 1 and not config.dist.use_torch_fsdp2:
        # Gradients are reduced and scattered, and weights gathered; a sum of all does both: as many bytes as gathers.
        size = 2 + (4 if config.ddp.grad_reduce_in_fp32 else 2)
        found["communication"] = weights * size / _gathered_bytes_a_second(device, mesh)
    return {kind: round(seconds * 1e3, 2) for kind, seconds in found.items()}


def _gathered_bytes_a_second(device: torch.device, mesh: Mesh) -> float:
    """Return how many bytes of all processes together a gather brings to each in a second."""
    part = torch.zeros(2**27, device=device, dtype=torch.uint8)
    whole = torch.empty(2**27 * mesh.dp.size, device=device, dtype=torch.uint8)

    def gather() -> None:
        work = mesh.dp.begin_stacked(part, whole)
        if work is not None:
            work.wait()

    return whole.numel() / _seconds(gather)


def _attention_seconds(config: ConfigContainer, kernel: Kernel, device: torch.device) -> float:
    model, dtype = config.model, params_dtype(config)
    length, width = required(model.seq_length), required(model.kv_channels)
    counts = (required(model.num_attention_heads), required(model.num_query_groups), required(model.num_query_groups))
    query, key, value = (torch.randn(1, length, n, width, device=device, dtype=dtype) for n in counts)
    tensors = [x.requires_grad_() for x in (query, key, value)]
    mask = CausalMask(length, device)

    def both() -> None:
        result = fused_attention(kernel, query, key, value, mask, None)
        torch.autograd.grad(result, tensors, result)

    return _seconds(both)


def _seconds(job: Callable[[], object]) -> float:
    for _ in range(3):
        job()
    found = []
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        job()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found)


def line(found: Timing) -> str:
    """Return a row of the table."""
    share = "" if found.floor_s is None else f"{found.floor_s / found.step_s:.0%}"
    return (
        f"| {found.setting} | {found.attention.partition(' (')[0]} | {found.compilation.partition(' (')[0]} | "
        f"{found.step_s * 1e3:.1f} | {found.tokens_per_s:,.0f} | {found.peak_gib:.1f} | {share} |"
    )


def main() -> int:
    """Time the settings and print a table; exit code 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", default=["llama32_1b-mb1", "llama32_1b-mb4", "reference-pair"])
    parser.add_argument("--compile", nargs="+", choices=("auto", "none", "blocks"), default=["auto"])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to all settings")
    parser.add_argument("--gpus", type=int, default=1, help="processes for each setting, each with a GPU")
    parser.add_argument(
        "--verbose", action="store_true", help="also print every step, losses, and kernels of a profile"
    )
    parser.add_argument("--steps", type=int, default=8, help="steps that count, after those of the warm-up")
    parser.add_argument("--json", type=Path, help="also write what was found")
    parser.add_argument("--profile", type=Path, help="also write a profile of one step, into this folder")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each setting")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        setting, compilation = options.settings[0], options.compile[0]
        profile = options.profile and options.profile / f"{setting}-{compilation}.txt"
        config = configured(setting, compilation, options.set, options.gpus)
        found = measure(setting, config, options.steps, profile)
        if int(os.environ.get("RANK") or 0) == 0:
            print(json.dumps(asdict(found)), flush=True)
        return 0
    print("| setting | attention | compiled | ms a step | tokens/s | peak GiB | floor / step |")
    print("|---|---|---|---|---|---|---|")
    results, failed = [], False
    for setting in options.settings:
        for compilation in options.compile:
            result = _alone(options, setting, compilation)
            failed |= result is None
            results += [] if result is None else [result]
            print(line(result) if result else f"| {setting} | {compilation} | failed |", flush=True)
            if result and options.verbose:
                print(f"first step {result.first_step_s} s, {result.reserved_gib} GiB held, {result.cuda_graphs}")
                print(f"losses {result.losses}, kernels {result.kernels_ms}")
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    if results:
        print(f"{results[0].device}, torch {results[0].torch}, {time.strftime('%Y-%m-%d')}")
    return int(failed)


def _alone(options: argparse.Namespace, setting: str, compilation: str) -> Timing | None:
    """Time a setting in a process of its own, so that memory and compiled code are its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.gpus}"]
    command = [sys.executable, *(launcher if options.gpus > 1 else []), __file__, "--alone", "--settings", setting]
    command += ["--compile", compilation, "--gpus", str(options.gpus), "--steps", str(options.steps)]
    command += ["--set", *options.set]
    if options.profile:
        options.profile.mkdir(parents=True, exist_ok=True)
        command += ["--profile", str(options.profile)]
    try:
        return Timing(**json.loads(_output(command, options.timeout, options.verbose).splitlines()[-1]))
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        print(f"{setting}, {compilation}: {error}\n{getattr(error, 'stderr', '') or ''}"[-3000:], file=sys.stderr)
        return None


def _output(command: list[str], timeout: float, verbose: bool) -> str:
    """Run a command, and whatever it starts, for so many seconds at most; return its output."""
    errors = None if verbose else subprocess.PIPE
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True) as process:
        try:
            output, error = process.communicate(timeout=timeout)
        except BaseException:
            end(process.pid)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command[:6], output, error)
    return output


def end(process: int) -> None:
    """Kill a process and all that descend from it: a launcher's workers have groups of their own."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # It ended meanwhile.
            number, _, rest = stat.read_text().partition(" (")
            parents[int(number)] = int(rest.rpartition(") ")[2].split()[1])
    family = {process}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    for member in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
