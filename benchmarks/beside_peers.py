"""Time our training steps beside those of other trainers, in turns on one machine, and print the ratios.

    python -m benchmarks.beside_peers --settings llama32_1b-mb4 llama32_1b-mb1 --peer-path FOLDER --json one.json
    python -m benchmarks.beside_peers --settings llama3_8b llama3_8b+fp8 llama3_8b+16micro llama3_8b+fp8+16micro \
        --peer-path FOLDER --json two.json
    python -m benchmarks.beside_peers --of one.json two.json --write docs/performance.md

Settings are those of benchmarks/gpu_speed.py. Every turn runs in processes of its own. Ours is gpu_speed.py with
compiled layers; each peer gets the same shape, the same random tokens and its own fastest options (see
benchmarks/peers). Output layers are tied nowhere. FOLDER holds torchtitan 0.2.2, and torchao for float8, unpacked,
where they are not installed. A peer that cannot be imported is skipped, and a turn that fails is a row, with the
reason. Tokens are those of one GPU; the floor is the least time of products and attention at this GPU's rates, and of
communication over its links.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_speed import configured, end
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
    "model.vocab_size=128",
    "model.seq_length=64",
)
_TINY_DENSE = (*_TINY, "model.num_query_groups=2", "model.kv_channels=16")
_TINY_EXPERTS = (
    *_TINY,
    "model.num_moe_experts=8",
    "model.moe_layer_freq=[0]+[1]*1",
    "model.moe_router_topk=2",
    "model.moe_ffn_hidden_size=32",
    "model.moe_shared_expert_intermediate_size=64",
)
_COMPILED = "blocks" if torch.cuda.is_available() else "none"
_UNTIED = "model.share_embeddings_and_output_weights=false"
# What changes how ours runs, and not what is trained, or what a peer is given as well; and micro-batches.
_SHARED_CHANGES = {"fsdp", "kept", "lowgrads", "once", "alltoall", "allgather", "ep2", "kept-activations"}
_SHARED_CHANGES |= {"rowwise", "fp8", "fp8gather", "6layers", "8layers"}


@dataclass(frozen=True)
class Setting:
    """A setting of gpu_speed.py, what changes in it so that peers can have the same, and which peers can."""

    name: str
    gpus: int
    changes: tuple[str, ...]
    peers: tuple[str, ...]
    steps: int


def setting_of(name: str, *, tiny: bool = False) -> Setting:
    """Return a setting by its name; a tiny one shows on a machine without a GPU whether everything runs."""
    base, *named = name.split("+")
    base = base.partition("-mb")[0]
    if base not in ("llama32_1b", "llama3_8b", "deepseek_v2_lite"):
        raise ValueError(f"{name}: peers have llama32_1b, llama3_8b and deepseek_v2_lite")
    counted = [change for change in named if change.endswith("micro")]
    if unknown := set(named) - _SHARED_CHANGES - set(counted):
        raise ValueError(f"{name}: peers do not have +{' +'.join(sorted(unknown))}; take it out")
    changes: tuple[str, ...] = (_UNTIED,) if base == "llama32_1b" else ()
    if tiny:
        changes += _TINY_EXPERTS if base == "deepseek_v2_lite" else _TINY_DENSE
    one = base == "llama32_1b"
    # Many micro-batches make a step long and its time steady.
    peers = tuple(_PEERS) if one else ("torchtitan",)
    return Setting(name, 1 if one else 2, changes, peers, 2 if counted else 5)


def job_of(setting: Setting, compiled: bool) -> Job:
    """Return what a peer is asked for: the shape and batches of our own configuration."""
    config = configured(setting.name, "auto", list(setting.changes), setting.gpus)
    model, experts = config.model, None
    if model.num_moe_experts is not None:
        shared = required(model.moe_shared_expert_intermediate_size)
        experts = (model.num_moe_experts, model.moe_router_topk, required(model.moe_ffn_hidden_size), shared)
    return Job(
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
        None if config.mixed_precision.fp8 is None else config.mixed_precision.fp8_recipe,
        model.recompute_granularity == "full",
        compiled,
        experts,
    )


def command_of(who: str, setting: Setting, options: argparse.Namespace) -> list[str]:
    """Return what runs a turn; its last line of output is what it found."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={setting.gpus}"]
    steps = ["--steps", str(options.steps or setting.steps)]
    if who != "ours":
        if options.profile:
            steps += ["--profile", str(options.profile / f"{setting.name}-{who}.txt")]
        job = ["--job", json.dumps(asdict(job_of(setting, options.compiled)))]
        return [sys.executable, *launcher, "-m", f"benchmarks.peers.{who}_step", *job, *steps]
    if options.profile:
        steps += ["--profile", str(options.profile)]
    command = [sys.executable, *(launcher if setting.gpus > 1 else []), str(_ROOT / "benchmarks/gpu_speed.py")]
    command += ["--alone", "--settings", setting.name, "--compile", _COMPILED]
    return [*command, "--gpus", str(setting.gpus), *steps, "--set", *setting.changes]


def turn(who: str, setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Run a turn; return what it found, or why it found nothing under ``failed``."""
    paths = [str(_ROOT), str(_ROOT / "src"), *([str(options.peer_path.resolve())] if options.peer_path else [])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]))
    log, printed = (options.logs / f"{setting.name}-{who}.{kind}" for kind in ("log", "out"))
    begun, reason = time.monotonic(), None
    with log.open("w") as errors, printed.open("w") as output:
        command = command_of(who, setting, options)
        print(*command, file=errors, flush=True)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment, start_new_session=True
        )
        try:
            process.wait(options.timeout)
        except BaseException as error:
            end(process.pid)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            reason = f"did not end in {options.timeout:.0f} s"
    for line in reversed(printed.read_text().splitlines()):
        if line.startswith("{") and '"step_s"' in line:
            found: dict[str, Any] = json.loads(line)
            return found | {"date": time.strftime("%Y-%m-%d"), "turn_s": round(time.monotonic() - begun, 1)}
    return {"failed": reason or _reason(log.read_text()), "gpus": setting.gpus}


def _reason(log: str) -> str:
    """Return the last line of a log that names an error."""
    lines = [line.partition("]: ")[2] or line for line in log.splitlines()]
    named = [line for line in lines if re.match(r"[\w.]*Error(:|$)", line) and "ChildFailedError" not in line]
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
        ours = turns.get("ours", {"failed": "did not run"})
        for who, found in turns.items():
            start = f"| {name} | {found['gpus']} | {found.get('peer', who)} |"
            if "failed" in found:
                rows.append(f"{start} {found['failed'].replace('|', '/')} | | | |")
                continue
            ratio = "" if who == "ours" or "failed" in ours else f"{ours['tokens_per_s'] / found['tokens_per_s']:.3f}"
            speed = f"{found['step_s'] * 1e3:.1f} | {found['tokens_per_s']:,.0f} | {found['peak_gib']:.1f}"
            rows.append(f"{start} {speed} | {ratio} |")
            if found.get("kernels_ms"):
                kinds.append(_kinds(name, found.get("peer", who), found["kernels_ms"]))
            if found.get("floors_ms"):
                kinds.append(_kinds(name, "floor", found["floors_ms"]))
    if len(kinds) == 2:
        return rows
    return [*rows, "", "Milliseconds of kernels in one step under a profiler, and their floors:", "", *kinds]


def _kinds(name: str, who: str, times: dict[str, float]) -> str:
    rest = sum(ms for kind, ms in times.items() if kind not in (*_KINDS, "whole"))
    cells = [f"{times[kind]:.1f}" if kind in times else "" for kind in _KINDS]
    return f"| {name} | {who} | {' | '.join(cells)} | {f'{rest:.1f}' if rest else ''} |"


def write(path: Path, lines: list[str]) -> None:
    """Put the table between the marks of a page."""
    begin, close = _MARKS
    head, found, rest = path.read_text().partition(begin)
    _, closed, tail = rest.partition(close)
    if not (found and closed):
        sys.exit(f"{path} has no {begin} and {close}: add both where the table belongs.")
    path.write_text("\n".join([head + begin, "", *lines, "", close + tail]))


def run(settings: list[Setting], options: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """Take all turns, and keep what was found after each."""
    for folder in (options.logs, options.profile):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    reasons = {peer: absent(_PEERS[peer], options) for peer in options.peers}
    results: dict[str, dict[str, dict[str, Any]]] = {setting.name: {} for setting in settings}
    ends = time.monotonic() + options.within
    for setting in settings:
        peers = [peer for peer in options.peers if peer in setting.peers]
        for who in ["ours", *peers] * options.rounds:
            reason = reasons.get(who) or (None if time.monotonic() < ends else f"{options.within:.0f} s were over")
            found = {"failed": f"skipped: {reason}", "gpus": setting.gpus} if reason else turn(who, setting, options)
            results[setting.name][who] = faster(results[setting.name].get(who), found)
            print(f"{setting.name}, {who}: {_said(found)}", file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _said(found: dict[str, Any]) -> str:
    if "failed" in found:
        return str(found["failed"])
    speed = f"{found['tokens_per_s']:,.0f} tokens/s, {found['peak_gib']:.1f} GiB"
    return f"{speed}, losses {found['losses'][0]:.3f} to {found['losses'][-1]:.3f}, {found['turn_s']} s in all"


def main() -> int:
    """Time all turns and print the table; exit code 1 where one of ours failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", default=["llama32_1b-mb4", "llama3_8b", "llama3_8b+fp8"])
    parser.add_argument("--peers", nargs="+", choices=_PEERS, default=list(_PEERS))
    parser.add_argument("--peer-path", type=Path, help="a folder with the peers' packages")
    parser.add_argument("--steps", type=int, help="steps to time in a turn: 5, or 2 of many micro-batches")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each; the faster one counts")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each turn")
    parser.add_argument("--within", type=float, default=float("inf"), help="seconds after which no turn begins")
    parser.add_argument("--logs", type=Path, default=Path("build/peer-logs"), help="folder for what the turns print")
    parser.add_argument("--profile", type=Path, help="also profile a step of each, into this folder")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a machine without a GPU")
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="compile layers of peers",
    )
    parser.add_argument("--json", type=Path, help="also write what was found")
    parser.add_argument("--of", type=Path, nargs="+", help="run nothing: the table of what was written with --json")
    parser.add_argument("--write", type=Path, help="the page whose table is rewritten")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # Its turn ends with it.
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for path in options.of or []:
        results |= json.loads(path.read_text())
    try:
        settings = [setting_of(name, tiny=options.tiny) for name in options.settings]
    except ValueError as error:
        parser.error(str(error))
    if not options.of:
        results = run(settings, options)
    lines = [_where(results), "", *table(results)]
    print(*lines, sep="\n")
    if options.write:
        write(options.write, lines)
    return int(any("failed" in turns["ours"] for turns in results.values()))


def _where(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    good = [found for turns in results.values() for found in turns.values() if "failed" not in found]
    places = {f"{found['device']}, torch {found['torch']}, {found['date']}": None for found in good}
    return f"{'; '.join(places) or 'Nothing ran'}:"


if __name__ == "__main__":
    sys.exit(main())
