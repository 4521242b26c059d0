"""The pipeline on small programs: contracts, refusals, transactions, plans without weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from programs import assert_untouched, gpt2_program, llama_program, run, snapshot, token_ids

import kvxform.ir.ops as kvx
from kvxform.errors import KvxformError, PassError, VerifyError
from kvxform.ir.facts import FactValue
from kvxform.ir.program import Program
from kvxform.pass_base import EXACT, PASSES, GraphPass, Match, NoMatch, Numerics, Rewriter
from kvxform.pipeline import Stage, apply_pass, plan_pipeline, run_pipeline
from kvxform.recipe import Recipe, load_recipe
from kvxform.runtime.model import OptimizedModel

INT4 = {"codec": "int", "bits": 4}


def wide(program: Program) -> Program:
    """Return the program without a limit of its context."""
    program.info = dataclasses.replace(program.info, context_length=None)
    return program


def make(*steps: object, **keys: object) -> Recipe:
    return load_recipe({"version": 1, "name": "test", "passes": list(steps), **keys})


def optimise(program: Program, recipe: Recipe, verify: str = "probe", **options):
    return run_pipeline(program, recipe, executor=OptimizedModel, verify=verify, **options)


@dataclass(frozen=True)
class Fault(GraphPass):
    """A pass that does something wrong; registered only within a test."""

    what: str = ""
    numerics: ClassVar[Numerics] = EXACT

    def ensures(self) -> dict[str, FactValue]:
        return {}

    def match(self, program: Program) -> list[Match | NoMatch]:
        if self.what == "nothing":
            return [NoMatch("the moon is full"), NoMatch("the moon is full"), NoMatch("it rains")]
        if self.what == "done":
            return [NoMatch("done", done=True)]
        return [Match(0, node=program.attention_node(0).name)]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        node = rewriter.node(match.node)
        if self.what == "raise":
            rewriter.set_args(node, scale=3.0)
            raise ZeroDivisionError
        if self.what == "wrong weight":
            name = program.site(0).q.weight
            rewriter.set_weight(name, program.weights[name] * 1.1)
        if self.what == "invalid":
            rewriter.set_args(node, layer=7)


@pytest.fixture
def fault(monkeypatch):
    monkeypatch.setitem(PASSES, "fault", Fault)


@pytest.mark.parametrize("make_program", [llama_program, gpt2_program])
def test_exact_recipe_keeps_logits_and_cache_to_rounding(make_program):
    program = wide(make_program()) if make_program is llama_program else make_program()
    before = snapshot(program)
    optimised, report = optimise(program, load_recipe("exact"), "full")
    assert_untouched(program, before)
    ids = token_ids(program, 2, 40)
    error = (OptimizedModel(optimised)(ids) - run(program, ids)).abs().max()
    assert error <= 1e-8
    applied = [p.name for p in report.passes if p.matched]
    assert applied == ["fuse-norms", "rotate-v", "insert-cache", "page-cache", "rotate-qk"]
    for record in report.passes:
        assert record.vs_before is not None
        assert record.vs_before.relative <= 1e-9 == record.tolerance
    assert report.cache is not None
    assert len(report.cache.schedules) == 9
    assert max(report.cache.input_error, report.cache.read_error) < 1e-9
    assert report.cache.state_error < 1e-12


@pytest.mark.parametrize("name", ["int8", "kv4", "kivi4", "kivi2"])
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float64, id="f64"),
        pytest.param(torch.float32, id="f32", marks=pytest.mark.slow),
    ],
)
def test_lossy_recipes_hold_what_their_equations_say(name, dtype):
    program = wide(llama_program(dtype=dtype, head_dim=64))
    optimised, report = optimise(program, load_recipe(name), "full")
    assert report.cache is not None
    assert report.cache.state_error <= (1e-12 if dtype is torch.float64 else 1e-5)
    assert report.final is not None
    assert 0 < report.final.kl < 0.1
    bits = {"int8": 8.5, "kv4": 4.5, "kivi4": 5.0, "kivi2": 3.0}
    assert report.bits_per_value == bits[name]
    assert all(0 < layer.key_error < 0.5 for layer in report.layers)
    lossy = [p.name for p in report.passes if p.exactness != "exact"]
    assert lossy == ["quantize-kv"]
    steps = [s.name for s in load_recipe(name).passes]
    assert optimised.passes == tuple(s for s in steps if s != "cache-latent")  # nothing is latent


def test_probes_are_long_enough_for_tokens_to_be_encoded():
    program = wide(llama_program(head_dim=64))
    _, report = optimise(program, load_recipe("kivi2"))
    assert max(report.probes) > 128 + 32
    assert all(layer.value_error > 0 for layer in report.layers)


def test_weights_that_no_pass_changes_are_shared():
    program = wide(llama_program())
    optimised, _ = optimise(program, make("insert-cache", "rotate-qk"))
    for name, weight in optimised.weights.items():
        if name in program.weights:
            assert weight.data_ptr() == program.weights[name].data_ptr()


def test_progress_tells_when_stages_begin_and_end():
    stages: list[Stage] = []
    optimise(wide(llama_program()), make("insert-cache"), progress=stages.append)
    assert [(s.name, s.seconds is None) for s in stages] == [
        ("source model", True),
        ("source model", False),
        ("insert-cache", True),
        ("insert-cache", False),
    ]
    assert {s.total for s in stages} == {2}


def test_verify_none_measures_nothing():
    _, report = optimise(llama_program(), make("insert-cache"), "none")
    assert report.passes[0].vs_before is None
    assert report.cache is None
    assert report.final is None


@pytest.mark.usefixtures("fault")
@pytest.mark.parametrize(
    ("what", "error", "code"),
    [
        ("raise", ZeroDivisionError, None),
        ("wrong weight", PassError, "KVX212"),
        ("invalid", PassError, "KVX215"),
        ("nothing", PassError, "KVX210"),
    ],
)
def test_a_failing_pass_leaves_the_program_as_it_was(what, error, code):
    program = llama_program()
    before = snapshot(program)
    with pytest.raises(error) as caught:
        optimise(program, make({"fault": {"what": what}}))
    assert_untouched(program, before)
    if isinstance(caught.value, KvxformError):
        assert (caught.value.code, caught.value.where) == (code, "fault")


@pytest.mark.usefixtures("fault")
def test_a_broken_contract_says_which_value_broke_which_bound():
    with pytest.raises(PassError) as caught:
        optimise(llama_program(), make({"fault": {"what": "wrong weight"}}))
    assert "relative against the stage before must be at most 1e-09" in caught.value.rule
    assert float(caught.value.got) > 1e-4


@pytest.mark.usefixtures("fault")
def test_zero_matches_list_the_nearest_reasons_most_common_first():
    with pytest.raises(PassError) as caught:
        optimise(llama_program(), make({"fault": {"what": "nothing"}}))
    assert caught.value.got == "no match: the moon is full (2 times); it rains"


@pytest.mark.usefixtures("fault")
@pytest.mark.parametrize("options", [{"what": "nothing", "allow_zero": True}, {"what": "done"}])
def test_zero_matches_are_fine_if_allowed_or_done(options):
    program = llama_program()
    optimised, report = optimise(program, make({"fault": options}))
    assert optimised.passes == ()
    assert report.passes[0].matched == 0
    assert report.passes[0].vs_before is not None
    assert report.passes[0].vs_before.max_abs < 1e-14


def test_running_a_pass_twice_changes_nothing():
    program = wide(llama_program())
    steps = ("fuse-norms", "rotate-v", "insert-cache", "page-cache", "rotate-qk")
    once, _ = optimise(program, make(*steps))
    twice, report = optimise(program, make(*(s for step in steps for s in (step, step))))
    assert [p.matched for p in report.passes[1::2]] == [0] * 5
    assert twice.passes == once.passes
    kinds = [[str(n.target) for n in p.graph.nodes] for p in (once, twice)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize(
    "bounds", [{"max_kl": 1e-9}, {"min_top1": 1.0}, {"bits_per_value": 4.0}], ids=str
)
def test_an_exceeded_bound_is_an_error(bounds):
    program = wide(llama_program())
    recipe = make("insert-cache", {"quantize-kv": {"key": INT4, "value": INT4}}, bounds=bounds)
    ((name, limit),) = bounds.items()
    if name == "min_top1":  # needs a model whose decisions are close
        program.weights["head.weight"] = program.weights["head.weight"] * 1e-3
        program.weights["head.weight"][1::2] = program.weights["head.weight"][::2] * 1.0001
    with pytest.raises(VerifyError, match=rf"KVX501 .*{name}.*{limit:g}"):
        optimise(program, recipe)


def test_a_plan_needs_no_weights_and_gives_the_same_figures():
    program = wide(llama_program(head_dim=64))
    meta = dataclasses.replace(
        program, weights={k: w.to("meta") for k, w in program.weights.items()}
    )
    before = snapshot(meta)
    planned, report = plan_pipeline(meta, load_recipe("kv4"))
    assert_untouched(meta, before)
    assert all(weight.is_meta for weight in planned.weights.values())
    optimised, measured = optimise(program, load_recipe("kv4"))
    assert planned.plan == optimised.plan
    assert report.plan == measured.plan
    assert [p.matched for p in report.passes] == [p.matched for p in measured.passes]
    assert report.verify == "none"
    assert report.final is None


def test_a_plan_refuses_what_the_model_cannot_take():
    program = llama_program(head_dim=10)
    with pytest.raises(PassError, match="KVX203"):
        plan_pipeline(
            program,
            make("insert-cache", {"quantize-kv": {"key": INT4 | {"bits": 3}, "value": None}}),
        )


def test_requirements_are_checked_against_what_really_happened():
    from kvxform.order import PlannedPass
    from kvxform.recipe import PassStep, build_pass

    step = PassStep("page-cache")
    with pytest.raises(KvxformError, match="KVX213"):
        apply_pass(llama_program(), PlannedPass(step, build_pass(step)))


def test_auto_order_runs_a_recipe_that_is_in_the_wrong_order():
    wrong = make(
        {"quantize-kv": {"key": INT4, "value": None}}, "rotate-qk", "insert-cache", auto_order=True
    )
    optimised, report = optimise(wide(llama_program()), wrong)
    assert optimised.passes == ("rotate-qk", "insert-cache", "quantize-kv")
    assert [p.name for p in report.passes] == list(optimised.passes)
    assert next(optimised.calls(kvx.HADAMARD), None) is not None
