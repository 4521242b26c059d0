"""Programs before and after each pass, as text; `pytest --update-golden` rewrites the files."""

from __future__ import annotations

import dataclasses

import pytest
from programs import apply, fired, gpt2_program, latent_program, llama_program

from kvxform.ir.text import format_program
from kvxform.passes.base.fuse_projections import FuseProjections
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.base.simplify import Simplify
from kvxform.passes.memory.page_cache import PageCache
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

KIVI = QuantizeKv(
    {"codec": "int", "bits": 2, "axis": "channel", "zero": "float"},
    {"codec": "int", "bits": 2, "group": 8, "zero": "float"},
    regions={"recent": 128},
)
INT4 = QuantizeKv({"codec": "int", "bits": 4}, {"codec": "int", "bits": 4})
UNTIED = FuseNorms(untie=True)


def tied_llama(**options):
    return llama_program(tied=True, **options)


def no_q(**options):
    """Return a model with something between W_q and RoPE, as capture would tell it."""
    program = llama_program(**options)
    program.sites = tuple(dataclasses.replace(site, q=None) for site in program.sites)
    return program


def two_layers(make):
    """Return what makes a model of two layers, whatever is asked for."""
    return lambda **options: make(**{**options, "layers": 2})


def multihead(**options):
    return llama_program(kv_heads=4, bias=True, **options)


CASES = {
    "fuse_norms/llama": (FuseNorms(), (), llama_program),
    "fuse_norms/gpt2_tied": (FuseNorms(), (), gpt2_program),  # the last norm is a near miss
    "fuse_norms/gpt2_untied": (FuseNorms(), (), lambda **k: gpt2_program(tied=False, **k)),
    "rotate_residual/llama": (RotateResidual(online_down=True), (UNTIED,), tied_llama),
    "rotate_residual/gpt2": (RotateResidual(), (UNTIED,), gpt2_program),
    "rotate_v/gpt2": (RotateV(), (InsertCache(),), gpt2_program),
    "rotate_qk/stateless": (RotateQk(seed=1), (), llama_program),
    "rotate_qk/cached": (RotateQk(block=8), (InsertCache(),), llama_program),
    "spectral_rotation/cached": (SpectralRotation(), (InsertCache(),), llama_program),
    "learn_rotation/gpt2": (LearnRotation(keys=True), (), gpt2_program),
    "balance_channels/llama": (BalanceChannels(), (InsertCache(),), llama_program),
    "balance_channels/online": (BalanceChannels(online=True), (InsertCache(),), no_q),
    "insert_cache/llama": (InsertCache(), (), llama_program),
    "insert_cache/gpt2": (InsertCache(), (RotateQk(),), gpt2_program),
    "cache_prerope/llama": (CachePrerope(), (InsertCache(),), llama_program),
    "rotate_k_prerope/llama": (
        RotateKPrerope(order="none"),
        (InsertCache(), CachePrerope()),
        llama_program,
    ),
    "factor_kv/llama": (FactorKv(), (InsertCache(), CachePrerope()), llama_program),
    "to_latent/llama": (ToLatent(8, 24), (), llama_program),
    "page_cache/llama": (PageCache(64), (InsertCache(),), llama_program),
    "quantize_kv/kivi2": (KIVI, (InsertCache(), PageCache()), llama_program),
    "per_layer_bits/dry_run": (PerLayerBits(5.0), (InsertCache(), INT4), llama_program),
    "cache_latent/stateless": (CacheLatent(), (), latent_program),
    "cache_latent/cached": (RotateQk(), (CacheLatent(), InsertCache()), latent_program),
    "fuse_projections/llama": (FuseProjections(), (), llama_program),
    "tie_kv/cached": (InsertCache(), (TieKv(),), llama_program),
    "tie_kv/gpt2": (TieKv(), (), gpt2_program),
    "cache_residual/llama": (CacheResidual(hot_window=128), (InsertCache(),), llama_program),
    "merge_layer_pairs/llama": (
        MergeLayerPairs(start=0),
        (InsertCache(), PageCache(64)),
        two_layers(llama_program),
    ),
    "share_kv_layers/llama": (ShareKvLayers(), (), two_layers(llama_program)),
    "share_kv_layers/fused": (ShareKvLayers(), (), two_layers(gpt2_program)),
    "cache_residual/xcache": (CacheResidual("xcache"), (InsertCache(),), multihead),
    "loop_layers/llama": (LoopLayers(cache="first"), (), llama_program),
    "merge_kv_heads/folded": (MergeKvHeads(heads=1, rope="commuting"), (), llama_program),
    "merge_kv_heads/fused": (MergeKvHeads(heads=1), (), gpt2_program),
    "merge_kv_heads/after_rope": (MergeKvHeads(heads=1, rope="post"), (), llama_program),
    "merge_kv_heads/latent": (
        MergeKvHeads(heads=1, rope="latent"),
        (InsertCache(), CachePrerope()),
        llama_program,
    ),
    "simplify/kivi2": (Simplify(), (InsertCache(), PageCache(), KIVI), llama_program),
}


@pytest.mark.parametrize("name", CASES)
def test_before_and_after(name, golden):
    graph_pass, before, make = CASES[name]
    program = make(layers=1)
    for earlier in before:
        program, _ = apply(earlier, program)
    rewritten, found = apply(graph_pass, program)
    assert fired(found)
    golden(f"{name}.before.txt", format_program(program))
    golden(f"{name}.after.txt", format_program(rewritten))
