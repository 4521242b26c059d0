"""Checks of lock files: what they find, what they write, and what readers are shown."""

from __future__ import annotations

import json
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from cached import cached_program

import kvxform
from kvxform.errors import KvxformError
from kvxform.locks.building import make_build, resolve_path, resolve_source
from kvxform.locks.files import read_lock, write_lock
from kvxform.locks.making import make_lock
from kvxform.locks.records import Build
from kvxform.locks.rendering import render_checks
from kvxform.locks.runs import Checked, check_files
from kvxform.runtime.model import OptimizedModel


def int_codec(bits: int) -> dict[str, object]:
    return {"codec": "int", "bits": bits, "axis": "token"}


def artifact(name: str, bits: int) -> str:
    quantize = {"key": int_codec(bits), "value": int_codec(4)}
    OptimizedModel(cached_program(quantize, layers=1)).save(name)
    return name


@pytest.fixture
def locked(tmp_path, monkeypatch) -> str:
    """Return the lock of an artifact in `build`, both in the working directory."""
    monkeypatch.chdir(tmp_path)
    build = make_build(artifact("build", 4), None, Path("locks"))
    write_lock(make_lock(kvxform.load("build"), build=build), "locks/a.lock")
    return "locks/a.lock"


def git(*words: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *words], check=True, capture_output=True)


def test_an_artifact_is_checked_where_its_lock_says(locked, monkeypatch):
    (same,) = check_files([locked], progress=False)
    assert (same.exit_code, same.error) == (0, "")
    assert same.result is not None
    assert same.result.b.name == "build"
    monkeypatch.chdir("locks")
    assert [c.exit_code for c in check_files(["a.lock"], progress=False)] == [0]


def test_another_source_can_be_checked(locked):
    (other,) = check_files([locked], source=artifact("other", 3), progress=False)
    assert other.exit_code == 1
    assert other.result is not None
    assert other.result.plan[0].field == "codec.bits"


def test_update_writes_what_differs_and_leaves_what_agrees(locked):
    edited = Path(locked).read_text() + "\n"  # the same lock in other bytes
    Path(locked).write_text(edited)
    (same,) = check_files([locked], update=True, progress=False)
    assert (same.updated, Path(locked).read_text()) == (False, edited)
    artifact("build", 3)
    (changed,) = check_files([locked], update=True, progress=False)
    assert (changed.updated, changed.exit_code) == (True, 0)
    assert read_lock(locked).build == Build("../build")
    assert check_files([locked], progress=False)[0].exit_code == 0


def test_a_lock_that_cannot_be_built_does_not_stop_the_others(locked):
    write_lock(make_lock(kvxform.load("build")), "no-build.lock")
    write_lock(make_lock(kvxform.load("build"), build=Build("gone.gguf", "kv4")), "gone.lock")
    names = ["none.lock", "no-build.lock", "gone.lock", locked]
    checks = check_files(names, progress=False)
    assert [check.exit_code for check in checks] == [2, 2, 2, 0]
    assert [check.error[:6] for check in checks] == ["KVX610", "KVX613", "KVX301", ""]


@pytest.mark.slow
def test_processes_give_the_same_answers_in_order(locked):
    Path("locks/b.lock").write_text(Path(locked).read_text())
    names = [locked, "none.lock", "locks/b.lock"]
    assert check_files(names, jobs=2) == check_files(names, progress=False)


def test_a_base_shows_what_changed_though_the_lock_is_right(locked):
    git("init", "-q", "-b", "main")
    git("add", "locks")
    git("commit", "-qm", "lock")
    artifact("build", 3)
    (stale,) = check_files([locked], base="main", progress=False)
    (updated,) = check_files([locked], base="main", update=True, progress=False)
    (changed,) = check_files([locked], base="main", progress=False)
    assert [c.exit_code for c in (stale, updated, changed)] == [1, 0, 0]
    assert changed.shown is not None
    assert changed.shown.plan[0].after == "3"
    assert changed.shown.a.name == "locks/a.lock at main"
    Path("new.lock").write_text(Path(locked).read_text().replace("../build", "build"))
    (new,) = check_files(["new.lock"], base="main", progress=False)
    assert (new.is_new, new.exit_code) == (True, 0)
    heads = [render_checks([c], "markdown").splitlines()[0] for c in (stale, updated, changed, new)]
    assert heads == [
        "### ❌ kvxform: the lock is out of date",
        "### ⚠️ kvxform: the lock was updated",
        "### ⚠️ kvxform: the lock changed",
        "### ⚠️ kvxform: the lock is new",
    ]
    (unknown,) = check_files([locked], base="nowhere", progress=False)
    assert unknown.error.startswith("KVX614")


def test_every_form_of_several_answers(locked):
    Path("locks/b.lock").write_text(Path(locked).read_text())
    good = check_files([locked], progress=False)
    artifact("build", 3)
    checks = [*good, *check_files(["locks/b.lock", "none.lock"], progress=False)]
    text = render_checks(checks, "text")
    assert text.startswith("same         locks/a.lock")
    assert text.endswith("1 cannot be built, 1 is out of date, 1 is the same")
    data = json.loads(render_checks(checks, "json"))["locks"]
    assert [entry["exit_code"] for entry in data] == [0, 1, 2]
    markdown = render_checks(checks, "markdown")
    assert markdown.startswith("### ❌ kvxform: 1 cannot be built, 1 is out of date")
    assert "locks/a.lock" not in markdown
    suites = ElementTree.fromstring(render_checks(checks, "junit"))
    assert int(suites.get("failures", "0")) >= 1
    assert suites.get("errors") == "1"
    runs = json.loads(render_checks(checks, "sarif"))["runs"]
    ids = [run["automationDetails"]["id"] for run in runs]
    assert ids == ["kvxform/locks/a.lock/", "kvxform/locks/b.lock/"]
    assert render_checks(checks[:1], "html").startswith("<!")
    with pytest.raises(KvxformError, match="KVX801"):
        render_checks(checks, "html")


def test_markdown_cells_are_escaped_and_a_long_comment_is_cut(locked):
    (same,) = check_files([locked], progress=False)
    broken = Checked("x.lock", None, "KVX301 | a *b* <c>\nnext")
    assert "KVX301 \\| a \\*b\\* \\<c\\> next" in render_checks([broken], "markdown")
    artifact("build", 3)
    (other,) = check_files([locked], progress=False)
    comment = render_checks([other] * 60 + [same], "markdown")
    assert len(comment) < 65_536
    assert "too long for a comment" in comment


def test_paths_of_a_lock_are_relative_to_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("m.py").touch()
    build = make_build("m.py:make", "r.yaml", Path("a/b"), calibration=Path("t.txt"))
    paths = (build.source, build.recipe, build.calibration)
    assert paths == ("../../m.py:make", "../../r.yaml", "../../t.txt")
    assert resolve_source(build.source, Path("a/b")) == "m.py:make"
    assert resolve_path(build.recipe, Path("a/b")) == "r.yaml"
    named = make_build("smollm2-135m", "kv4", Path("a"))
    assert (named.source, named.recipe) == ("smollm2-135m", "kv4")
    for source, recipe in (("m.py:make", None), (artifact("build", 4), "kv4")):
        with pytest.raises(KvxformError, match="KVX801"):
            make_build(source, recipe, Path())
