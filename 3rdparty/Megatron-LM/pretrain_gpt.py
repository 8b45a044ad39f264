"""Megatron-LM's entry point at its usual path: trains through Lockstep's flag door."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from lockstep.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain-gpt", *sys.argv[1:]]))
