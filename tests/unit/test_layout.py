"""The layout of docs/adr/0001-layout.md: listed packages, committed links, names that match."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAPPED = {"kvxform.passes": "passes", "kvxform.codegen": "codegen"}


@pytest.fixture(scope="module")
def setuptools_table() -> dict:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["tool"]["setuptools"]


def packages_on_disk() -> set[str]:
    found = set()
    for init in (ROOT / "kvxform").glob("**/__init__.py"):
        parts = init.parent.relative_to(ROOT).parts
        if ".".join(parts[:2]) not in MAPPED:  # glob may or may not follow the links
            found.add(".".join(parts))
    for package, folder in MAPPED.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    return found


def test_every_package_on_disk_is_listed_and_the_other_way_round(setuptools_table):
    assert packages_on_disk() == set(setuptools_table["packages"])


def test_no_package_is_listed_twice(setuptools_table):
    packages = setuptools_table["packages"]
    assert len(packages) == len(set(packages))


def test_every_folder_with_python_files_is_a_package():
    for top in ("kvxform", *MAPPED.values()):
        for path in (ROOT / top).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} lacks __init__.py"


def test_the_folders_are_mapped(setuptools_table):
    assert setuptools_table["package-dir"] == {"kvxform": "kvxform", **MAPPED}


@pytest.mark.xfail(sys.platform == "win32", reason="git may check links out as files", strict=False)
@pytest.mark.parametrize("name", ["passes", "codegen"])
def test_the_links_lead_to_the_top_level_folders(name):
    link = ROOT / "kvxform" / name
    cure = "run: git config core.symlinks true && git checkout -- kvxform"
    assert link.is_symlink(), f"{link} is not a link; {cure}"
    assert link.readlink() == Path("..", name), f"the link must be relative; {cure}"
    assert link.resolve() == ROOT / name, f"{link} leads elsewhere; {cure}"


def test_a_module_has_one_name():
    import kvxform.codegen
    import kvxform.passes

    assert "passes" not in sys.modules
    assert "codegen" not in sys.modules
    assert kvxform.passes.__name__ == "kvxform.passes"
    assert kvxform.codegen.__name__ == "kvxform.codegen"
