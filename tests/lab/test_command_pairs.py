"""Clean pairs that were once called a bug, and a few of the others by way of the commands."""

import contextlib
import io
from pathlib import Path

import pytest

from lockstep.lab.localise.localise import judge
from lockstep.lab.localise.probes import load_probes
from lockstep.lab.localise.walk import Pass
from lockstep.lab.localise.worker import RUN, TWIN, Job, probe
from tests.lab import command_pairs, faults


def test_masks_of_documents_belong_to_their_micro_batch(tmp_path: Path) -> None:
    """Also where a micro-batch is one sample, whose mask has the shape of one for all samples."""
    passes = []
    for label, size in (("A", 1), ("B", 2)):
        folder = tmp_path / label
        tree = faults.config({**command_pairs.DOCUMENTS, "train.micro_batch_size": size})
        with contextlib.redirect_stdout(io.StringIO()):
            assert probe(Job(tree, [1], str(folder), str(tmp_path / "A"))) == 0
        passes.append(Pass(label, label, load_probes(folder, RUN), load_probes(folder, TWIN)))
    found = judge((passes[0], passes[1]), [1])
    assert found.verdict == "rounding", found.sentence
    shapes = {tuple(mask.whole.shape) for side in passes if (mask := side.run.logical(1, "forward", "attention mask"))}
    assert shapes == {(4, 64, 64)}


@pytest.mark.slow
def test_neither_command_names_a_cause_that_is_not_there(tmp_path: Path) -> None:
    """The whole table is `python -m tests.lab.command_pairs`."""
    names = ("experts, EP2", "latents and experts, TP2", "packed texts, DP2", "resumed with TP2, adapters")
    chosen = {name: pair for name, pair in command_pairs.pairs(tmp_path).items() if name in names}
    assert len(chosen) == len(names)
    for name, runs in command_pairs.train_all(chosen, tmp_path).items():
        found = command_pairs.verdicts(*runs, tmp_path / f"{runs[0].name}-reports")
        assert not command_pairs.is_false(chosen[name], found), (name, found)
