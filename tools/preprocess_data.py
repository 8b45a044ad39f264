"""Tokenize JSON lines into .bin/.idx files with the flags of Megatron-LM's script of this name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lockstep.data.cli import preprocess_main

if __name__ == "__main__":
    sys.exit(preprocess_main())
