"""What holds of every pass: names, declarations, and the contract on two small models."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from equal_heads import equal_heads
from equal_layers import equal_toy
from programs import (
    apply,
    assert_untouched,
    fired,
    gpt2_program,
    latent_program,
    llama_program,
    run,
    snapshot,
    to_meta,
    token_ids,
)
from still_layers import equal_keys_and_values, still

import kvxform.passes
from kvxform.calibrate.collecting import collect
from kvxform.ir.facts import DEFAULTS
from kvxform.pass_base import PASSES, GraphPass, NoMatch
from kvxform.passes.base.fuse_projections import FuseProjections
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.base.simplify import Simplify
from kvxform.passes.memory.page_cache import PageCache
from kvxform.passes.quantize.klt import Klt
from kvxform.passes.quantize.per_layer_bits import PerLayerBits
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.passes.rotation.balance_channels import BalanceChannels
from kvxform.passes.rotation.fuse_norms import FuseNorms
from kvxform.passes.rotation.learn_rotation import LearnRotation
from kvxform.passes.rotation.rotate_k_prerope import RotateKPrerope
from kvxform.passes.rotation.rotate_qk import RotateQk
from kvxform.passes.rotation.rotate_residual import RotateResidual
from kvxform.passes.rotation.rotate_v import RotateV
from kvxform.passes.rotation.spectral_rotation import SpectralRotation
from kvxform.passes.structure.cache_latent import CacheLatent
from kvxform.passes.structure.cache_prerope import CachePrerope
from kvxform.passes.structure.cache_residual import CacheResidual
from kvxform.passes.structure.factor_kv import FactorKv
from kvxform.passes.structure.loop_layers import LoopLayers
from kvxform.passes.structure.merge_kv_heads import MergeKvHeads
from kvxform.passes.structure.merge_layer_pairs import MergeLayerPairs
from kvxform.passes.structure.share_kv_layers import ShareKvLayers
from kvxform.passes.structure.tie_kv import TieKv
from kvxform.passes.structure.to_latent import ToLatent

INT4 = {"codec": "int", "bits": 4}
MODELS = {
    "llama": llama_program,
    "llama-bias": lambda: llama_program(bias=True, kv_heads=4, seed=1),
    "gpt2": lambda: gpt2_program(tied=False),
}
# pass, passes that must run before it, matches on a model of two layers
CASES = {
    "fuse-norms": (FuseNorms(), (), 5),
    "rotate-residual": (RotateResidual(), (FuseNorms(untie=True),), 1),
    "rotate-v": (RotateV(block=8, seed=1), (), 2),
    "rotate-v, cached": (RotateV(), (InsertCache(), PageCache()), 2),
    "spectral-rotation": (SpectralRotation(), (), 4),
    "spectral-rotation, cached": (SpectralRotation(values=False), (InsertCache(),), 2),
    "learn-rotation": (LearnRotation(steps=2, keys=True), (), 4),
    "balance-channels": (BalanceChannels(), (), 2),
    "balance-channels, cached": (BalanceChannels(online=True), (InsertCache(),), 2),
    "rotate-qk": (RotateQk(block=8), (), 2),
    "rotate-qk, cached": (RotateQk(seed=2), (InsertCache(),), 2),
    "insert-cache": (InsertCache(), (), 2),
    "insert-cache, rotated": (InsertCache(), (RotateQk(), RotateV()), 2),
    "page-cache": (PageCache(), (InsertCache(),), 1),
    "quantize-kv": (QuantizeKv(INT4, INT4), (InsertCache(), PageCache()), 2),
    "per-layer-bits": (
        PerLayerBits(6.0, tokens=32, window=32),
        (InsertCache(), QuantizeKv(INT4, INT4)),
        2,
    ),
    "cache-prerope": (CachePrerope(), (InsertCache(),), 2),
    "rotate-k-prerope": (RotateKPrerope(), (InsertCache(), CachePrerope()), 2),
    "klt": (Klt(3.0, weighted=False), (InsertCache(),), 2),
    "simplify": (Simplify(), (InsertCache(), QuantizeKv(INT4, None)), 2),
    "cache-latent": (CacheLatent(), (), 2),
    "merge-kv-heads": (MergeKvHeads(heads=1, rope="commuting"), (), 2),
    "merge-kv-heads, after RoPE": (MergeKvHeads(heads=1, rope="post"), (), 2),
    "merge-layer-pairs": (MergeLayerPairs(start=0, chunk=4, recent=8), (InsertCache(),), 1),
    "share-kv-layers": (ShareKvLayers(), (), 1),
    "cache-residual": (CacheResidual(), (InsertCache(),), 1),
    "cache-residual, inputs of layers": (CacheResidual("xcache"), (InsertCache(),), 2),
    "loop-layers": (LoopLayers(layers="0-1"), (), 1),
    "tie-kv": (TieKv(), (), 2),
    "factor-kv": (FactorKv(1.0, 1.0), (InsertCache(),), 2),
    "to-latent": (ToLatent(rope_dim=1024), (), 2),  # all channels of keys keep RoPE
    "fuse-projections": (FuseProjections(), (InsertCache(),), 4),
}
EQUAL_LAYERS = {
    "llama": equal_toy,
    "llama-bias": lambda: equal_toy(bias=True, kv_heads=4, seed=1),
    "gpt2": lambda: equal_toy("gpt2", tied=False),
}
EQUAL_HEADS = {name: lambda make=make: equal_heads(make(), 1) for name, make in MODELS.items()}
LATENT_MODELS = {
    "latent": latent_program,
    "latent, shared part first": lambda: latent_program(shared_first=True, heads=6),
}


def models_for(case: str):
    if "prerope" in case or case == "to-latent":  # gpt2 has no RoPE
        return {name: make for name, make in MODELS.items() if name != "gpt2"}
    if case == "fuse-projections":  # gpt2 has one projection already
        return {name: make for name, make in MODELS.items() if name != "gpt2"}
    if case.startswith("merge-kv-heads"):  # exact where KV heads are equal
        return EQUAL_HEADS
    if case == "loop-layers":  # exact where layers add nothing
        return {name: lambda make=make: still(make()) for name, make in MODELS.items()}
    if case == "tie-kv":  # exact where W_k is W_v
        return {
            name: lambda make=make: equal_keys_and_values(make()) for name, make in MODELS.items()
        }
    if case == "share-kv-layers":  # exact where layers have equal keys and values
        return EQUAL_LAYERS
    return LATENT_MODELS if case == "cache-latent" else MODELS


PAIRS = [(case, model) for case in CASES for model in models_for(case)]


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[0]} on {pair[1]}")
def pair(request):
    return request.param


def calibrated(model, graph_pass):
    """Return the model with the statistics that the pass asks for."""
    if not graph_pass.needs_calibration:
        return model
    ids = token_ids(model, batch=2, tokens=32, seed=3)
    return dataclasses.replace(model, calibration=collect(model, ids, name="toy"))


@pytest.fixture
def case(pair):
    return CASES[pair[0]]


@pytest.fixture
def model(pair):
    return calibrated(models_for(pair[0])[pair[1]](), CASES[pair[0]][0])


@pytest.mark.parametrize("name", sorted(PASSES))
def test_file_pass_and_class_have_one_name(name):
    cls = PASSES[name]
    path = Path(inspect.getfile(cls))
    assert path.stem == name.replace("-", "_")
    assert cls.__name__ == "".join(word.capitalize() for word in name.split("-"))
    assert (Path(__file__).parent / f"test_{path.stem}.py").exists()
    module = f"{path.parent.name}.{path.stem}"
    assert f"- `{module}`:" in kvxform.passes.__doc__, "the table of contents lists every pass"


@pytest.mark.parametrize("name", sorted(PASSES))
def test_every_pass_declares_source_contract_and_known_facts(name):
    cls = PASSES[name]
    assert cls.source
    assert cls.numerics.is_exact or cls.numerics.metric
    assert cls.__doc__
    assert all(r.fact in DEFAULTS and r.because for r in cls.requires)
    assert set(cls.invalidates) <= set(DEFAULTS)


def test_every_pass_is_covered_here():
    assert {graph_pass.pass_name() for graph_pass, _, _ in CASES.values()} == set(PASSES)


def prepared(model, before: tuple[GraphPass, ...]):
    for graph_pass in before:
        model, _ = apply(graph_pass, model)
    return model


def test_logits_stay_and_the_source_is_untouched(model, case):
    graph_pass, before, matches = case
    ids = token_ids(model)
    reference = run(model, ids)
    program = prepared(model, before)
    kept = snapshot(program)
    rewritten, found = apply(graph_pass, program)
    assert fired(found) == matches
    assert_untouched(program, kept)
    # the toy cache of these tests is exact, so even quantize-kv leaves the logits alone
    logits = run(rewritten, ids, [4, 1, 1, 3])
    torch.testing.assert_close(logits, reference, rtol=0, atol=1e-11)
    assert not set(graph_pass.ensures()) - set(DEFAULTS)


def test_a_second_run_changes_nothing(model, case):
    graph_pass, before, _ = case
    once, _ = apply(graph_pass, prepared(model, before))
    kept = snapshot(once)
    twice, found = apply(graph_pass, once)
    assert all(isinstance(match, NoMatch) and match.done for match in found)
    assert_untouched(twice, kept)


def without_constants(plan):
    """Return a plan without what codecs were fitted to, which a dry run cannot know."""
    for site in plan.sites if plan else ():
        streams = {
            name: dataclasses.replace(
                stream,
                codec={key: x for key, x in stream.codec.items() if not isinstance(x, list)},
                calibration=None,
            )
            for name, stream in site.streams.items()
        }
        plan = plan.replace_site(site.layer, **streams)
    return plan


def test_passes_work_on_shapes_alone(model, case):
    graph_pass, before, matches = case
    program = prepared(to_meta(model), before)
    rewritten, found = apply(graph_pass, program)
    assert fired(found) == matches
    assert all(weight.is_meta for weight in rewritten.weights.values())
    real, _ = apply(graph_pass, prepared(model, before))
    shapes = {name: (w.shape, w.dtype) for name, w in real.weights.items()}
    assert {name: (w.shape, w.dtype) for name, w in rewritten.weights.items()} == shapes
    assert (without_constants(rewritten.plan), rewritten.sites) == (
        without_constants(real.plan),
        real.sites,
    )


@pytest.mark.parametrize("name", CASES)
def test_new_nodes_say_which_pass_made_them(name):
    graph_pass, before, _ = CASES[name]
    program = prepared(next(iter(models_for(name).values()))(), before)
    names = {node.name for node in program.graph.nodes}
    rewritten, _ = apply(graph_pass, program)
    for node in rewritten.graph.nodes:
        if node.op != "output" and node.name not in names:
            assert node.meta["via"][-1] == graph_pass.pass_name()
            assert node.op == "placeholder" or node.meta["module"].startswith("layers.")


def test_dtypes_of_weights_stay():
    program = llama_program(dtype=torch.bfloat16)
    for graph_pass in (FuseNorms(), RotateV(), RotateQk(seed=0)):
        program, _ = apply(graph_pass, program)
    assert {weight.dtype for weight in program.weights.values()} == {torch.bfloat16}
