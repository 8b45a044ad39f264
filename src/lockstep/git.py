"""The few things that are asked of git: revisions, files of a commit, and worktrees beside the user's."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lockstep.errors import UserError

REDIRECTING = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY")
"""Variables with which a hook of git would send these commands to another repository."""


def environment() -> dict[str, str]:
    """Return the variables git runs with: messages untranslated, no prompt, no index rewritten by a mere look."""
    kept = {name: value for name, value in os.environ.items() if name not in REDIRECTING}
    return kept | {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}


@dataclass(frozen=True)
class Commit:
    """A commit: hashes, the author's date as ISO 8601, the first line of its message."""

    hash: str
    tree: str
    date: str
    subject: str

    @property
    def short(self) -> str:
        """The first 12 digits of the hash."""
        return self.hash[:12]


@dataclass(frozen=True)
class Repository:
    """A repository by a folder of one of its worktrees. No command runs the repository's hooks."""

    root: Path

    @classmethod
    def at(cls, folder: Path) -> "Repository":
        """Return the repository whose worktree holds ``folder``.

        Raises:
            UserError: there is none, or no git.
        """
        try:
            top = cls(folder).ask("rev-parse", "--show-toplevel")
        except UserError:
            top = None
            if not folder.is_dir():
                raise UserError(f"{folder} is no folder; name the root of a clone") from None
        if not top:
            raise UserError(f"{folder} is not in the worktree of a git repository; name the root of a clone")
        return cls(Path(top))

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run git and return how it ended.

        Raises:
            UserError: git is not installed.
        """
        command = ["git", "-C", str(self.root), "-c", "core.hooksPath=/dev/null", "-c", "gc.auto=0", *words]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, errors="replace", env=environment(), check=False
            )
        except FileNotFoundError:
            raise UserError("git is not on PATH; install it") from None

    def ask(self, *words: str) -> str | None:
        """Return what git prints, or None where it fails."""
        done = self.run(*words)
        return done.stdout.strip() if done.returncode == 0 else None

    def do(self, *words: str) -> str:
        """Return what git prints.

        Raises:
            UserError: git fails, with its message.
        """
        done = self.run(*words)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UserError(f"git {' '.join(words)} failed in {self.root}: {said[-1]}")
        return done.stdout.strip()

    def commit(self, revision: str, option: str = "") -> Commit:
        """Return the commit that a revision names; ``option`` is what the user gave it to.

        Raises:
            UserError: no such commit in this clone.
        """
        named = f"{option} {revision}" if option else revision
        found = self.ask("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
        if found is None:
            raise UserError(f"{named} is no commit of {self.root}; {self.remedy(revision)}")
        text = self.do("show", "--no-patch", "--format=%H%x00%T%x00%aI%x00%s", found)
        return Commit(*text.split("\0"))

    def remedy(self, revision: str) -> str:
        """Return how to get a commit that the clone lacks."""
        if self.ask("rev-parse", "--is-shallow-repository") == "true":
            return f"the clone is shallow: `git -C {self.root} fetch --unshallow` brings its history"
        return f"`git -C {self.root} fetch origin {revision}` brings a commit that the clone lacks"

    def file(self, commit: str, path: str) -> str | None:
        """Return the text of a file in a commit, or None where the commit has no such file."""
        done = self.run("show", f"{commit}:{path}")
        return done.stdout if done.returncode == 0 else None

    def dirty(self) -> bool:
        """Tell whether tracked files are changed."""
        return bool(self.do("status", "--porcelain", "--untracked-files=no"))

    def head(self) -> str | None:
        """Return the hash of the commit that is checked out; None before the first commit."""
        return self.ask("rev-parse", "--verify", "--quiet", "HEAD")

    def add_worktree(self, folder: Path, commit: str, *, files: bool = True) -> "Repository":
        """Check a commit out in a new folder, detached; without its files where only the state of git is wanted.

        Raises:
            UserError: git cannot.
        """
        self.do("worktree", "add", "--quiet", "--detach", *([] if files else ["--no-checkout"]), str(folder), commit)
        return Repository(folder)

    def remove_worktree(self, folder: Path) -> None:
        """Remove a worktree with whatever is in it, and forget it; nothing where there is none.

        Not by ``git worktree prune``: that would forget the user's own that lie on a disk that is away just now.
        """
        self.run("worktree", "remove", "--force", "--force", str(folder))
        shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def worktree(self, folder: Path, commit: str, *, files: bool = True) -> Iterator["Repository"]:
        """Check a commit out in a new folder for the time of a ``with`` block."""
        try:
            yield self.add_worktree(folder, commit, files=files)
        finally:
            self.remove_worktree(folder)
