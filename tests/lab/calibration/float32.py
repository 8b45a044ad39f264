"""How far correct float32 runs part, beside what `compare` allows: ``python -m tests.lab.calibration.float32``.

Each line is a layout of two processes, or other micro-batches, against one process: the largest distance of losses and
of gradient norms in parts of the bound for float32, before any update, after up to 2, and up to 4, where that bound
reaches the one for BF16. Longer runs are bounded by that: the last two columns are parts of it, over all iterations.
"""

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from lockstep.lab.bands import loss_band, norm_band
from tests.parallel.spawn import Turn, in_turn
from tests.training.checkpoint_runs import train

ITERATIONS = 120
_ALL: dict[str, Any] = {
    "mixed_precision.bf16": False,
    "train.train_iters": ITERATIONS,
    "validation.eval_interval": ITERATIONS,
    "logger.log_interval": ITERATIONS,
}
_GPT = {"model.gated_linear_unit": False, "model.activation_func": "gelu", "model.num_query_groups": 4}
_WIDE = {"model.hidden_size": 64, "model.ffn_hidden_size": 128, "tokenizer.vocab_size": 499}
KINDS: dict[str, dict[str, Any]] = {
    "GPT": _GPT,
    "Llama-like": {},
    "Llama-like, learning rate 1e-2": {"optimizer.lr": 1e-2},
    "GPT, wider": {**_GPT, **_WIDE},
    "Llama-like, wider, learning rate 3e-3": {**_WIDE, "optimizer.lr": 3e-3},
    "SGD, learning rate 0.1": {"optimizer.optimizer": "sgd", "optimizer.lr": 0.1},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "micro-batches of 2": (1, {"train.micro_batch_size": 2}),
    "TP2": (2, {"model.tensor_model_parallel_size": 2}),
    "PP2": (2, {"model.pipeline_model_parallel_size": 2}),
    "CP2": (2, {"model.context_parallel_size": 2}),
    "sharded DP2": (2, {"ddp.use_distributed_optimizer": True}),
    "FSDP2": (2, {"dist.use_torch_fsdp2": True}),
}
_BANDS = {
    "lm_loss": lambda a, b, updates: loss_band(a, b, updates),
    "grad_norm": lambda a, b, u: norm_band(a, b, 0.0, u),
}


def quiet(changes: dict[str, Any], run_dir: Path) -> str:
    """Train without a word."""
    with contextlib.redirect_stdout(io.StringIO()):
        return train(changes, run_dir)


def lines(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Return the training lines of a record by iteration."""
    told = map(json.loads, (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["iteration"]: line for line in told if line["kind"] == "train"}


def parts(base: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]], name: str) -> list[float]:
    """Return the distances of a number in parts of its bounds: at 1, up to 3, up to 5, and of BF16's bound over all."""

    def largest(last: int, fine: bool) -> float:
        pairs = [(base[i][name], other[i][name], i - 1 if fine else None) for i in range(1, last + 1)]
        return max(abs(a - b) / _BANDS[name](a, b, updates) for a, b, updates in pairs)

    return [largest(1, True), largest(3, True), largest(5, True), largest(ITERATIONS, False)]


def main() -> None:
    """Train all runs in one start of two processes and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        places = {(kind, layout): Path(folder) / f"{kind}-{layout}" for kind in KINDS for layout in LAYOUTS}
        turns = [
            Turn(LAYOUTS[layout][0], quiet, ({**_ALL, **KINDS[kind], **LAYOUTS[layout][1]}, place))
            for (kind, layout), place in places.items()
        ]
        for results in in_turn(turns):
            assert set(results) == {"finished"}, results
        heads = [f"{number}: {when}" for number in ("loss", "norm") for when in ("first", "to 3", "to 5", "BF16's")]
        print(f"| Model | Layout | {' | '.join(heads)} |\n|---|---|{'---|' * len(heads)}")
        for (kind, layout), place in places.items():
            if layout != "one":
                base, other = lines(places[kind, "one"]), lines(place)
                found = parts(base, other, "lm_loss") + parts(base, other, "grad_norm")
                print(f"| {kind} | {layout} | {' | '.join(f'{part:.2g}' for part in found)} |")


if __name__ == "__main__":
    main()
