"""Set-up and gate: pip's settings for uv, messages of a set-up that cannot go on, the checks of docs and tests."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_script(path: str) -> ModuleType:
    """Import a script of the repository by path."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    return load_script("scripts/setup/bootstrap.py")


@pytest.fixture(scope="module")
def check_docs() -> ModuleType:
    return load_script("scripts/check_docs.py")


def test_pip_settings_become_uv_settings(bootstrap: ModuleType) -> None:
    listing = "\n".join(
        [
            ":env:.find-links='/from/environment'",
            "global.find-links='/from/file'",
            "global.extra-index-url='file:///a\\nfile:///b'",
            "global.timeout='60'",
        ]
    )
    settings = bootstrap.uv_settings(bootstrap.parse_pip_config(listing), {})
    assert settings == {
        "UV_FIND_LINKS": "/from/environment",
        "UV_INDEX": "file:///a file:///b",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


def test_several_find_links_are_separated_as_uv_reads_them(bootstrap: ModuleType) -> None:
    assert bootstrap.uv_settings({"find-links": "/a /b"}, {}) == {"UV_FIND_LINKS": "/a,/b"}


def test_what_the_user_set_for_uv_stays(bootstrap: ModuleType) -> None:
    pip = {"find-links": "/a", "extra-index-url": "file:///a"}
    environ = {"UV_FIND_LINKS": "/mine", "UV_INDEX_STRATEGY": "first-index"}
    assert bootstrap.uv_settings(pip, environ) == {"UV_INDEX": "file:///a", "UV_INDEX_STRATEGY": "first-index"}


def test_this_interpreter_can_be_used_and_a_missing_one_cannot(bootstrap: ModuleType) -> None:
    assert bootstrap.can_use(sys.executable)
    assert not bootstrap.can_use("/no/such/python3")


def test_too_old_a_python_is_one_message(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bootstrap.py"])
    monkeypatch.setattr(bootstrap, "can_use", lambda python: False)
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or later; .*make PYTHON="):
        bootstrap.main()


def test_missing_venv_is_one_message(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "--no-uv"])
    monkeypatch.setattr(bootstrap, "has_modules", lambda python, *names: False)
    with pytest.raises(SystemExit, match=r"install its venv package .* or install uv"):
        bootstrap.main()


def test_an_environment_without_pip_is_made_anew_where_there_is_no_uv(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(bootstrap, "can_use", lambda python: True)
    monkeypatch.setattr(bootstrap, "run", lambda command, environ: ran.append(command))
    for pip, first in ((False, "venv"), (True, "pip")):
        ran.clear()
        monkeypatch.setattr(bootstrap, "has_modules", lambda python, *names, pip=pip: pip)
        bootstrap.install(tmp_path, "python3", None, "dev")
        assert ran[0][1:3] == ["-m", first]


def test_make_setup_does_nothing_when_up_to_date(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "scripts/setup/bootstrap.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.set-up").touch()

    def needs_work() -> bool:
        return subprocess.run(["make", "--question", "setup"], cwd=tmp_path, check=False).returncode == 1

    assert not needs_work()
    os.utime(tmp_path / "constraints.txt", (2**31, 2**31))
    assert needs_work()


PAGE = """# Title

See [the guide](docs/guide.md#first-part), `src/real.py`, `make test`, `lockstep data prepare`.

```console
$ python src/real.py && lockstep compare a/b c/d
$ ls src/*.py runs/mine
```
"""


@pytest.fixture
def small_repository(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/guide.md").write_text("# Guide\n\n## First part\n")
    (tmp_path / "src").mkdir()
    (tmp_path / "src/real.py").touch()
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "CONTRIBUTING.md").touch()
    return tmp_path


def docs_problems(check_docs: ModuleType, root: Path) -> list[str]:
    files = frozenset({"src/real.py", "docs/guide.md", "README.md"})
    subcommands = {"compare": frozenset[str](), "data": frozenset({"prepare"})}
    return check_docs.problems(root, check_docs.Known(root, files, frozenset({"test"}), subcommands))


def test_docs_that_name_what_exists_pass(check_docs: ModuleType, small_repository: Path) -> None:
    assert docs_problems(check_docs, small_repository) == []


@pytest.mark.parametrize(
    ("planted", "problem"),
    [
        ("`src/gone.py`", "src/gone.py does not exist"),
        ("`benchmark/gone.py`", "benchmark/gone.py does not exist"),
        ("```\npython ./src/gone.py --x=1\n```", "src/gone.py does not exist"),
        ("`src/*.toml`", "src/*.toml does not exist"),
        ("[x](docs/gone.md)", "link to docs/gone.md, which does not exist"),
        ("[x](docs/guide.md#second-part)", "guide.md has no such heading"),
        ("`make tset`", "make tset: the Makefile has no such target"),
        ("```\n$ make tset\n```", "make tset: the Makefile has no such target"),
        ("`lockstep comprae A B`", "lockstep comprae: no such subcommand"),
        ("`lockstep data prepaer x`", "lockstep data prepaer: no such subcommand"),
        ("`.venv/bin/lockstep comprae`", "lockstep comprae: no such subcommand"),
    ],
)
def test_a_planted_mistake_in_the_docs_is_found(
    check_docs: ModuleType, small_repository: Path, planted: str, problem: str
) -> None:
    (small_repository / "docs/guide.md").write_text(f"# Guide\n\n## First part\n\n{planted}\n".replace("](docs/", "]("))
    found = docs_problems(check_docs, small_repository)
    assert len(found) == 1
    assert found[0].startswith("docs/guide.md:")
    assert found[0].endswith(problem.replace("link to docs/", "link to "))


def test_a_test_file_that_collects_nothing_is_found(tmp_path: Path) -> None:
    (tmp_path / "test_good.py").write_text("def test_one(): pass\n")
    (tmp_path / "test_empty.py").write_text("def tset_one(): pass\n")
    (tmp_path / "good_tests.py").write_text("class Helper:\n    def test_two(self): pass\n")
    script = load_script("scripts/check_tests.py")
    names = [path.name for path in script.uncollected(tmp_path)]
    assert names == ["good_tests.py", "test_empty.py"]
