"""The pytest plug-in, in test suites of somebody else."""

from __future__ import annotations

import json
import sys

import pytest

pytest_plugins = ["pytester"]

SNAPSHOT = """
    def test_graph(assert_graph_snapshot, kvx_program):
        assert_graph_snapshot(kvx_program("llama", layers={layers}), "small")
"""


class KeptModules:
    """pytester forgets what a run has imported, and torch cannot be imported twice."""

    def __init__(self, preserve=None):
        self.mine = ("test_mine", "model")

    def restore(self):
        for name in self.mine:
            sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def _keep_modules(monkeypatch):
    monkeypatch.setattr("_pytest.pytester.SysModulesSnapshot", KeptModules)


@pytest.fixture
def outside_ci(monkeypatch):
    monkeypatch.delenv("CI", raising=False)


def run(pytester, *args):
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *args)


def test_it_costs_nothing_where_it_is_not_used(pytester):
    pytester.makepyfile(
        test_mine="""
        import sys

        def test_light():
            assert "kvxform.testing.plugin" in sys.modules
            assert not {"torch", "pydantic", "onnx"} & set(sys.modules)
        """
    )
    pytester.runpytest_subprocess("-W", "error").assert_outcomes(passed=1)


def test_a_snapshot_is_written_once_and_then_compared(pytester, outside_ci):
    pytester.makepyfile(test_mine=SNAPSHOT.format(layers=1))
    missing = run(pytester)
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(["*there is no snapshot small.json yet: pytest --kvx-update*"])
    written = run(pytester, "--kvx-update")
    written.assert_outcomes(passed=1)
    written.stdout.fnmatch_lines(["kvxform: wrote *snapshots/test_mine/small.json"])
    path = pytester.path / "snapshots" / "test_mine" / "small.json"
    assert json.loads(path.read_text())["model"] == "toy"
    again = run(pytester, "--kvx-update")
    again.stdout.no_fnmatch_line("kvxform: wrote *")
    run(pytester).assert_outcomes(passed=1)


def test_a_changed_graph_is_told_in_words(pytester, outside_ci):
    pytester.makepyfile(test_mine=SNAPSHOT.format(layers=1))
    run(pytester, "--kvx-update").assert_outcomes(passed=1)
    pytester.makepyfile(test_mine=SNAPSHOT.format(layers=2))
    found = run(pytester)
    found.assert_outcomes(failed=1)
    found.stdout.fnmatch_lines(
        [
            "*small.json differs; if that is right: pytest --kvx-update*",
            "*A  snapshot*1 layer*",
            "*B  now*2 layers*",
        ]
    )
    found.stdout.no_fnmatch_line("*snapshots.py:*")  # the traceback ends in the test


def test_snapshots_are_never_written_in_ci(pytester, monkeypatch):
    monkeypatch.setenv("CI", "true")
    pytester.makepyfile(test_mine=SNAPSHOT.format(layers=1))
    found = run(pytester, "--kvx-update")
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines(["*--kvx-update is refused in CI*"])
    assert not (pytester.path / "snapshots").exists()


def test_fixtures_are_the_asserts(pytester):
    pytester.makepyfile(
        test_mine="""
        import kvxform.testing as ours

        def test_all(assert_equivalent, assert_cache_state, kvx_program):
            assert assert_equivalent is ours.assert_equivalent
            assert assert_cache_state is ours.assert_cache_state
            for kind in ("llama", "gpt2", "latent"):
                assert kvx_program(kind, layers=1).sites[0].layer == 0
        """
    )
    run(pytester).assert_outcomes(passed=1)


@pytest.mark.slow  # a model is captured
def test_a_model_is_optimised_once(pytester):
    pytester.makepyfile(
        model="""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        def tiny():
            torch.manual_seed(0)
            sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, vocab_size=64)
            return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
        """,
        test_mine="""
        def test_once(kvx_optimize, assert_cache_state):
            model = kvx_optimize("model.py:tiny", "exact")
            assert kvx_optimize("model.py:tiny", "exact") is model
            assert_cache_state(model, schedules=["decode"])
        """,
    )
    run(pytester).assert_outcomes(passed=1)
