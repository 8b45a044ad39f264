"""Fixtures every test folder shares."""

import os
from pathlib import Path

import pytest

# Set before torch is imported: with more threads than free cores, each of a tiny model's many small operations waits
# for a thread that does not run, and a test takes fifty times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The tests are of the tree, whichever core it is switched to.
os.environ["LOCKSTEP_CORE"] = "main"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of reference data beside the repository; a user's clone has none."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "reference").is_dir():
        pytest.skip("needs the reference data that is kept outside the repository")
    return folder
