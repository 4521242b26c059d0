from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

TEXT = "%0 = a\n%1 = b\n"
CASES = f"""
import pytest

@pytest.mark.parametrize("name", ["same", "differs", "no_last_line_break", "missing"])
def test_case(golden, name):
    golden(f"simplify/{{name}}.before.txt", {TEXT!r})
"""


@pytest.fixture
def project(pytester, monkeypatch):
    """A project of four tests that use the golden fixture, outside CI."""
    monkeypatch.delenv("CI", raising=False)
    pytester.makeconftest((Path(__file__).parents[1] / "conftest.py").read_text())
    pytester.makepyfile(CASES)
    return pytester


def folder(project) -> Path:
    return project.path / "golden" / "simplify"


def test_the_whole_text_is_compared_and_a_difference_is_shown(project):
    folder(project).mkdir(parents=True)
    (folder(project) / "same.before.txt").write_text(TEXT)
    (folder(project) / "differs.before.txt").write_text("%0 = a\n%1 = c\n")
    (folder(project) / "no_last_line_break.before.txt").write_text(TEXT.rstrip())
    result = project.runpytest_inprocess()
    result.assert_outcomes(passed=1, failed=3)
    result.stdout.fnmatch_lines(["*differs.before.txt differs*", "*-%1 = c", "*+%1 = b"])
    assert not (folder(project) / "missing.before.txt").exists()


def test_update_writes_what_the_tests_give(project):
    project.runpytest_inprocess("--update-golden").assert_outcomes(passed=4)
    assert len(list(folder(project).iterdir())) == 4
    assert (folder(project) / "missing.before.txt").read_text() == TEXT


def test_nothing_is_updated_in_ci(project, monkeypatch):
    monkeypatch.setenv("CI", "true")
    result = project.runpytest_inprocess("--update-golden")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert not folder(project).exists()
