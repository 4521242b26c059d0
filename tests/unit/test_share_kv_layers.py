"""share-kv-layers: who reads whom, what is removed, and when it changes nothing."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from equal_layers import equal_layers
from families import ALL
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import apply, fired, gpt2_program, llama_program, reasons, run, to_meta, token_ids

import kvxform
from kvxform.calibrate.collecting import collect
from kvxform.capture import capture
from kvxform.errors import PassError, RecipeError
from kvxform.ir.facts import Facts
from kvxform.ir.program import Program
from kvxform.order import plan_passes
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.structure.share_kv_layers import ShareKvLayers
from kvxform.recipe import load_recipe
from kvxform.recipe_steps import PassStep
from kvxform.structure.owner_map import every_nth, resolve
from kvxform.structure.owner_search import SharingBench, in_order, search
from kvxform.structure.windows import spread_windows

SLOW = ("llama", "qwen2", "gpt_neox", "persimmon", "phi3")
FAMILIES = ["qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", *SLOW))]
IDS = torch.randint(0, 48, (6, 24), generator=torch.Generator().manual_seed(5))


def explicit(**owners: int) -> ShareKvLayers:
    return ShareKvLayers("explicit", map={key[1:]: owner for key, owner in owners.items()})


def owners(program: Program) -> list[int]:
    return [site.owner for site in program.sites]


def recipe(**options) -> dict:
    steps = [{"share-kv-layers": options}, "insert-cache", {"page-cache": {"page_size": 16}}]
    return {"version": 1, "name": "t", "passes": steps}


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_layers_share_without_a_difference(family):
    source = equal_layers(family)
    optimized = kvxform.optimize(source, recipe())
    assert owners(optimized.program) == [0, 0]
    ids = torch.randint(0, 90, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = source(ids).logits
    assert float((optimized(ids) - expected).abs().max()) <= 1e-8
    session = optimized.new_session(2, 32)
    session.prefill(ids[:, :11], chunk_size=4)
    for t in range(11, 19):
        assert float((session.decode(ids[:, t]) - expected[:, t]).abs().max()) <= 1e-8


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["gpt2", "qwen3", *SLOW, "falcon", "falcon new decoder", "bloom"]
)
def test_a_reader_has_no_rows_for_keys_and_values(family):
    program = capture(ALL[family].build(torch.float32)).program
    shared, found = apply(ShareKvLayers(), program)
    assert fired(found) == 1
    site = program.sites[1]
    rows = site.num_kv_heads * (site.head_dim + site.v_head_dim)
    before, after = (sum(w.numel() for w in p.weights.values()) for p in (program, shared))
    assert before - after >= rows * 48, "48 inputs a row, and what is left of biases and norms"
    assert {n for n in shared.weights if ".1." not in n and "layers.1" not in n} == {
        n for n in program.weights if ".1." not in n and "layers.1" not in n
    }


def test_a_fused_weight_that_something_else_reads_stays():
    program = gpt2_program()
    twin = program.weights["h.0.attn.c_attn.weight"]
    program.weights["h.1.attn.c_attn.weight"] = twin
    shared, _ = apply(ShareKvLayers(), program)
    assert shared.weights["h.1.attn.c_attn.weight"] is twin
    assert shared.site(1).q == program.site(1).q
    alone, _ = apply(ShareKvLayers(), gpt2_program())
    assert alone.weights[alone.site(1).q.weight].shape == (32, 32)
    ids = token_ids(program)
    torch.testing.assert_close(run(alone, ids), run(unfused(), ids))


def unfused() -> Program:
    """Return a program that shares, with the queries of layer 1 from the whole fused weight."""
    whole = gpt2_program()
    for node in whole.graph.nodes:
        if node.op == "call_function" and node.kwargs.get("layer") == 1:
            (first,) = (n for n in whole.graph.nodes if n.kwargs.get("layer") == 0)
            node.args = (node.args[0], *first.args[1:3], node.args[3])
    return whole


def test_keys_come_from_the_owner_and_queries_do_not():
    program = llama_program(layers=3, bias=True)
    shared, _ = apply(explicit(_1=0, _2=0), program)
    changed = shared.clone()
    ids = token_ids(program)
    changed.weights["layers.0.attn.k.weight"] = program.weights["layers.0.attn.k.weight"] * 2
    assert not torch.allclose(run(changed, ids), run(shared, ids))
    nodes = [shared.attention_node(layer) for layer in range(3)]
    assert len({node.args[1:3] for node in nodes}) == 1
    assert len({node.args[0] for node in nodes}) == 3
    assert not [n for n in shared.weights if n.startswith(("layers.1.attn.k", "layers.2.attn.v"))]
    assert [site.k for site in shared.sites] == [program.sites[0].k] * 3


def test_healing_may_train_readers_and_what_they_read():
    shared, _ = apply(explicit(_1=0), llama_program(layers=3, bias=True))
    readers = [f"layers.1.attn.{name}" for name in ("q.weight", "q.bias", "o.weight")]
    read = [f"layers.0.attn.{x}.{part}" for x in "kv" for part in ("weight", "bias")]
    assert shared.touched == dict.fromkeys([*readers, *read], "share-kv-layers")
    fused, _ = apply(ShareKvLayers(), gpt2_program())
    names = [n.removeprefix("h.1.attn.") for n in fused.touched if n.startswith("h.1")]
    assert sorted(names) == ["c_attn.q.bias", "c_attn.q.weight", "c_proj.bias", "c_proj.weight"]
    assert {"h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias"} < set(fused.touched)


@pytest.mark.parametrize("planner", [ShareKvLayers(n=1), explicit(_0=0, _2=2)])
def test_the_identity_map_changes_nothing(planner):
    program = llama_program(layers=3)
    same, found = apply(planner, program)
    assert [miss.done for miss in found] == [True] * 3
    assert same.weights == program.weights
    assert torch.equal(run(same, token_ids(program)), run(program, token_ids(program)))
    assert not same.touched


def test_chains_lead_to_the_root():
    program = llama_program(layers=4)
    shared, _ = apply(explicit(_3=2, _2=1), program)
    assert owners(shared) == [0, 1, 1, 1]
    again, found = apply(explicit(_1=0), shared)
    assert owners(again) == [0, 0, 0, 0]
    assert fired(found) == 3
    assert len(list(again.weights)) < len(list(shared.weights))


@given(st.integers(1, 12), st.integers(1, 5), st.data())
@settings(max_examples=25, deadline=None)
def test_maps_lead_to_owners_that_own(layers, n, data):
    plain = {layer: layer for layer in range(layers)}
    readers = data.draw(st.dictionaries(st.integers(0, layers - 1), st.integers(0, layers - 1)))
    wanted = {reader: min(reader, owner) for reader, owner in readers.items()}
    for roots in (resolve(plain, wanted, "t"), resolve(plain, every_nth(range(layers), n), "t")):
        assert all(roots[owner] == owner <= layer for layer, owner in roots.items())
    assert len(set(every_nth(range(layers), n).values())) == -(-layers // n)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"window": 7}, "layer 1 has a window of 7, layer 0 None"),
        ({"chunk": 8}, "layer 1 has chunks of 8, layer 0 None"),
        ({"rope": None}, "another position encoding"),
        ({"num_kv_heads": 4}, "layer 1 has KV heads: 4, layer 0 2"),
        ({"head_dim": 8}, "layer 1 has a head_dim of 8, layer 0 16"),
        ({"v_head_dim": 8}, "a head_dim of values of 8"),
    ],
)
def test_layers_that_differ_are_refused(change, said):
    program = llama_program()
    program.sites = (program.sites[0], dataclasses.replace(program.sites[1], **change))
    with pytest.raises(PassError, match=said) as caught:
        ShareKvLayers().match(program)
    assert caught.value.code == "KVX205"


def test_frequencies_are_compared_by_value():
    program = llama_program()
    program.weights["other"] = program.weights["inv_freq"].clone()
    rope = dataclasses.replace(program.sites[1].rope, inv_freq="other")
    program.sites = (program.sites[0], dataclasses.replace(program.sites[1], rope=rope))
    assert fired(ShareKvLayers().match(program)) == 1
    program.weights["other"] *= 2
    with pytest.raises(PassError, match="other frequencies of RoPE than layer 0"):
        ShareKvLayers().match(program)


@pytest.mark.parametrize(
    ("options", "code", "rule"),
    [
        ({"n": 0}, "KVX107", "n must be at least 1"),
        ({"share": 1.0}, "KVX107", "share must be"),
        ({"planner": "explicit"}, "KVX107", "either map or file"),
        ({"map": {"1": 0}}, "KVX107", "either map or file"),
        ({"planner": "explicit", "map": {"one": 0}}, "KVX107", "by number"),
        ({"planner": "explicit", "map": {"1": 7}}, "KVX205", "layers of the model; got 7"),
        ({"planner": "explicit", "map": {"0": 1}}, "KVX205", "before .* layer 0 reading 1"),
        ({"planner": "explicit", "file": "nowhere.json"}, "KVX107", "nowhere"),
    ],
)
def test_refusals(options, code, rule):
    with pytest.raises((PassError, RecipeError), match=rule) as caught:
        ShareKvLayers(**options).match(llama_program())
    assert caught.value.code == code


@pytest.mark.parametrize("text", ['{"1": 0, "3": 2}', "1: 0\n3: 2\n", "[0, 0, 2, 2]"])
def test_maps_in_files(tmp_path, text):
    path = tmp_path / "map.json"
    path.write_text(text)
    shared, _ = apply(ShareKvLayers("explicit", file=str(path)), llama_program(layers=4))
    assert owners(shared) == [0, 0, 2, 2]


@pytest.mark.parametrize("text", ["[0, 0]", "3", "{1: [0]}", "{1: 0"])
def test_files_that_are_no_maps(tmp_path, text):
    path = tmp_path / "map.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="KVX107"):
        ShareKvLayers("explicit", file=str(path)).match(llama_program(layers=4))


def test_it_comes_before_the_cache():
    steps = [PassStep("insert-cache"), PassStep("share-kv-layers")]
    with pytest.raises(RecipeError, match=r"KVX214.*move share-kv-layers above insert-cache"):
        plan_passes(steps, Facts(), auto_order=False)


def calibrated(layers: int = 6, **options) -> Program:
    program = llama_program(layers=layers, **options)
    return dataclasses.replace(program, calibration=collect(program, IDS, name="text"))


def test_distances_are_those_of_averaged_keys_and_values():
    program = calibrated(3)
    seen = {}
    bench = SharingBench(program, IDS)
    for layer, statistics in program.calibration.layers.items():
        pair = (statistics.k_post.samples, statistics.v.samples)  # every token is a sample
        seen[layer] = torch.cat([x.unflatten(1, IDS.shape).mean(1).flatten() for x in pair])
    for (a, b), distance in bench.distances().items():
        assert distance == pytest.approx(float((seen[a] - seen[b]).norm()), rel=1e-4)
    assert bench.similarity({0: 0, 1: 1, 2: 2}) == pytest.approx(1.0)
    ranked = in_order(bench.distances(), "dissimilar")
    assert ranked == in_order(bench.distances(), "similar")[::-1]


def test_similarity_is_that_of_the_rewritten_program():
    program = calibrated(3)
    shared, _ = apply(explicit(_2=0), program)
    hidden = []
    for p in (program, shared):
        p = p.clone()
        p.weights["head.weight"] = torch.eye(32, dtype=torch.float64)
        hidden.append(run(p, IDS))
    expected = torch.cosine_similarity(*hidden, dim=-1).mean()
    found = SharingBench(program, IDS).similarity({0: 0, 1: 1, 2: 0})
    assert found == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("order", ["dissimilar", "similar"])
def test_a_search_shares_up_to_its_share(order):
    program = calibrated()
    searching = ShareKvLayers("search", share=0.5, threshold=-1.0, order=order)
    shared, found = apply(searching, program)
    assert fired(found) == 3
    first = in_order(SharingBench(program, IDS).distances(), order)[0]
    assert shared.site(first[1]).owner == first[0]
    _, found = apply(searching, shared)
    assert not fired(found)
    _, found = apply(searching, to_meta(program))
    assert fired(found) == 3


def test_nothing_is_similar_enough_for_the_highest_threshold():
    strict = ShareKvLayers("search", threshold=1.0)
    program = calibrated()
    _, found = apply(strict, program)
    assert reasons(found) == ["the search found no layers to share"]
    few = dataclasses.replace(strict, share=0.1, threshold=-1.0)
    _, found = apply(few, program)
    assert [miss.done for miss in found] == [False]


@given(st.lists(st.floats(0, 1), min_size=15, max_size=15), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_a_search_never_makes_owners_and_accepts_less_at_a_higher_threshold(values, a, b):
    plain = {layer: layer for layer in range(6)}
    pairs = [(i, j) for j in range(6) for i in range(j)]
    answers = iter(values)
    known: dict[tuple[int, ...], float] = {}

    def similarity(trial):
        assert len(set(trial.values())) == 5 - len(path)
        key = tuple(trial.values())
        known.setdefault(key, next(answers, 0.5))
        if known[key] > low:
            path.append(key)
        return known[key]

    low, path = min(a, b), list[tuple[int, ...]]()
    found = search(plain, pairs, similarity, threshold=low, readers=4)
    assert len(set(found.owners.values())) == 6 - len(found.accepted) == 6 - len(path)
    assert len(found.accepted) <= 4
    kept = [similarity_ for _, similarity_ in found.accepted]
    assert all(x > low for x in kept)
    high = max(a, b)
    first = found.accepted[0][1] if found.accepted else None
    strict = search(plain, pairs[:1], lambda t: known[tuple(t.values())], threshold=high, readers=1)
    lax = search(plain, pairs[:1], lambda t: known[tuple(t.values())], threshold=low, readers=1)
    assert len(strict.accepted) <= len(lax.accepted)
    assert first is None or first > low


def test_windows_are_spread_over_the_text():
    text = torch.arange(100).reshape(2, 50)
    assert spread_windows(text, 40, 10)[:, 0].tolist() == [0, 20, 50, 70]
    assert spread_windows(text, 5, 80).shape == (1, 50)


def test_bytes_are_those_of_the_owners():
    program, _ = apply(InsertCache(), llama_program(layers=5))
    shared, _ = apply(InsertCache(), apply(ShareKvLayers(), llama_program(layers=5))[0])
    assert shared.plan.bytes_per_token * 5 == program.plan.bytes_per_token * 3
    assert [s.layer for s in shared.plan.owners] == [0, 2, 4]


@pytest.mark.parametrize("name", ["cla2", "kvsharer-25"])
def test_recipes_are_what_they_say(name):
    (step,) = (s for s in load_recipe(name).passes if s.name == "share-kv-layers")
    assert step.options["planner"] == {"cla2": "every-n", "kvsharer-25": "search"}[name]
    assert json.dumps(step.options)
