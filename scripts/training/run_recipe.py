"""Megatron Bridge's entry point at its usual path: trains through Lockstep's recipe door."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from lockstep.cli import train
from lockstep.guard import run

if __name__ == "__main__":
    sys.exit(run(lambda: train(sys.argv[1:])))
