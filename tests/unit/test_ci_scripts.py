"""The scripts and files of the CI kit, without building anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / "examples" / "ci"
STAND_IN = """#!{python}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
for word in sys.argv:
    if word.startswith("body=@"):
        with open(word[6:]) as body, open(os.environ["CALLS"] + ".body", "w") as kept:
            kept.write(body.read())
print(os.environ.get("ANSWER", ""))
sys.exit(int(os.environ.get("STATUS", "0")))
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Return `call(script, *words, **environment)`: exit code, stderr, and the calls it made."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for name in ("kvxform", "gh"):
        (folder / name).write_text(STAND_IN.format(python=sys.executable))
        (folder / name).chmod(0o755)
    repository = tmp_path / "repository"
    repository.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    monkeypatch.chdir(repository)

    def run(script: str, *words: str, **environment: str):
        calls.unlink(missing_ok=True)
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(KIT / script), *words],
            env={**os.environ, "PATH": path, "CALLS": str(calls), **environment},
            capture_output=True,
            text=True,
        )
        made = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, done.stderr, [json.loads(line) for line in made]

    return run


def track(name: str, text: str) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    subprocess.run(["git", "add", name], check=True)


LOCK = '{\n "kvxform_lock": 1\n}\n'


def test_all_tracked_locks_of_kvxform_are_checked(call):
    track("kvxform.lock", LOCK)
    track("sub folder/small.lock", LOCK)
    track("poetry.lock", "[[package]]\n")
    Path("untracked.lock").write_text(LOCK)
    code, _, (words,) = call("check_locks.sh", "out", BASE="origin/main")
    outs = [word for name in ("md", "xml", "sarif") for word in ("--out", f"out/kvxform.{name}")]
    locks = ["kvxform.lock", "sub folder/small.lock"]
    assert (code, words) == (0, ["check", *locks, *outs, "--base", "origin/main"])


def test_named_locks_and_the_exit_code(call):
    code, _, (words,) = call("check_locks.sh", LOCKS="a.lock b.lock", STATUS="1")
    assert (code, words[:4]) == (1, ["check", "a.lock", "b.lock", "--out"])
    assert "--base" not in words


def test_a_repository_without_locks_is_told_how_to_make_one(call):
    track("poetry.lock", "[[package]]\n")
    code, said, calls = call("check_locks.sh")
    assert (code, calls) == (2, [])
    assert "kvxform lock" in said


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("", ["api", "--silent", "repos/o/r/issues/7/comments"]),
        ("41\n42", ["api", "--silent", "-X", "PATCH", "repos/o/r/issues/comments/41"]),
    ],
)
def test_a_comment_is_written_once_and_then_replaced(call, tmp_path, answer, words):
    Path("answer.md").write_text("### fine `x` $HOME\n")
    there = {"GITHUB_REPOSITORY": "o/r", "PR_NUMBER": "7", "ANSWER": answer}
    code, _, calls = call("post_comment.sh", "answer.md", **there)
    assert code == 0
    assert calls[0][:3] == ["api", "--paginate", "repos/o/r/issues/7/comments"]
    assert calls[1][: len(words)] == words
    body = (tmp_path / "calls.body").read_text()
    assert body == "<!-- kvxform -->\n### fine `x` $HOME\n"


def test_the_action_runs_scripts_that_are_there():
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    text = "\n".join(step["run"] for step in action["runs"]["steps"])
    for name in ("check_locks.sh", "post_comment.sh"):
        assert f"$GITHUB_ACTION_PATH/examples/ci/{name}" in text
        assert os.access(KIT / name, os.X_OK)
    for step in action["runs"]["steps"]:  # what others write reaches a shell by its environment
        assert "${{" not in step["run"]
        assert step["shell"] == "bash"


def test_the_hooks_call_a_verb_that_is_there():
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert {hook["entry"] for hook in hooks} == {"kvxform check"}
    assert {hook["language"] for hook in hooks} == {"system"}
