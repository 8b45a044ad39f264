"""Time data preparation against Megatron-LM's preprocess_data.py on the same corpus, in one run, and compare the files.

Needs a checkout of Megatron-LM that runs without a GPU (``--megatron-lm PATH``) and a Python that has its packages
(``--megatron-python``, this one by default). The corpus is a JSON lines file that is repeated to ``--megabytes``; both
commands get the same flags and take turns, so that a busy machine slows both. Prints the time of the whole command of
each, fastest and median, tokens a second, the CPU seconds of all its processes, and the ratios; exits with 1 where a
file differs.

Three corpora: repeated; as large, but every copy with its words shuffled and letters of its own, so that its words are
new although they come back as often as those of the original within it; and the original once, which is start-up.
"""

import argparse
import json
import os
import random
import re
import resource
import statistics
import string
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lockstep.data.indexed import IndexedDataset, sha256_file

ROOT = Path(__file__).resolve().parents[1]
_MEGABYTE = 1_000_000
# Megatron-LM needs typing.override, which Python has from 3.12 on: an identity in the eyes of a running program.
_MEGATRON_LM = """
import runpy, sys, typing
if not hasattr(typing, "override"):
    typing.override = lambda function: function
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Seconds:
    """Time of one command: on the clock, and of all its processes."""

    wall: float
    cpu: float


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the commands to time, ours first, without input and output."""
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(args.tokenizer), "--append-eod"]
    flags += ["--workers", str(args.workers), "--log-interval", "100000"]
    script = args.megatron_lm / "tools" / "preprocess_data.py"
    return {
        "ours": [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *flags],
        "megatron-lm": [str(args.megatron_python), "-c", _MEGATRON_LM, str(script), *flags],
    }


def timed(command: list[str], corpus: Path, prefix: Path) -> Seconds:
    """Return the time of a command; ends the benchmark with its last words where it fails."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    words = [*command, "--input", str(corpus), "--output-prefix", str(prefix)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command[:4])} failed:\n{done.stderr[-2000:]}")
    return Seconds(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def repeat(source: Path, size: int, target: Path) -> None:
    """Write a file over and over until the target has ``size`` bytes."""
    content = source.read_bytes()
    with target.open("wb") as stream:
        for _ in range(-(-size // len(content))):
            stream.write(content)


def renew(source: Path, size: int, target: Path) -> None:
    """Write a file over and over as ``repeat``, each copy with words shuffled in documents and letters exchanged."""
    documents = [json.loads(line) for line in source.read_bytes().splitlines()]
    words = [re.split(r"(\s+)", document["text"]) for document in documents]  # words, and between them whitespace
    rng, letters = random.Random(0), string.ascii_lowercase
    with target.open("w") as stream:
        while stream.tell() < size:
            others = "".join(rng.sample(letters, len(letters)))
            table = str.maketrans(letters + letters.upper(), others + others.upper())
            for document, parts in zip(documents, words, strict=True):
                shuffled = parts[::2]
                rng.shuffle(shuffled)
                parts[::2] = shuffled
                stream.write(json.dumps({**document, "text": "".join(parts).translate(table)}) + "\n")


def compare(corpus: Path, contenders: dict[str, list[str]], rounds: int, folder: Path) -> bool:
    """Time all on a corpus, print the table, and say whether all wrote the same files."""
    times: dict[str, list[Seconds]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, command in contenders.items():
            times[name].append(timed(command, corpus, folder / name))
    prefixes = {name: f"{folder / name}_text_document" for name in contenders}
    tokens = IndexedDataset(prefixes["ours"]).num_tokens
    print(f"{corpus.name}: {corpus.stat().st_size / _MEGABYTE:.1f} MB, {tokens:,} tokens, {rounds} rounds")
    for name, seconds in times.items():
        fastest, median = min(each.wall for each in seconds), statistics.median(each.wall for each in seconds)
        cpu = min(each.cpu for each in seconds)
        print(
            f"  {name:12} fastest {fastest:6.2f} s  median {median:6.2f} s  CPU {cpu:6.2f} s  "
            f"{tokens / fastest:,.0f} tokens/s"
        )
    ours, theirs = times["ours"], times["megatron-lm"]
    wall = min(each.wall for each in theirs) / min(each.wall for each in ours)
    cpu = min(each.cpu for each in theirs) / min(each.cpu for each in ours)
    hashes = {name: [sha256_file(Path(prefix + end)) for end in (".bin", ".idx")] for name, prefix in prefixes.items()}
    same = hashes["ours"] == hashes["megatron-lm"]
    print(f"  ours is {wall:.2f} times as fast, CPU seconds {cpu:.2f}; files {'identical' if same else 'DIFFER'}")
    print(f"  .bin sha256 {hashes['ours'][0]}\n  .idx sha256 {hashes['ours'][1]}", flush=True)
    return same


def main() -> int:
    """Run the benchmark as the command line says; return 1 where files differ."""
    parser = argparse.ArgumentParser(description="time data preparation against Megatron-LM's preprocess_data.py")
    parser.add_argument("--megatron-lm", type=Path, required=True, metavar="PATH", help="checkout of Megatron-LM")
    parser.add_argument("--megatron-python", type=Path, default=Path(sys.executable), metavar="PYTHON")
    parser.add_argument("--corpus", type=Path, required=True, metavar="FILE", help="JSON lines file to repeat")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER", help="Hugging Face tokenizer")
    parser.add_argument("--megabytes", type=int, default=100, help="size that the corpus is repeated to")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of each")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each that count")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repeated, renewed = folder / "repeated.jsonl", folder / "renewed.jsonl"
        repeat(args.corpus, args.megabytes * _MEGABYTE, repeated)
        renew(args.corpus, args.megabytes * _MEGABYTE, renewed)
        timed(commands(args)["ours"], args.corpus, folder / "warm-up")  # reads the libraries into the page cache
        same = [compare(corpus, commands(args), args.rounds, folder) for corpus in (repeated, renewed, args.corpus)]
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
