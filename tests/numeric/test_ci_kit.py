"""The CI kit from end to end: a branch that changes a recipe gets a comment with the change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvxform.cli.main import main
from kvxform.locks import building

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / "examples" / "ci"
PAGE = ROOT / "docs" / "ci.md"
FENCE = "````"


def git(*words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, *words], check=True, capture_output=True, text=True)
    return done.stdout


def check(**environment: str) -> tuple[int, str]:
    """Run the script of the kit; return its exit code and the Markdown."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = ["bash", str(KIT / "check_locks.sh"), "ci-out"]
    done = subprocess.run(script, env={**os.environ, "PATH": path, **environment}, check=False)
    return done.returncode, Path("ci-out/kvxform.md").read_text("utf-8")


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A git repository with a model, a recipe and their lock on branch main."""
    for name in ("model.py", "recipe.yaml"):
        shutil.copy(KIT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    git("init", "-q", "-b", "main")
    assert main(["lock", "model.py:make_model", "-r", "recipe.yaml"]) == 0
    Path(".gitignore").write_text("ci-out/\n__pycache__/\n")
    git("add", ".")
    git("commit", "-qm", "A model, a recipe and their lock")
    git("checkout", "-qb", "fewer-bits")
    return tmp_path


@pytest.mark.slow
def test_a_branch_that_changes_a_recipe_gets_a_comment(project, request):
    assert check(BASE="main")[0] == 0  # nothing has changed yet

    recipe = project / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("value: {codec: int, bits: 4", VALUES_IN_2_BITS))
    git("commit", "-qam", "Values in 2 bits, the first 4 and last 32 tokens exact")
    code, comment = check(BASE="main")
    assert code == 1
    assert "❌ out of date" in comment
    assert "values: codec.bits 4 -> 2" in comment
    assert "kvxform check --update" in comment

    assert main(["check", "kvxform.lock", "--update"]) == 0
    git("commit", "-qam", "Update the lock")
    code, comment = check(BASE="main")
    assert code == 0
    assert "⚠️ changed" in comment
    assert "out of date" not in comment
    if request.config.getoption("--update-golden"):
        write_example(comment)
    assert example() == comment

    code, comment = check()  # without a base, an updated lock is just right
    assert code == 0
    assert "the lock is the same" in comment
    assert git("status", "--porcelain") == ""


VALUES_IN_2_BITS = "value: {codec: int, bits: 2"


def example() -> str:
    """Return the comment that docs/ci.md shows."""
    return PAGE.read_text("utf-8").partition(f"{FENCE}markdown\n")[2].partition(FENCE)[0]


def write_example(comment: str) -> None:
    before, start, rest = PAGE.read_text("utf-8").partition(f"{FENCE}markdown\n")
    after = rest.partition(FENCE)[2]
    PAGE.write_text(f"{before}{start}{comment}{FENCE}{after}", "utf-8")


@pytest.mark.slow
def test_locks_are_the_same_text_in_other_processes_and_with_other_threads(tmp_path):
    made = []
    for threads in ("1", "2"):
        out = tmp_path / f"{threads}.lock"
        subprocess.run(
            [str(Path(sys.executable).parent / "kvxform"), *LOCK_WORDS, "-o", str(out)],
            env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            check=True,
        )
        made.append(out.read_text())
    assert made[0] == made[1]


LOCK_WORDS = ("lock", str(KIT / "model.py:make_model"), "-r", "kv4")


@pytest.fixture
def captured_once(monkeypatch):
    """Capture the model of the kit once, however often it is built."""
    captured = building.capture(str(KIT / "model.py:make_model"))
    monkeypatch.setattr(building, "capture", lambda source, **_: captured)


def test_a_lock_names_its_build_by_relative_paths(tmp_path, monkeypatch, capsys, captured_once):
    for name in ("model.py", "recipe.yaml"):
        shutil.copy(KIT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    lock = ["lock", "model.py:make_model", "-r", "recipe.yaml", "--verify", "none"]
    assert main([*lock, "-o", "locks/a.lock"]) == 0
    text = Path("locks/a.lock").read_text()
    assert '"source": "../model.py:make_model", "recipe": "../recipe.yaml"' in text
    assert str(tmp_path) not in text

    other = tmp_path / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    assert main(["check", "../locks/a.lock"]) == 0
    assert capsys.readouterr().out.startswith("same ")

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("bits: 4, axis: token}", "bits: 8, axis: token}"))
    assert main(["check", "../locks/a.lock", "../none.lock", "-o", "a.md", "-o", "a.xml"]) == 2
    said = capsys.readouterr().out
    assert "out of date  ../locks/a.lock" in said
    assert "codec.bits 4 -> 8" in said
    assert "KVX610" in said
    assert "codec.bits 4 -> 8" in Path("a.md").read_text()
    assert 'errors="1"' in Path("a.xml").read_text()

    assert main(["check", "../locks/a.lock", "--update"]) == 0
    assert Path("../locks/a.lock").read_text() != text
    recipe.write_text("version: 1\nname: broken\npasses: [rotate-x]\n")
    assert main(["check", "../locks/a.lock"]) == 2
    assert "KVX104" in capsys.readouterr().out
