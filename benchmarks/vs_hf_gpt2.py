"""Time our training steps against a Hugging Face GPT-2 of the same shape and batch, in one run.

Ours trains as the doors do, in BF16 unless told otherwise; Hugging Face's trains in FP32 with AdamW, gradient
accumulation and clipping. Both see the same token ids and take optimizer steps in turns, so that a busy machine slows
both. Prints the seconds of a step of each, fastest and median, and the ratio ours / theirs; the CPU seconds beside them
say how much work a step was where other programs took turns.
"""

# Shapes: b micro-batch, s sequence.

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.config import ConfigContainer, resolve
from lockstep.megatron_lm.parser import parse_flags
from lockstep.models import DropoutStreams, build_model
from lockstep.training.device import choose_device, switches
from lockstep.training.feed import Batch
from lockstep.training.optimizer import Optimizer
from lockstep.training.passes import WholePasses
from lockstep.training.precision import params_dtype
from lockstep.training.setup import set_vocab_size
from lockstep.training.step import TrainStep

Step = Callable[[list[Tensor]], float]
"""Takes the micro-batches of one optimizer step, token ids [b, s + 1] each; returns the mean loss."""


@dataclass(frozen=True)
class Shape:
    """Size of the model and of the batch; the reference pair's by default."""

    num_layers: int = 2
    hidden_size: int = 256
    num_attention_heads: int = 4
    ffn_hidden_size: int = 1024
    seq_length: int = 512
    vocab_size: int = 32_000
    micro_batch_size: int = 4
    global_batch_size: int = 32
    dropout: float = 0.1
    lr: float = 3e-4
    weight_decay: float = 0.01
    clip_grad: float = 1.0


def our_config(shape: Shape, precision: str) -> ConfigContainer:
    """Return the resolved configuration of our side, as the flag door makes it; ``precision`` is bf16, fp16 or fp32."""
    flags = {
        "--num-layers": shape.num_layers,
        "--hidden-size": shape.hidden_size,
        "--num-attention-heads": shape.num_attention_heads,
        "--ffn-hidden-size": shape.ffn_hidden_size,
        "--seq-length": shape.seq_length,
        "--max-position-embeddings": shape.seq_length,
        "--micro-batch-size": shape.micro_batch_size,
        "--global-batch-size": shape.global_batch_size,
        "--hidden-dropout": shape.dropout,
        "--attention-dropout": shape.dropout,
        "--clip-grad": shape.clip_grad,
        "--tokenizer-type": "NullTokenizer",
        "--vocab-size": shape.vocab_size,
        "--lr": shape.lr,
        "--train-iters": 1,
    }
    words = ["--mock-data", *(word for flag, value in flags.items() for word in (flag, str(value)))]
    if precision != "fp32":
        words.append(f"--{precision}")
    config = resolve(parse_flags(words), world_size=1)
    set_vocab_size(config, shape.vocab_size)
    return config


def our_step(shape: Shape, config: ConfigContainer, device: torch.device) -> Step:
    """Return our training step."""
    model = build_model(config.model, seed=config.rng.seed, params_dtype=params_dtype(config), device=device)
    train_step = TrainStep(WholePasses(model, DropoutStreams(config.rng.seed, device)), Optimizer(model, config))
    positions = torch.arange(shape.seq_length, device=device).expand(shape.global_batch_size, -1)

    def step(micro_batches: list[Tensor]) -> float:
        ids = torch.cat(micro_batches)  # [global batch, s + 1]
        mask = torch.ones_like(positions, dtype=torch.float32)
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask, positions)
        return train_step(batch, shape.micro_batch_size, shape.lr, shape.weight_decay).lm_loss

    return step


@dataclass(frozen=True)
class Seconds:
    """Time of one step: on the clock, and of this process on all cores."""

    wall: float
    cpu: float


def hugging_face_step(shape: Shape, device: torch.device) -> Step:
    """Return the training step of a Hugging Face GPT-2 with random weights, in FP32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1234)
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.seq_length,
        n_embd=shape.hidden_size,
        n_layer=shape.num_layers,
        n_head=shape.num_attention_heads,
        n_inner=shape.ffn_hidden_size,
        resid_pdrop=shape.dropout,
        embd_pdrop=shape.dropout,
        attn_pdrop=shape.dropout,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: torch.nn.Module = GPT2LMHeadModel(config)
    model.to(device=device, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.lr, weight_decay=shape.weight_decay)

    def step(micro_batches: list[Tensor]) -> float:
        total = 0.0
        for ids in micro_batches:
            inputs, labels = ids[:, :-1], ids[:, 1:].contiguous()
            loss = model(input_ids=inputs, shift_labels=labels, labels=labels).loss / len(micro_batches)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), shape.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def batches(shape: Shape, device: torch.device) -> Callable[[], list[Tensor]]:
    """Return a function that draws the random token ids of the next optimizer step."""
    generator = torch.Generator().manual_seed(1234)
    size = (shape.micro_batch_size, shape.seq_length + 1)
    count = shape.global_batch_size // shape.micro_batch_size

    def draw() -> list[Tensor]:
        return [torch.randint(shape.vocab_size, size, generator=generator).to(device) for _ in range(count)]

    return draw


def timed(step: Step, micro_batches: list[Tensor]) -> tuple[Seconds, float]:
    """Return the time of one step, to the end of its work on a GPU, and its loss."""
    wall, cpu = time.perf_counter(), time.process_time()
    loss = step(micro_batches)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu), loss


def time_in_turns(steps: dict[str, Step], draw: Callable[[], list[Tensor]], rounds: int) -> dict[str, list[Seconds]]:
    """Return the times of each step, ``rounds`` of every contender in turns after one that is not counted."""
    times: dict[str, list[Seconds]] = {name: [] for name in steps}
    for round_number in range(rounds + 1):
        micro_batches = draw()
        label = f"round {round_number}" if round_number else "warm-up"
        for name, step in steps.items():
            seconds, loss = timed(step, micro_batches)
            if round_number:
                times[name].append(seconds)
            print(f"{label:8} {name:14} {seconds.wall:8.3f} s  CPU {seconds.cpu:8.3f} s  loss {loss:.4f}", flush=True)
    return times


def report(times: dict[str, list[Seconds]], shape: Shape) -> None:
    """Print the fastest and median step of each contender, and the ratios of the first to the second."""
    tokens = shape.global_batch_size * shape.seq_length
    summary = []
    for name, seconds in times.items():
        walls = [each.wall for each in seconds]
        fastest, median, cpu = min(walls), statistics.median(walls), min(each.cpu for each in seconds)
        summary.append((fastest, median, cpu))
        rate = tokens / median
        print(f"{name:14} fastest {fastest:.3f} s  median {median:.3f} s  CPU {cpu:.3f} s  {rate:,.0f} tokens/s")
    fastest, median, cpu = (ours / theirs for ours, theirs in zip(*summary, strict=True))
    print(f"ratio ours / Hugging Face: fastest {fastest:.2f}, median {median:.2f}, CPU seconds {cpu:.2f}")


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description="time our training steps against Hugging Face GPT-2 of the same shape")
    parser.add_argument("--rounds", type=int, default=5, help="optimizer steps of each that count")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="number format of ours")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    shape, device = Shape(), choose_device(args.device)
    config = our_config(shape, args.precision)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; ours {args.precision}, theirs fp32")
    with switches(config, device):
        steps = {"ours": our_step(shape, config, device), "hugging face": hugging_face_step(shape, device)}
        report(time_in_turns(steps, batches(shape, device), args.rounds), shape)


if __name__ == "__main__":
    main()
