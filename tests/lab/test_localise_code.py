"""Two commits as sides: each is run again by its own code, and the first tensor that their codes compute otherwise."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from lockstep.cli import main
from lockstep.errors import UserError
from lockstep.git import Repository
from lockstep.lab.localise.code import by_their_code, known_settings, verify
from lockstep.lab.localise.localise import judge, with_changes
from lockstep.lab.localise.probes import SCHEMA, load_probes
from lockstep.lab.localise.report import as_json
from lockstep.lab.localise.sides import Rerun, open_sides
from lockstep.lab.localise.walk import Pass
from lockstep.lab.localise.worker import RUN, TWIN
from tests.lab import faults
from tests.lab.bisect.history import git
from tests.lab.synthetic import write

ROOT = Path(__file__).resolve().parents[2]
_JOB = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 2 --eval-iters 0 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 64 --lr 1e-3"
).split()
_CHANGES = {
    "epsilon": ("models/norms.py", "bias, self.epsilon)", "bias, 1.5 * self.epsilon)"),
    "comment": ("models/norms.py", "self.epsilon = config", "# Says nothing new.\n        self.epsilon = config"),
}


@dataclass(frozen=True)
class Clone:
    """A repository with this tree's source, and runs of it by the name of what was changed."""

    root: Path
    commits: dict[str, str]
    runs: dict[str, Path]

    def lockstep(self, *words: str) -> subprocess.CompletedProcess[str]:
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [sys.executable, "-m", "lockstep.cli", *words],
            cwd=self.root.parent,
            env=environ | {"PYTHONPATH": str(self.root / "src"), "TMPDIR": str(self.root.parent)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def localised(self, a: str, b: str, *words: str) -> tuple[dict[str, Any], str]:
        done = self.lockstep("localise", str(self.runs[a]), str(self.runs.get(b, b)), "--json", *words)
        assert done.stdout.startswith("{"), done.stderr
        return json.loads(done.stdout), done.stderr

    def change(self, name: str) -> None:
        file, old, new = _CHANGES[name]
        path = self.root / "src" / "lockstep" / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))


def _new_repository(root: Path) -> None:
    root.mkdir(parents=True)
    git(root, "init", "-q")
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    git(root, "add", "-A")
    git(root, "commit", "-qm", "base")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Clone:
    root = tmp_path_factory.mktemp("code") / "clone"
    _new_repository(root)
    made = Clone(root, {"base": git(root, "rev-parse", "HEAD")}, {})
    for name in ("base", *_CHANGES):
        if name in _CHANGES:
            git(root, "checkout", "-q", made.commits["base"])
            made.change(name)
            git(root, "commit", "-qam", name)
            made.commits[name] = git(root, "rev-parse", "HEAD")
        made.runs[name] = root.parent / name
        done = made.lockstep("pretrain-gpt", *_JOB, "--run-dir", str(made.runs[name]))
        assert done.returncode == 0, done.stderr
    return made


def _untouched(clone: Clone) -> None:
    assert git(clone.root, "rev-parse", "HEAD") == clone.commits["comment"]
    assert len(git(clone.root, "worktree", "list").splitlines()) == 1
    assert not list(clone.root.parent.glob("lockstep-scratch-*"))


@pytest.mark.slow
def test_the_tensor_that_a_commit_computes_otherwise_is_named(clone: Clone) -> None:
    found, said = clone.localised("base", "epsilon")
    short = {name: commit[:12] for name, commit in clone.commits.items()}
    assert found["verdict"] == "bug"
    assert (found["first"]["stage"], found["first"]["name"]) == (
        "forward",
        "decoder.layers.0.input_layernorm",
    )
    assert f"A is computed by commit {short['base']}, B by commit {short['epsilon']}" in found["sentence"]
    assert f"git diff {short['base']} {short['epsilon']} -- src" in found["next_step"]
    assert found["stages"][0]["detail"] == f"commit {clone.commits['base']} against {clone.commits['epsilon']}"
    assert f"[B] {clone.runs['epsilon']} by commit {short['epsilon']}: again to iteration 1" in said
    _untouched(clone)


@pytest.mark.slow
def test_commits_that_compute_the_same_are_identical(clone: Clone) -> None:
    found, _ = clone.localised("base", "comment")
    assert found["verdict"] == "identical"
    assert found["iterations"] == [1]
    _untouched(clone)


@pytest.mark.slow
def test_a_run_beside_itself_by_another_commit(clone: Clone) -> None:
    found, _ = clone.localised("comment", f"commit:{clone.commits['epsilon'][:10]}")
    assert found["verdict"] == "bug"
    assert found["first"]["name"] == "decoder.layers.0.input_layernorm"
    assert found["iterations"] == [1, 2]
    _untouched(clone)


@pytest.mark.slow
def test_a_run_beside_itself_by_what_is_not_committed_yet(clone: Clone) -> None:
    clone.change("epsilon")
    try:
        found, _ = clone.localised("comment", "here")
    finally:
        git(clone.root, "checkout", "-q", "--", "src")
    assert found["verdict"] == "bug"
    assert f"B by commit {clone.commits['comment'][:12]} with local changes" in found["sentence"]
    _untouched(clone)


@pytest.mark.slow
def test_both_by_the_code_that_is_here(clone: Clone) -> None:
    found, _ = clone.localised("base", "epsilon", "--code", "here")
    assert found["verdict"] == "cannot tell"
    assert "But the records differ at iteration 1, and B does not repeat itself" in found["sentence"]
    assert "local changes" not in found["sentence"]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """Return a repository with two commits, neither of which has a worker."""
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "-q")
    for text in ("one", "two"):
        (root / "src").mkdir(exist_ok=True)
        (root / "src" / "note").write_text(text)
        git(root, "add", "-A")
        git(root, "commit", "-qm", text)
    return Repository(root)


def _sides(tmp_path: Path, *commits: str | None) -> list[Rerun]:
    made = []
    for label, commit in zip("ab", commits, strict=True):
        code = {"commit": commit, "dirty": False, "core": "main"}
        run = write(tmp_path / label, features={"layout": {"processes": 1}}, code=code)
        first, _ = open_sides(str(run), "reference")
        made.append(first)
    return made


def _of(side: Rerun, dirty: bool) -> Rerun:
    return replace(side, dirty=dirty)


def _enter(a: Rerun, b: Rerun, repository: Repository | None = None) -> None:
    with by_their_code(a, b, print, repository):
        pass


def test_a_commit_that_is_not_here_is_named(tmp_path: Path, repository: Repository) -> None:
    a, b = _sides(tmp_path, repository.head(), "0" * 40)
    with pytest.raises(UserError, match=r"the commit of B, 0{40} is no commit of .*git -C .* fetch origin"):
        _enter(a, b, repository)


def test_a_commit_without_probes_is_named(tmp_path: Path, repository: Repository) -> None:
    a, b = _sides(tmp_path, git(repository.root, "rev-parse", "HEAD~1"), repository.head())
    with pytest.raises(UserError, match=r"A is of commit [0-9a-f]{12}, which cannot show what it computes"):
        _enter(a, b, repository)
    assert len(git(repository.root, "worktree", "list").splitlines()) == 1


def test_a_commit_of_another_schema_is_named(tmp_path: Path, repository: Repository) -> None:
    folder = repository.root / "src/lockstep/lab/localise"
    folder.mkdir(parents=True)
    (folder / "worker.py").write_text("")
    ours = (ROOT / "src/lockstep/lab/localise/probes.py").read_text()
    made = []
    for text in (ours.replace(f"\nSCHEMA = {SCHEMA}", "\nSCHEMA = 99"), ours, f"{ours}\n"):
        (folder / "probes.py").write_text(text)
        git(repository.root, "add", "-A")
        git(repository.root, "commit", "-qm", "probes")
        made.append(str(repository.head()))
    a, b = _sides(tmp_path, made[0], made[1])
    _enter(b, replace(b, commit=made[2]), repository)
    message = (
        rf"A is of commit {made[0][:12]}, which cannot .*: its probes are of schema 99, those of this .* of {SCHEMA};"
    )
    with pytest.raises(UserError, match=message + r" `lockstep bisect"):
        _enter(a, b, repository)


def test_uncommitted_changes_of_a_record_are_those_that_are_here(
    tmp_path: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = repository.root / "src/lockstep/lab/localise"
    shutil.copytree(ROOT / "src/lockstep/lab/localise", folder)
    git(repository.root, "add", "-A")
    git(repository.root, "commit", "-qm", "worker")
    a, b = _sides(tmp_path, repository.head(), repository.head())
    monkeypatch.setattr("lockstep.lab.localise.code.tree", lambda: repository.root)
    for dirty, apart in ((True, True), (False, False)):
        here = {"commit": repository.head(), "dirty": dirty, "core": "main"}
        monkeypatch.setattr("lockstep.lab.localise.code.code_version", lambda here=here: here)
        with by_their_code(a, _of(b, True), print) as (one, other):
            assert isinstance(other, Rerun)
            assert ((one.source is not None), other.source) == (apart, None)


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The probes of a clean run and of one whose norms have another epsilon."""
    found: dict[str, Path] = {}
    for key, name in (("clean", None), ("epsilon", "norm epsilon of the module")):
        folder = found[key] = tmp_path_factory.mktemp("probes")
        assert faults.planted(name, faults.job_of(name, folder, found["clean"])) == 0
    return found


def _pass(label: str, folder: Path, commit: str, **facts: Any) -> Pass:
    run = load_probes(folder, RUN)
    told = {**run.facts, "code": {"commit": commit, "dirty": False}, **facts}
    return Pass(label, str(folder), replace(run, facts=told), load_probes(folder, TWIN))


def test_a_setting_that_one_code_does_not_follow_is_a_hint(probed: dict[str, Path]) -> None:
    found = judge((_pass("A", probed["clean"], "a" * 40), _pass("B", probed["epsilon"], "b" * 40)), [1])
    row = found.walked.first
    assert row is not None
    assert (found.verdict, row.stage, row.name) == ("bug", "forward", "decoder.layers.0.input_layernorm")
    assert "B by commit bbbbbbbbbbbb. model.layernorm_epsilon: 1e-05 is asked for" in found.sentence
    assert as_json(found)["sides"]["B"]["code"] == {"commit": "b" * 40, "dirty": False}
    both = judge((_pass("A", probed["epsilon"], "a" * 40), _pass("B", probed["epsilon"], "b" * 40)), [1])
    assert both.verdict == "identical", "what both codes do alike is not their difference"
    one = judge((_pass("A", probed["epsilon"], "a" * 40), _pass("B", probed["epsilon"], "a" * 40)), [1])
    assert one.verdict == "bug", "of one code it is a fault"


def test_a_setting_that_one_code_does_not_know_does_not_act(probed: dict[str, Path]) -> None:
    config = load_probes(probed["clean"], RUN).facts["config"]
    newer = {**config, "model": {**config["model"], "of_tomorrow": False}}
    other = _pass("B", probed["clean"], "b" * 40, config=newer)
    assert judge((_pass("A", probed["clean"], "a" * 40), other), [1]).walked.differences == []


def test_the_verdict_is_no_surer_than_lost_changes_allow(probed: dict[str, Path], tmp_path: Path) -> None:
    a, b = _sides(tmp_path, "a" * 40, "b" * 40)
    same = judge((_pass("A", probed["clean"], "a" * 40), _pass("B", probed["clean"], "b" * 40)), [1])
    assert with_changes(same, a, b) == same
    b = _of(b, True)
    told = with_changes(same, a, b)
    assert told.notes == ["B ran with uncommitted changes on commit bbbbbbbbbbbb, and again without them"]
    assert (told.verdict, told.sentence.endswith("of B, which are in no commit.")) == ("identical", True)
    told = with_changes(replace(same, notes=["B does not repeat itself: ..."]), a, b)
    assert (told.verdict, told.next_step.startswith("Commit the changes")) == ("cannot tell", True)
    apart = judge((_pass("A", probed["clean"], "a" * 40), _pass("B", probed["epsilon"], "b" * 40)), [1])
    told = with_changes(replace(apart, notes=["B does not repeat itself: ..."]), a, b)
    assert (told.verdict, told.sentence.endswith("and can be a further cause.")) == ("bug", True)
    code = {"commit": "b" * 40, "dirty": True}
    here = judge((_pass("A", probed["clean"], "a" * 40), _pass("B", probed["clean"], "b" * 40, code=code)), [1])
    told = with_changes(here, a, b)
    assert told.sentence == here.sentence
    assert told.notes[0].endswith("and again with those that are here now, which can be others")


def test_an_installed_package_has_no_other_code(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lockstep.lab.localise.code.tree", lambda: None)
    a, b = _sides(tmp_path, "1" * 40, "2" * 40)
    with pytest.raises(UserError, match=r"Lockstep runs from an installed package.*--code here"):
        _enter(a, b)


@pytest.mark.parametrize("commits", [("1" * 40, "1" * 40), (None, None)])
def test_one_code_is_that_which_is_here(commits: tuple[str | None, str | None], tmp_path: Path) -> None:
    a, b = _sides(tmp_path, *commits)
    with by_their_code(a, b, print) as sides:
        assert [side.source for side in sides if isinstance(side, Rerun)] == [None, None]


def test_settings_that_other_code_does_not_know_have_their_defaults(tmp_path: Path) -> None:
    source = ROOT / "src"
    config: dict[str, dict[str, Any]] = {"model": {"num_layers": 2}, "peft": {"scheme": None}}
    assert known_settings(config, source, "c0ffee") == config
    with pytest.raises(UserError, match=r"the run has model\.flux = 3, which the Lockstep of c0ffee does not know"):
        known_settings({"model": {"flux": 3}}, source, "c0ffee")
    assert known_settings({"model": {"num_layers": 2, "flux": None}}, source, "c0ffee") == {"model": {"num_layers": 2}}
    (tmp_path / "lockstep").mkdir()
    (tmp_path / "lockstep" / "__init__.py").write_text("import flux")
    with pytest.raises(UserError, match="the Lockstep of c0ffee cannot be imported: ModuleNotFoundError"):
        known_settings(config, tmp_path, "c0ffee")


def test_a_side_that_ran_by_other_code_is_an_error(tmp_path: Path) -> None:
    side = replace(_sides(tmp_path, "1" * 40, None)[0], source=tmp_path)
    verify(side, "A", {"commit": "1" * 40})
    with pytest.raises(UserError, match=r"A was to be run by commit 1{12} and was run by 2{12}"):
        verify(side, "A", {"commit": "2" * 40})


def test_other_code_and_this_code_exclude_each_other(tmp_path: Path, capsys) -> None:
    run = str(write(tmp_path / "a", features={"layout": {"processes": 1}}))
    assert main(["localise", run, "commit:HEAD", "--code", "here"]) == 2
    assert "--code here runs both by this" in capsys.readouterr().err
    assert main(["localise", "commit:HEAD", run]) == 2
    assert "needs a run beside it" in capsys.readouterr().err
