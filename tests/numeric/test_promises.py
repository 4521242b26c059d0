"""`check_pass` over all passes of kvxform: a few of them on every change, all of them at night."""

from __future__ import annotations

import pytest
from models import tiny_hf

from kvxform.capture import capture
from kvxform.pass_base import PASSES, GraphPass
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
from kvxform.testing import check_pass, fuzz_pass
from kvxform.testing.examples import Example
from kvxform.testing.replaying import digests_elsewhere

INT4 = {"codec": "int", "bits": 4}
KIVI = {"codec": "int", "bits": 2, "axis": "channel", "group": 4, "zero": "float"}
REGIONS = {"sink": 2, "recent": 8}
CODES = QuantizeKv(INT4, INT4)
CACHE = (InsertCache(),)
UNTIED = FuseNorms(untie=True)
# pass, and passes that must have run; None: what its facts ask for, and others at random
CASES: dict[str, tuple[GraphPass, tuple[GraphPass, ...] | None]] = {
    "balance-channels": (BalanceChannels(), None),
    "balance-channels, online": (BalanceChannels(online=True), CACHE),
    "cache-latent": (CacheLatent(), None),
    "cache-prerope": (CachePrerope(), None),
    "cache-residual": (CacheResidual(), CACHE),
    "cache-residual, inputs of layers": (CacheResidual("xcache"), CACHE),
    "factor-kv": (FactorKv(), CACHE),
    "fuse-norms": (FuseNorms(), None),
    "fuse-norms, untied": (UNTIED, None),
    "fuse-projections": (FuseProjections(), None),
    "insert-cache": (InsertCache(), None),
    "klt": (Klt(3.0), CACHE),
    "learn-rotation": (LearnRotation(steps=2, keys=True), None),
    "loop-layers": (LoopLayers(cache="first"), None),
    "merge-kv-heads": (MergeKvHeads(heads=1), None),
    "merge-kv-heads, folded": (MergeKvHeads(heads=1, rope="commuting"), None),
    "merge-layer-pairs": (MergeLayerPairs(start=0, chunk=4, recent=8), CACHE),
    "page-cache": (PageCache(), None),
    "per-layer-bits": (PerLayerBits(9.0, tokens=32, window=32), (*CACHE, CODES)),
    "quantize-kv": (CODES, None),
    "quantize-kv, regions": (QuantizeKv(KIVI, INT4, regions=REGIONS), None),
    "rotate-k-prerope": (RotateKPrerope(), (*CACHE, CachePrerope())),
    "rotate-qk": (RotateQk(seed=1), None),
    "rotate-residual": (RotateResidual(online_down=True), (UNTIED,)),
    "rotate-v": (RotateV(), None),
    "share-kv-layers": (ShareKvLayers(), None),
    "simplify": (Simplify(), (*CACHE, CODES)),
    "spectral-rotation": (SpectralRotation(), None),
    "spectral-rotation, cached": (SpectralRotation(), CACHE),
    "tie-kv": (TieKv(), None),
    "to-latent": (ToLatent(8, 24), None),
}
QUICK = ("insert-cache", "rotate-qk", "quantize-kv, regions")


def test_all_passes_are_here():
    assert {graph_pass.pass_name() for graph_pass, _ in CASES.values()} == set(PASSES)


@pytest.mark.parametrize("name", QUICK)
def test_promises_are_kept_on_one_program(name):
    graph_pass, before = CASES[name]
    assert check_pass(graph_pass, before=before, examples=1, new_process=False).applied == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_promises_are_kept(name, seed):
    graph_pass, before = CASES[name]
    check = check_pass(graph_pass, before=before, examples=12, seed=seed, new_process=False)
    assert check.applied


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gpt_neox"])
def test_promises_are_kept_on_captured_models(family):
    program = capture(tiny_hf(family)).program
    for name in ("fuse-norms", "rotate-v", "insert-cache", "page-cache"):
        check = check_pass(name, programs=[program], examples=1, new_process=False)
        assert check.trials[-1].outcome == "applied"


@pytest.mark.slow
def test_another_process_makes_the_same_of_everything():
    cases, digests = [], []
    for graph_pass, before in CASES.values():
        check = fuzz_pass(graph_pass, before=before, examples=3, new_process=False)
        taken = [trial for trial in check.trials if trial.digest]
        cases += [(graph_pass, trial.example) for trial in taken]
        digests += [trial.digest for trial in taken]
    assert all(isinstance(example, Example) for _, example in cases)
    assert len(cases) >= 2 * len(CASES)
    assert digests_elsewhere(cases) == digests
