"""Megatron Bridge's translator at its usual path: Megatron-LM flags into a recipe with overrides, and back."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lockstep.guard import run
from lockstep.translation.cli import main

if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:], "translate_mlm_to_bridge.py")))
