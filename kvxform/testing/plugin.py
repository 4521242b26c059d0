"""The pytest plug-in: fixtures for tests of models, passes and graphs.

It costs a test suite that does not use it nothing: torch is imported by the first fixture.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kvxform.differ.sides import SideLike
    from kvxform.ir.program import Program
    from kvxform.runtime.model import OptimizedModel
    from kvxform.verify.results import Verification

FOLDER = "snapshots"
WRITTEN = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--kvx-update`."""
    parser.getgroup("kvxform").addoption(
        "--kvx-update", action="store_true", help="write snapshots of graphs; refused in CI"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to write snapshots in CI."""
    if config.getoption("--kvx-update") and os.environ.get("CI"):
        raise pytest.UsageError("--kvx-update is refused in CI: review snapshots locally")
    config.stash[WRITTEN] = []


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Name the snapshots that were written."""
    for name in config.stash[WRITTEN]:
        terminalreporter.write_line(f"kvxform: wrote {name}")


@pytest.fixture
def assert_graph_snapshot(request: pytest.FixtureRequest) -> Callable[[SideLike, str], None]:
    """Return `check(program, name)`: the graph is that of `snapshots/<test file>/<name>.json`."""
    from kvxform.testing.snapshots import assert_graph_snapshot as check_file

    test = Path(request.path)
    update = bool(request.config.getoption("--kvx-update"))

    def check(program: SideLike, name: str) -> None:
        __tracebackhide__ = True
        path = test.parent / FOLDER / test.stem / f"{name}.json"
        if check_file(program, path, update=update):
            shown = path.relative_to(test.parent).as_posix()
            request.config.stash[WRITTEN].append(f"{test.parent.name}/{shown}")

    return check


@pytest.fixture(scope="session")
def assert_equivalent() -> Callable[..., None]:
    """Return `kvxform.testing.assert_equivalent`."""
    from kvxform.testing.equivalence import assert_equivalent as check

    return check


@pytest.fixture(scope="session")
def assert_cache_state() -> Callable[..., Verification]:
    """Return `kvxform.testing.assert_cache_state`."""
    from kvxform.testing.cache_states import assert_cache_state as check

    return check


@pytest.fixture(scope="session")
def kvx_program() -> Callable[..., Program]:
    """Return `make(kind, **options)`: a small seeded program, `llama`, `gpt2` or `latent`."""
    from kvxform.testing.programs import MAKERS

    def make(kind: str = "llama", **options: Any) -> Program:
        return MAKERS[kind](**options)

    return make


@pytest.fixture(scope="session")
def kvx_optimize() -> Callable[..., OptimizedModel]:
    """Return `kvxform.optimize` that works quietly, and once per model and recipe named by text."""
    from kvxform.api import optimize

    @functools.cache
    def once(model: str, recipe: str, **options: Any) -> OptimizedModel:
        return optimize(model, recipe, progress=False, **options)

    return once
