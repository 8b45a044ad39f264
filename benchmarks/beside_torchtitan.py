"""Time training steps of Lockstep and of torchtitan in one run, on the same GPUs, and print ratios.

    python benchmarks/beside_torchtitan.py --torchtitan FOLDER --settings llama32_1b-mb4
    python benchmarks/beside_torchtitan.py --torchtitan FOLDER --gpus 2 --settings llama3_8b llama3_8b+fp8

FOLDER holds torchtitan 0.2.2 unpacked, and torchao for float8. Ours is benchmarks/gpu_speed.py with compiled layers.
The peer is driven through its own model, converters, parallelisation, loss and optimizer: compiled layers and loss,
fused AdamW, no recomputation, autocast on one GPU, fully_shard and float8 all-gather on several. Packages that it
imports and a step on random tokens does not need are stood in for where they are missing. Both take steps of as many
tokens and print tokens a second of one GPU. A peer that is not there, or fails, is skipped with the reason.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful

_NOT_NEEDED = ("datasets", "torchdata", "tyro", "tokenizers", "wandb", "fsspec", "PIL", "einops")
# Shape, micro-batch size of a GPU, micro-batches of a step: as in gpu_speed.py.
_SETTINGS: dict[str, tuple[dict[str, Any], int, int]] = {
    "llama32_1b-mb4": ({"dim": 2048, "n_layers": 16, "ffn_dim_multiplier": 1.5, "multiple_of": 1024}, 4, 2),
    "llama32_1b-mb1": ({"dim": 2048, "n_layers": 16, "ffn_dim_multiplier": 1.5, "multiple_of": 1024}, 1, 8),
    "llama3_8b": ({"dim": 4096, "n_layers": 32, "ffn_dim_multiplier": 1.3, "multiple_of": 1024}, 1, 1),
    "tiny": ({"dim": 64, "n_layers": 2, "vocab_size": 256, "n_heads": 4, "n_kv_heads": 2}, 2, 2),
}
_SHARED = {"n_heads": 32, "n_kv_heads": 8, "vocab_size": 128_256, "rope_theta": 500_000.0}


@dataclass(frozen=True)
class Step:
    """What was found for the peer: seconds of a step, tokens a second of one GPU, peak memory of one GPU."""

    step_s: float
    tokens_per_s: float
    peak_gib: float
    losses: list[float]


class _Anything(type(Stateful)):  # type: ignore[misc]
    """The class of classes that have every name."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Anything(name, (), {"__init__": lambda self, *_args, **_named: None, "__call__": lambda self, it: it})

    def __getitem__(cls, _: object) -> Any:
        return cls


class _StandIns:
    """Imports a package that is missing as a module whose every name is an empty class."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in _NOT_NEEDED:
            return None
        return importlib.util.spec_from_loader(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = lambda name: getattr(_Anything("Anything", (), {}), name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Leave it empty."""


def measure_peer(setting: str, seq_length: int, steps: int) -> Step:
    """Train some steps with torchtitan's own parts, and return the middle one's time."""
    sys.meta_path.append(_StandIns())
    if importlib.util.find_spec("tensorboard") is None:
        sys.modules["torch.utils.tensorboard"] = _StandIns().create_module(SimpleNamespace(name="tensorboard"))
    from torchtitan.components.loss import build_cross_entropy_loss
    from torchtitan.components.optimizer import build_optimizers
    from torchtitan.config import JobConfig
    from torchtitan.distributed import ParallelDims, utils
    from torchtitan.models.llama3 import Transformer, TransformerModelArgs, parallelize_llama
    from torchtitan.protocols.model_converter import build_model_converters

    name, _, change = setting.partition("+")
    shape, micro_batch, count = _SETTINGS[name]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if kind == "cuda" else "cpu")
    job = JobConfig()
    job.training.seq_len, job.training.local_batch_size = seq_length, micro_batch
    job.compile.enable = True
    job.activation_checkpoint.mode = "none"
    job.optimizer.lr, job.optimizer.implementation = 1e-4, "fused" if kind == "cuda" else "for-loop"
    if change == "fp8":
        import torchtitan.components.quantization.float8  # noqa: F401

        job.model.converters = ["quantize.linear.float8"]
        job.quantize.linear.float8.filter_fqns = ["output"]
        job.quantize.linear.float8.enable_fsdp_float8_all_gather = world > 1
        job.quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp = world > 1
    if kind == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    dims = ParallelDims(dp_replicate=1, dp_shard=world, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=world)
    dims.build_mesh()
    torch.manual_seed(1)
    arguments = TransformerModelArgs(**{**_SHARED, **shape})
    arguments.max_seq_len = seq_length
    with torch.device("meta"):
        model = Transformer(arguments)
    converters = build_model_converters(job, dims)
    converters.convert(model)
    model = parallelize_llama(model, dims, job)
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    model.train()
    optimizers = build_optimizers([model], job.optimizer, dims)
    optimizers.register_step_post_hook(lambda *_args, **_named: converters.post_optimizer_hook([model]))
    loss_of = build_cross_entropy_loss(job)
    autocast = utils.maybe_enable_amp(dims, job.training.mixed_precision_param, kind)
    tokens = micro_batch * seq_length * count

    def step() -> torch.Tensor:
        optimizers.zero_grad()
        total = torch.zeros((), device=device)
        for _ in range(count):
            ids = torch.randint(0, arguments.vocab_size, (micro_batch, seq_length + 1), device=device)
            with autocast:
                loss = loss_of(model(ids[:, :-1].contiguous()), ids[:, 1:].contiguous()) / (tokens * world)
            loss.backward()
            total += loss.detach()
        utils.clip_grad_norm_(list(model.parameters()), 1.0, foreach=True)
        optimizers.step()
        return total * world

    losses, seconds = [], []
    for number in range(steps + 2):
        begun = time.perf_counter()
        losses.append(step().item())
        if number >= 2:
            seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() / 2**30 if kind == "cuda" else 0.0
    torch.distributed.destroy_process_group()
    middle = statistics.median(seconds)
    return Step(middle, tokens / middle, peak, losses)


def main() -> int:
    """Run ours and the peer for every setting; return 1 if one of ours failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torchtitan", type=Path, required=True, help="folder that holds the package torchtitan")
    parser.add_argument("--settings", nargs="+", default=["llama32_1b-mb4"])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--timeout", type=float, default=200, help="seconds for each side")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        found = measure_peer(options.settings[0], options.seq_length, options.steps)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(asdict(found)))
        return 0
    print("| setting | GPUs | ours, tokens/s/GPU | torchtitan | ratio | peak GiB, ours | torchtitan |")
    print("|---|---|---|---|---|---|---|")
    failed = False
    for setting in options.settings:
        ours, theirs = _ours(options, setting), _theirs(options, setting)
        failed |= isinstance(ours, str)
        print(_line(setting, options.gpus, ours, theirs), flush=True)
    return int(failed)


def _line(setting: str, gpus: int, ours: dict[str, Any] | str, theirs: dict[str, Any] | str) -> str:
    if isinstance(ours, str) or isinstance(theirs, str):
        told = [each if isinstance(each, str) else f"{each['tokens_per_s']:,.0f} tokens/s" for each in (ours, theirs)]
        return f"| {setting} | {gpus} | {told[0]} | {told[1]} | | | |"
    ratio = ours["tokens_per_s"] / theirs["tokens_per_s"]
    rates = f"{ours['tokens_per_s']:,.0f} | {theirs['tokens_per_s']:,.0f} | {ratio:.3f}"
    return f"| {setting} | {gpus} | {rates} | {ours['peak_gib']:.1f} | {theirs['peak_gib']:.1f} |"


def _ours(options: argparse.Namespace, setting: str) -> dict[str, Any] | str:
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "ours.json"
        command = [sys.executable, str(Path(__file__).with_name("gpu_speed.py")), "--settings", setting]
        command += ["--compile", "blocks", "--gpus", str(options.gpus), "--steps", str(options.steps)]
        done = _run([*command, "--json", str(found), "--timeout", str(options.timeout)], options.timeout + 30)
        if isinstance(done, str):
            return done
        result: dict[str, Any] = json.loads(found.read_text())[0]
        return result


def _theirs(options: argparse.Namespace, setting: str) -> dict[str, Any] | str:
    if not (options.torchtitan / "torchtitan").is_dir():
        return f"skipped: no package torchtitan in {options.torchtitan}"
    if setting.partition("+")[0] not in _SETTINGS:
        return "skipped: no such setting of the peer"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.gpus}"]
    command += [__file__, "--alone", "--torchtitan", str(options.torchtitan), "--settings", setting]
    command += ["--steps", str(options.steps), "--seq-length", str(options.seq_length)]
    done = _run(command, options.timeout, str(options.torchtitan.resolve()))
    if isinstance(done, str):
        return done
    result: dict[str, Any] = json.loads(next(line for line in done if line.startswith('{"step_s"')))
    print(f"torchtitan, {setting}: losses {result['losses']}", file=sys.stderr)
    return result


def _run(command: list[str], timeout: float, search: str = "") -> list[str] | str:
    """Run a command; return its output's lines, or why there is none."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), search]))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=True, env={**os.environ, "PYTHONPATH": path}
        )
    except subprocess.SubprocessError as error:
        print(f"{command}\n{getattr(error, 'stderr', '') or ''}"[-4000:], file=sys.stderr)
        return f"failed: {type(error).__name__}"
    return done.stdout.splitlines()


if __name__ == "__main__":
    sys.exit(main())
