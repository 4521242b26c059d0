"""Latent attention (MLA) from source to cache: what is proved, what is cached, what is refused."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from families import Family
from family_checks import Subject, check_logits, check_tokens, family_recipe, relative
from models import VOCAB, RMSNorm, randomise, rotate_half
from onnx_tools import open_export
from programs import LATENT, SHARED, apply, latent_program, token_ids
from torch import Tensor, nn

import kvxform.capture.latents as latents
from kvxform.capture import capture
from kvxform.ir.artifact import load_program, save_program
from kvxform.ir.program import LatentSpec
from kvxform.ir.scoring import Scoring
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.passes.rotation.rotate_qk import RotateQk
from kvxform.passes.structure.cache_latent import CacheLatent
from kvxform.pipeline import run_pipeline
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel
from kvxform.verify.equations import attend, two_copies

RANK, TURNING, OWN, WIDE = 48, 16, 8, 24
DEEPSEEK = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 160,
    "kv_lora_rank": RANK,
    "qk_rope_head_dim": TURNING,
    "head_dim": TURNING,
    "qk_nope_head_dim": OWN,
    "v_head_dim": WIDE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 40,
}


@functools.cache
def deepseek(family: str, dtype: torch.dtype) -> Subject:
    fields = {**DEEPSEEK, "q_lora_rank": 24 if family == "deepseek_v3" else None}
    if family == "deepseek_v3":
        fields["rope_parameters"] = YARN
    return Subject.of(Family(family, fields), dtype)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param("deepseek_v3", torch.float64, id="v3, yarn, float64"),
        pytest.param("deepseek_v2", torch.float32, id="v2, complex rotary", marks=pytest.mark.slow),
    ],
)
def test_deepseek_is_exact_with_its_latent_in_the_cache(family, dtype):
    subject = deepseek(family, dtype)
    assert not subject.program.rejected
    pairs = {"deepseek_v3": "half", "deepseek_v2": "interleaved"}[family]
    for site in subject.program.sites:
        assert (site.latent.rank, site.latent.rope_dim) == (RANK, TURNING)
        assert (site.num_kv_heads, site.head_dim, site.v_head_dim) == (6, OWN + TURNING, WIDE)
        assert (site.rope.rotary_dim, site.rope.interleaved) == (TURNING, pairs != "half")
    optimised = subject.optimise("exact", "probe")
    assert optimised.plan.bytes_per_token == 2 * (RANK + TURNING) * dtype.itemsize
    assert [site.payload for site in optimised.plan.sites] == ["latent"] * 2
    session = optimised.new_session(max_batch_size=2, max_seq_len=96)
    session.prefill(torch.full((2, 64), 5))
    assert session.cache_bytes() == 2 * 64 * optimised.plan.bytes_per_token
    check_logits(subject, optimised)
    check_tokens(subject, [optimised])


def check_recipe(recipe, verify):
    """Run a bundled recipe and return the plan and what was measured."""
    program = latent_program()
    program.info = dataclasses.replace(program.info, context_length=None)
    optimised, report = run_pipeline(
        program, family_recipe(recipe), executor=OptimizedModel, verify=verify
    )
    assert all(list(site.streams) == ["key"] for site in optimised.plan.sites)
    assert max(report.cache.input_error, report.cache.state_error, report.cache.read_error) < 1e-12
    return optimised.plan, report.final


@pytest.mark.parametrize(("recipe", "bits"), [("kv4", 4 + 32 / 24), ("int8", 8 + 32 / 24)])
def test_bundled_recipes_keep_every_promise(recipe, bits):
    plan, final = check_recipe(recipe, "probe")
    assert plan.bits_per_value == pytest.approx(bits)
    assert final.relative > 1e-4, "codes lose something"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["exact", "kv4", "kivi2"])
def test_bundled_recipes_keep_every_promise_over_all_schedules(recipe):
    _, final = check_recipe(recipe, "full")
    assert (final.relative > 1e-4) == (recipe != "exact")


def test_a_latent_comes_back_from_disk(tmp_path):
    program = latent_program()
    save_program(program, tmp_path)
    assert load_program(tmp_path).sites == program.sites
    optimised, _ = run_pipeline(
        program, family_recipe("kv4"), executor=OptimizedModel, verify="none"
    )
    OptimizedModel(optimised).save(tmp_path / "model")
    loaded = load_program(tmp_path / "model")
    assert (loaded.plan, loaded.sites) == (optimised.plan, optimised.sites)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(OptimizedModel(loaded)(ids), OptimizedModel(optimised)(ids))


def test_codes_of_a_latent_follow_the_equations():
    program = latent_program()
    codec = {"codec": "int", "bits": 4}
    for graph_pass in (CacheLatent(), InsertCache(), RotateQk(), QuantizeKv(codec, None)):
        program, _ = apply(graph_pass, program)
    model, ids = OptimizedModel(program), token_ids(program, 1, 12)
    site, spec = program.plan.sites[0], program.site(0)
    session = model.new_session(max_batch_size=1, max_seq_len=16)
    session.prefill(ids)
    held = session.logical_cache(0)
    source = latent_program()
    stateless, _ = apply(CacheLatent(), source)
    key = stateless.attention_node(0).args[1]
    output = next(n for n in stateless.graph.nodes if n.op == "output")
    output.args = (key,)
    rows = stateless.to_module()(ids, torch.arange(12)[None])[0]  # [1, T, rank + shared]
    copies = two_copies(site.key, site.key.basis.rotate(rows))
    want = site.key.basis.unrotate(copies.held())
    torch.testing.assert_close(held.k[0], want, rtol=0, atol=1e-12)
    assert torch.equal(held.v[0], held.k[0][..., :LATENT])
    assert 0.01 < relative(held.k[0], rows) < 0.3, "the codes lose something"
    assert (spec.head_dim, held.k[0].shape[-1]) == (LATENT + SHARED, LATENT + SHARED)


@pytest.mark.parametrize("lossy", [False, True])
def test_onnx_has_one_plane_set_a_layer(lossy, tmp_path):
    program = latent_program(dtype=torch.float32)
    program.info = dataclasses.replace(program.info, context_length=None)
    for graph_pass in (CacheLatent(), InsertCache(), RotateQk()):
        program, _ = apply(graph_pass, program)
    if lossy:
        program, _ = apply(QuantizeKv({"codec": "int", "bits": 8}, None), program)
    session, model = open_export(program, tmp_path), OptimizedModel(program)
    ids, mask = token_ids(program, 2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    found = session.prefill(ids, mask, all_logits=True)
    torch.testing.assert_close(found, model(ids, mask), rtol=0, atol=2e-5 if not lossy else 5e-3)
    names = sorted(session.cache_planes())
    planes = ["", "_codes", "_scale", "_zero"][1:] if lossy else [""]
    assert names == [f"past_key_values.{n}.key{plane}" for n in range(2) for plane in planes]
    assert session.cache_bytes() == 2 * 9 * program.plan.bytes_per_token


class PlainLatent(nn.Module):
    """Latent attention in plain PyTorch.

    Args:
        per_head: The rotary part of the keys is made head by head, so no head shares it.
        bias: The up-projection has a bias.
        apart: Keys and values have an up-projection each.
        turn: Use a rotary embedding; without it, order is known from the mask alone.
    """

    def __init__(
        self,
        *,
        per_head: bool = False,
        bias: bool = False,
        apart: bool = False,
        turn: bool = True,
    ) -> None:
        super().__init__()
        self.per_head, self.apart, self.turn, self.heads = per_head, apart, turn, 4
        self.embed, self.before = nn.Embedding(VOCAB, 32), RMSNorm(32)
        self.q = nn.Linear(32, 4 * 16, bias=False)
        self.down, self.norm = nn.Linear(32, 20, bias=False), RMSNorm(20)
        self.rotary = nn.Linear(32, 4 * 8 if per_head else 8, bias=False)
        self.up = nn.Linear(20, 4 * (8 if apart else 18), bias=bias)
        self.up_v = nn.Linear(20, 4 * 10, bias=False) if apart else None
        self.o, self.head = nn.Linear(4 * 10, 32, bias=False), nn.Linear(32, VOCAB, bias=False)
        self.register_buffer("inv_freq", 100.0 ** (-torch.arange(0, 8, 2).double() / 8))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        h = self.before(x)
        batch, length = tokens.shape
        angles = torch.arange(length, device=x.device)[:, None] * self.inv_freq
        cos, sin = (t.to(x.dtype) if self.turn else t * 0 + i for i, t in self._tables(angles))
        q = self.q(h).view(batch, length, 4, 16)
        latent = self.norm(self.down(h))
        rotary = self.rotary(h).view(batch, length, -1, 8)
        rotary = rotate_half(rotary, cos, sin).expand(-1, -1, 4, -1)
        q = torch.cat([q[..., :8], rotate_half(q[..., 8:], cos, sin)], -1)
        up = self.up(latent).view(batch, length, 4, -1)
        own, v = up[..., :8], up[..., 8:]
        if self.up_v is not None:
            v = self.up_v(latent).view(batch, length, 4, 10)
        k = torch.cat([own, rotary], -1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)
        return self.head(x + self.o(y.transpose(1, 2).reshape(batch, length, -1)))

    def _tables(self, angles: Tensor) -> list[tuple[int, Tensor]]:
        return [(1, angles.cos()), (0, angles.sin())]


def plain(**options: bool) -> nn.Module:
    return randomise(PlainLatent(**options).double().eval())


@pytest.mark.parametrize("options", [{}, {"apart": True}, {"turn": False}], ids=str)
def test_plain_latent_attention_is_found(options):
    model = plain(**options)
    program = capture(model).program
    (site,) = program.sites
    assert (site.latent.rank, site.latent.rope_dim) == (20, 8)
    optimised, _ = run_pipeline(program, load_recipe("exact"), executor=OptimizedModel)
    assert optimised.plan.values_per_token == 28
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        assert relative(OptimizedModel(optimised)(ids), model(ids)) < 1e-10


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"per_head": True}, "a part of the keys is not the same for all heads"),
        ({"bias": True}, "values are made with a bias"),
    ],
    ids=str,
)
def test_what_is_nearly_a_latent_stays_ordinary_attention(options, reason):
    model = plain(**options)
    program = capture(model).program
    (site,) = program.sites
    assert site.latent is None
    assert any(reason in note for note in site.notes)
    optimised, report = run_pipeline(program, load_recipe("exact"), executor=OptimizedModel)
    assert [site.payload for site in optimised.plan.sites] == ["kv"]
    assert report.passes[0].name == "cache-latent"
    assert report.passes[0].matched == 0
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        assert relative(OptimizedModel(optimised)(ids), model(ids)) < 1e-10


@pytest.mark.parametrize(
    ("field", "what"), [("up_k", "keys"), ("up_v", "values")], ids=["rows of K", "rows of V"]
)
def test_wrong_rows_of_the_up_projection_are_refused_by_probing(field, what, monkeypatch):
    propose = latents.propose_latent

    def propose_wrongly(*arguments):
        found = propose(*arguments)
        rows = getattr(found.spec, field)
        wrong = dataclasses.replace(rows, start=rows.start - 1 if rows.start else 1)
        spec: LatentSpec = dataclasses.replace(found.spec, **{field: wrong})
        return dataclasses.replace(found, spec=spec)

    monkeypatch.setattr(latents, "propose_latent", propose_wrongly)
    program = capture(plain()).program
    (site,) = program.sites
    assert site.latent is None
    assert any(f"{what} made from the latent differ" in note for note in site.notes)


def test_reads_of_a_latent_are_attention_to_its_own_part():
    """The equations, by hand: values are the first channels of the stored keys."""
    program, _ = apply(InsertCache(), apply(CacheLatent(), latent_program(layers=1))[0])
    site = program.plan.sites[0]
    rows, queries = torch.randn(1, 7, LATENT + SHARED), torch.randn(4, 7, LATENT + SHARED)
    copies = two_copies(site.key, rows.double())
    scoring = Scoring(scale=program.site(0).scale)
    found = attend(queries.double(), torch.arange(7), copies, copies, scoring)[..., :LATENT]
    scores = queries.double() @ rows[0].double().T * scoring.scale
    weights = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(found, weights @ rows[0, :, :LATENT].double())
