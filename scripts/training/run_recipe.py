"""Megatron Bridge's entry point at its usual path: trains through Lockstep's recipe door."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from lockstep.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
