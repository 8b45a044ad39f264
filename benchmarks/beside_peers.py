"""Time our training steps beside those of other trainers, in turns on one machine, and print the ratios.

    python -m benchmarks.beside_peers --settings llama32_1b llama3_8b llama3_8b+fp8 --peer-path FOLDER \
        --write docs/performance.md

Every turn runs in processes of its own. Ours is benchmarks/gpu_speed.py; each peer gets the same shape, the same random
tokens and its own fastest options (see benchmarks/peers). FOLDER holds the peers' packages, where they are not
installed; a peer that cannot be imported is skipped, with the reason. Tokens are those of one GPU; the floor is the
least time of products and attention at this GPU's rates, and of communication over its links.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_speed import configured
from benchmarks.peers.job import Job
from lockstep.models.layers import required

_ROOT = Path(__file__).parents[1]
_MARKS = "<!-- beside-peers -->", "<!-- /beside-peers -->"
_KINDS = ("matrix products", "attention", "communication", "exposed communication", "idle")
_PEERS = {"torchtitan": "torchtitan", "transformers": "transformers"}
_TINY = (
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.kv_channels=16",
    "model.vocab_size=128",
    "model.seq_length=64",
)
_COMPILED = "blocks" if torch.cuda.is_available() else "none"
_UNTIED = "model.share_embeddings_and_output_weights=false"


@dataclass(frozen=True)
class Setting:
    """A setting of gpu_speed.py, what changes in it so that peers can have the same, and which peers can."""

    name: str
    gpus: int
    changes: tuple[str, ...] = ()
    peers: tuple[str, ...] = ("torchtitan",)
    family: str = "llama"


_SETTINGS = {
    "llama32_1b": Setting("llama32_1b-mb4", 1, (_UNTIED,), ("torchtitan", "transformers")),
    "llama3_8b": Setting("llama3_8b", 2),
    "llama3_8b+fp8": Setting("llama3_8b+fp8", 2),
    # For a machine without a GPU: whether everything runs.
    "tiny": Setting("llama32_1b-mb1", 1, (_UNTIED, *_TINY), ("torchtitan", "transformers")),
    "deepseek_v2_lite": Setting("deepseek_v2_lite+ep2", 2, family="deepseek_v2_lite"),
    "deepseek_v2_lite-6layers": Setting("deepseek_v2_lite+6layers+ep2", 2, family="deepseek_v2_lite"),
}


def job_of(setting: Setting) -> Job:
    """Return what a peer is asked for: the shape and batches of our own configuration."""
    config = configured(setting.name, "auto", list(setting.changes), setting.gpus)
    model = config.model
    return Job(
        setting.family,
        required(model.num_layers),
        required(model.hidden_size),
        required(model.ffn_hidden_size),
        required(model.num_attention_heads),
        required(model.num_query_groups),
        required(model.vocab_size),
        required(model.seq_length),
        float(model.rotary_base),
        required(config.train.micro_batch_size),
        required(config.train.global_batch_size),
        setting.gpus,
        config.mixed_precision.fp8 is not None,
        model.recompute_granularity == "full",
    )


def command_of(who: str, setting: Setting, options: argparse.Namespace) -> list[str]:
    """Return what runs a turn; its last line of output is what it found."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={setting.gpus}"]
    steps = ["--steps", str(options.steps)]
    if options.profile:
        steps += ["--profile", str(options.profile / f"{setting.name}-{who}.txt")]
    if who != "ours":
        job = ["--job", json.dumps(asdict(job_of(setting)))]
        return [sys.executable, *launcher, "-m", f"benchmarks.peers.{who}_step", *job, *steps]
    if options.profile:
        steps[-1] = str(options.profile)
    command = [
        sys.executable,
        *(launcher if setting.gpus > 1 else []),
        str(_ROOT / "benchmarks/gpu_speed.py"),
        "--alone",
    ]
    command += ["--settings", setting.name, "--compile", _COMPILED, "--gpus", str(setting.gpus), *steps]
    return [*command, "--set", *setting.changes]


def turn(who: str, setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Run a turn; return what it found, or why it found nothing under ``failed``."""
    paths = [str(_ROOT), str(_ROOT / "src"), *([str(options.peer_path.resolve())] if options.peer_path else [])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]))
    if who == "torchtitan":
        # Of its own run script.
        environment["PYTORCH_CUDA_ALLOC_CONF"] = environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    log = options.logs / f"{setting.name}-{who}.log"
    with log.open("a") as errors:
        command = command_of(who, setting, options)
        print(*command, file=errors, flush=True)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        ) as process:
            try:
                output, _ = process.communicate(timeout=options.timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return {"failed": f"did not end in {options.timeout:.0f} s"}
        errors.write(output)
    for line in reversed(output.splitlines()):
        if line.startswith("{") and process.returncode == 0:
            found: dict[str, Any] = json.loads(line)
            return found
    return {"failed": _reason(log.read_text())}


def _reason(log: str) -> str:
    """Return the last line of a log that names an error."""
    lines = [line.partition("]: ")[2] or line for line in log.splitlines()]
    named = [line for line in lines if "Error" in line.partition(":")[0] and "ChildFailedError" not in line]
    return (named or lines or ["no output"])[-1].strip()[:160]


def absent(peer: str, options: argparse.Namespace) -> str | None:
    """Return why a peer cannot be had; None where it can."""
    places = [str(options.peer_path.resolve())] if options.peer_path else []
    code = f"import importlib.util, sys; sys.path[:0] = {places}; sys.exit(not importlib.util.find_spec('{peer}'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    return f"{peer} is not installed" if done.returncode else None


def faster(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    """Return the one of two turns that has the faster step."""
    if first is None or "failed" in first:
        return second
    return first if "failed" in second or first["step_s"] <= second["step_s"] else second


def table(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Return the rows of all settings, and of where the time of their steps goes, as Markdown."""
    rows = [
        "| setting | GPUs | trainer | ms a step | tokens/s | peak GiB | ours / its tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    kinds = ["| setting | trainer | " + " | ".join(_KINDS) + " | the rest |", "|---" * (len(_KINDS) + 3) + "|"]
    for name, turns in results.items():
        ours = turns.get("ours", {})
        for who, found in turns.items():
            start = f"| {name} | {_SETTINGS[name].gpus} | {found.get('peer', who)} |"
            if "failed" in found:
                rows.append(f"{start} {found['failed'].replace('|', '/')} | | | |")
                continue
            ratio = "" if who == "ours" or "failed" in ours else f"{ours['tokens_per_s'] / found['tokens_per_s']:.2f}"
            speed = f"{found['step_s'] * 1e3:.1f} | {found['tokens_per_s']:,.0f} | {found['peak_gib']:.1f}"
            rows.append(f"{start} {speed} | {ratio} |")
            if found.get("kernels_ms"):
                kinds.append(_kinds(name, found.get("peer", who), found["kernels_ms"]))
            if found.get("floors_ms"):
                kinds.append(_kinds(name, "floor", found["floors_ms"]))
    return [
        *rows,
        *(
            ["", "Milliseconds of kernels in one step under a profiler, and their floors:", "", *kinds]
            if len(kinds) > 2
            else []
        ),
    ]


def _kinds(name: str, who: str, times: dict[str, float]) -> str:
    rest = sum(ms for kind, ms in times.items() if kind not in (*_KINDS, "whole"))
    cells = [f"{times[kind]:.1f}" if kind in times else "" for kind in _KINDS]
    return f"| {name} | {who} | {' | '.join(cells)} | {f'{rest:.1f}' if rest else ''} |"


def write(path: Path, lines: list[str]) -> None:
    """Put the table between the marks of a page."""
    begin, end = _MARKS
    head, found, rest = path.read_text().partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        sys.exit(f"{path} has no {begin} and {end}: add both where the table belongs.")
    path.write_text("\n".join([head + begin, "", *lines, "", end + tail]))


def main() -> int:
    """Time all turns and print the table; exit code 1 where one of ours failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--settings", nargs="+", choices=_SETTINGS, default=["llama32_1b", "llama3_8b", "llama3_8b+fp8"]
    )
    parser.add_argument("--peers", nargs="+", choices=_PEERS, default=list(_PEERS))
    parser.add_argument("--peer-path", type=Path, help="a folder with the peers' packages")
    parser.add_argument("--steps", type=int, default=6, help="steps to time in a turn, after three that do not count")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each; the faster one counts")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each turn")
    parser.add_argument("--logs", type=Path, default=Path("build/peer-logs"), help="folder for what the turns print")
    parser.add_argument("--profile", type=Path, help="also profile a step of each, into this folder")
    parser.add_argument("--json", type=Path, help="also write what was found")
    parser.add_argument("--write", type=Path, help="the page whose table is rewritten")
    options = parser.parse_args()
    for folder in (options.logs, options.profile):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    reasons = {peer: absent(_PEERS[peer], options) for peer in options.peers}
    results: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in options.settings}
    for name in options.settings:
        peers = [peer for peer in options.peers if peer in _SETTINGS[name].peers]
        for who in ["ours", *peers] * options.rounds:
            reason = reasons.get(who)
            found = {"failed": f"skipped: {reason}"} if reason else turn(who, _SETTINGS[name], options)
            results[name][who] = faster(results[name].get(who), found)
            said = found.get("failed") or f"{found['tokens_per_s']:,.0f} tokens/s, {found['peak_gib']:.1f} GiB"
            print(f"{name}, {who}: {said}", file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")
    lines = [_where(results), "", *table(results)]
    print(*lines, sep="\n")
    if options.write:
        write(options.write, lines)
    return int(any("failed" in turns["ours"] for turns in results.values()))


def _where(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    good = [found for turns in results.values() for found in turns.values() if "failed" not in found]
    date = time.strftime("%Y-%m-%d")
    return f"{good[0]['device']}, torch {good[0]['torch']}, {date}:" if good else f"{date}: nothing ran"


if __name__ == "__main__":
    sys.exit(main())
