from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import kvxform.atomic as atomic
from kvxform.atomic import atomic_folder, safe_join, write_atomically
from kvxform.errors import ArtifactError

FILES = 5

WRITER = """
import sys
import kvxform.atomic as atomic

if sys.argv[2] == "no_exchange":
    atomic._exchange = lambda first, second: False
version = 0
print("ready", flush=True)
while True:
    version += 1
    with atomic.atomic_folder(sys.argv[1]) as folder:
        (folder / "checksums.json").write_text(str(version))
        for n in range(5):
            (folder / f"{n}.txt").write_text(str(version) * 2000)
"""


def write_output(path, text) -> None:
    with atomic_folder(path) as folder:
        (folder / "checksums.json").write_text(text)


def assert_whole(path) -> str:
    """All files must come from the same version."""
    version = (path / "checksums.json").read_text()
    assert sorted(os.listdir(path)) == [*(f"{n}.txt" for n in range(FILES)), "checksums.json"]
    for n in range(FILES):
        assert (path / f"{n}.txt").read_text() == version * 2000
    return version


def kill_writer(path, how: str, delay: float) -> None:
    command = [sys.executable, "-c", WRITER, str(path), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture
def no_exchange(monkeypatch):
    """Behave as on a system without renameat2."""
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)


def test_a_new_folder_appears_whole(tmp_path):
    target = tmp_path / "a" / "out"
    with atomic_folder(target) as folder:
        (folder / "x").write_text("1")
        assert not target.exists()
    assert os.listdir(target) == ["x"]
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("how", ["exchange", "no_exchange"])
def test_an_old_output_is_replaced_and_nothing_is_left_over(tmp_path, how, request):
    if how == "no_exchange":
        request.getfixturevalue(how)
    target = tmp_path / "out"
    write_output(target, "1")
    (target / "left_by_version_1").touch()
    write_output(target, "2")
    assert os.listdir(target) == ["checksums.json"]
    assert (target / "checksums.json").read_text() == "2"
    assert os.listdir(tmp_path) == ["out"]


def test_an_error_leaves_the_old_folder(tmp_path):
    target = tmp_path / "out"
    write_output(target, "1")
    with pytest.raises(TypeError):
        write_output(target, 2)  # fails once the file is open
    assert (target / "checksums.json").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_second_rename_is_taken_back(tmp_path, no_exchange, monkeypatch):
    target = tmp_path / "out"
    write_output(target, "1")
    rename = type(target).rename

    def fail_for_new(self, other):
        if ".new-" in self.name:
            raise OSError("disk on fire")
        return rename(self, other)

    monkeypatch.setattr(type(target), "rename", fail_for_new)
    with pytest.raises(OSError, match="on fire"):
        write_output(target, "2")
    assert (target / "checksums.json").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    write_output(tmp_path / "out", "1")
    assert (tmp_path / "out" / "checksums.json").read_text() == "1"


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    write_output(tmp_path / "real", "1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_output(tmp_path / "link", "2")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "checksums.json").read_text() == "2"


def test_a_folder_of_somebody_else_is_refused_before_any_work(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ArtifactError, match="KVX601 an output folder must be new, empty"):
        write_output(tmp_path, "1")
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"KVX601 .* Hint: choose another folder"):
        write_output(tmp_path / "file", "1")
    assert sorted(os.listdir(tmp_path)) == ["file", "thesis.tex"]


def test_a_folder_that_fills_up_meanwhile_is_left_alone(tmp_path):
    target = tmp_path / "out"
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(ArtifactError, match="KVX601"))
        stack.enter_context(atomic_folder(target))
        target.mkdir()
        (target / "thesis.tex").touch()
    assert os.listdir(target) == ["thesis.tex"]


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    target = tmp_path / "out"
    (tmp_path / ".out.new-0000dead").mkdir()
    (tmp_path / ".other.new-0000dead").mkdir()
    with atomic_folder(target) as alive:
        write_output(target, "inner")
        assert alive.exists()
        (alive / "checksums.json").write_text("outer")
    assert sorted(os.listdir(tmp_path)) == [".other.new-0000dead", "out"]
    assert (target / "checksums.json").read_text() == "outer"


def test_an_old_folder_that_was_set_aside_comes_back(tmp_path):
    write_output(tmp_path / ".out.old-0000dead", "1")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out"):
        raise ZeroDivisionError
    assert (tmp_path / "out" / "checksums.json").read_text() == "1"


@pytest.mark.parametrize("how", ["exchange", "no_exchange"])
def test_sigkill_at_any_moment_leaves_a_whole_folder_or_none(tmp_path, how):
    target = tmp_path / "out"
    delays = random.Random(0)
    seen = set()
    for _ in range(20):
        kill_writer(target, how, delays.uniform(0, 0.06))
        if target.exists():
            seen.add(assert_whole(target))
    assert len(seen) > 1, "every run was killed before it had written anything"
    write_output(target, "after")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["a", "a/b.txt", "kernels/layer 0.py", "ä.txt"])
def test_paths_inside_are_joined(tmp_path, name):
    assert safe_join(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/../../x", "a/../b", "/etc/passwd", "a//b", "a\\b", "a\0b", "a/"],
)
def test_paths_that_leave_or_are_odd_are_refused(tmp_path, name):
    with pytest.raises(ArtifactError, match="KVX603"):
        safe_join(tmp_path, name)


def test_links_out_of_the_folder_are_refused(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "inside").touch()
    (folder / "good").symlink_to("inside")
    (folder / "bad").symlink_to("/etc")
    assert safe_join(folder, "good").exists()
    with pytest.raises(ArtifactError, match="KVX603"):
        safe_join(folder, "bad/passwd")


def test_one_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_atomically(path, b"1")
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, b"2")
    assert path.read_bytes() == b"1"
    assert os.listdir(tmp_path) == ["x"]
