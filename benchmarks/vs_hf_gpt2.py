"""Time our training steps against a Hugging Face GPT-2 of the same shape and batch, in one run.

Ours trains as the doors do, in BF16 unless told otherwise; Hugging Face's trains in FP32 with AdamW, gradient
accumulation and clipping. Both see the same token ids and take optimizer steps in turns, so that a busy machine slows
both. Prints the seconds of a step of each, fastest and median, and the ratio ours / theirs.
"""

# Shapes: b micro-batch, s sequence.

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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


def time_in_turns(steps: dict[str, Step], draw: Callable[[], list[Tensor]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each step, ``rounds`` of every contender in turns after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + 1):
        micro_batches = draw()
        for name, step in steps.items():
            began = time.perf_counter()
            loss = step(micro_batches)
            elapsed = time.perf_counter() - began
            if round_number:
                seconds[name].append(elapsed)
            print(
                f"{'warm-up' if not round_number else f'round {round_number}':8} {name:14} "
                f"{elapsed:8.3f} s  loss {loss:.4f}",
                flush=True,
            )
    return seconds
