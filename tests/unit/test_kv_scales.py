"""Scale files: what GenAI's calibrator writes is read, what packages hold is read by both."""

from __future__ import annotations

import json

import pytest
import torch
from cached import cached_program

from kvxform.codecs.base import make_codec
from kvxform.codecs.static_int import StaticIntCodec
from kvxform.errors import PassError, RecipeError
from kvxform.ir.kv_scales import KvScales, read_kv_scales, scales_of
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.recipe import build_pass, load_recipe
from kvxform.recipe_scales import with_kv_scales

HEADS, WIDTH = 2, 16
STATIC = {"codec": "static-int", "bits": 8}


def write(path, data):
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def recipe(key=STATIC, value=STATIC, **options):
    quantise = {"quantize-kv": {"key": key, "value": value, **options}}
    return load_recipe({"version": 1, "name": "own", "passes": ["insert-cache", quantise]})


def options_of(changed):
    (step,) = (step for step in changed.passes if step.name == "quantize-kv")
    return step.options["layers"]


def test_one_number_a_layer_is_a_scale_of_the_tensor(tmp_path):
    data = {"scales": {"k_scales": [0.1, 0.2], "v_scales": [[0.3], [0.4]]}}
    scales = read_kv_scales(write(tmp_path / "s.json", data))
    layers = options_of(with_kv_scales(recipe(), scales))
    assert list(layers) == ["0", "1"]
    (step,) = (s for s in with_kv_scales(recipe(), scales).passes if s.options)
    assert not build_pass(step).needs_calibration
    for layer, key, value in (("0", 0.1, 0.3), ("1", 0.2, 0.4)):
        for stream, scale in (("key", key), ("value", value)):
            codec = make_codec(layers[layer][stream])
            assert codec == StaticIntCodec(8, "tensor", scale=(scale,))


def test_a_list_a_layer_is_a_scale_of_each_channel_head_by_head(tmp_path):
    keys, values = (
        [[i + n / 100 for n in range(HEADS * WIDTH)] for i in at] for at in ((1, 2), (3, 4))
    )
    data = {"scales": {"k_scales": keys, "v_scales": values}, "layer_ids": [3, 7]}
    layers = options_of(with_kv_scales(recipe(), read_kv_scales(write(tmp_path / "s.json", data))))
    assert list(layers) == ["3", "7"]
    codec = make_codec(layers["7"]["key"])
    assert codec.axis == "channel"
    assert float(codec.scales(WIDTH)[1, 0, 5]) == pytest.approx(2 + (WIDTH + 5) / 100)


def test_scales_for_other_bits_are_converted_if_the_file_says_so(tmp_path):
    data = {"scales": {"k_scales": [0.5], "v_scales": [0.25]}, "qmax": 128.0}
    four = recipe({**STATIC, "bits": 4}, {**STATIC, "bits": 4})
    for half, expected in ((128.0, 8.0), (8.0, 0.5), (None, 0.5)):
        scales = read_kv_scales(write(tmp_path / "s.json", {**data, "qmax": half}))
        assert options_of(with_kv_scales(four, scales))["0"]["key"]["scale"] == [expected]


@pytest.mark.parametrize("axis", ["tensor", "channel"])
@pytest.mark.parametrize("center", [False, True])
def test_a_plan_comes_back_from_its_file(tmp_path, axis, center):
    generator = torch.Generator().manual_seed(0)

    def numbers(count):
        return tuple((torch.rand(count, generator=generator) + 0.1).tolist())

    def codec():
        scale = numbers(1 if axis == "tensor" else HEADS * WIDTH)
        offset = numbers(HEADS * WIDTH) if center else None
        return StaticIntCodec(4, axis, center=center, scale=scale, offset=offset).to_dict()

    layers = {str(i): {"key": codec(), "value": codec()} for i in range(2)}
    program = cached_program({"layers": layers})
    scales = scales_of(program.plan)
    data = json.loads(json.dumps(scales.to_data()))
    assert data["qmax"] == 8.0
    assert data["basis"] == {"k": "identity", "v": "identity"}
    assert ("offsets" in data) == center
    sizes = {len(torch.tensor(e).flatten()) for own in data["scales"].values() for e in own}
    assert sizes == {1 if axis == "tensor" else HEADS * WIDTH}
    four = {**STATIC, "bits": 4, "threshold": "mse"}
    found = with_kv_scales(recipe(four, four), read_kv_scales(write(tmp_path / "s.json", data)))
    for name, own in options_of(found).items():
        assert {s: make_codec(c) for s, c in own.items()} == {
            s: make_codec(c) for s, c in layers[name].items()
        }


def test_plans_without_static_scales_have_no_file():
    assert scales_of(cached_program().plan) is None
    given = {**STATIC, "scale": [1.0]}
    assert scales_of(cached_program({"key": given}).plan) is None
    assert scales_of(cached_program({"key": given, "value": given}).plan) is not None
    mixed = cached_program({"key": given, "value": {**given, "bits": 4}})
    assert scales_of(mixed.plan) is None


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        ([], "must have scales"),
        ({"scales": {"k_scales": [1.0]}}, "must have scales"),
        ({"scales": {"k_scales": 1.0, "v_scales": [1.0]}}, "an entry for each layer"),
        ({"scales": {"k_scales": [1.0, 2.0], "v_scales": [1.0]}}, "of K and of V for each layer"),
        ({"scales": {"k_scales": [1.0], "v_scales": [1.0]}, "layer_ids": [1, 2]}, "for each layer"),
        ({"scales": {"k_scales": ["a"], "v_scales": [1.0]}}, "a number or a list"),
        ({"scales": {"k_scales": [[]], "v_scales": [1.0]}}, "a number or a list"),
        ({"scales": {"k_scales": [0.0], "v_scales": [1.0]}}, "scales must be positive"),
        ({"scales": {"k_scales": [1.0], "v_scales": [1.0]}, "qmax": 0}, "qmax must be"),
        (
            {"scales": {"k_scales": [1.0], "v_scales": [1.0]}, "offsets": {"k_offsets": []}},
            "offsets for each layer",
        ),
    ],
)
def test_files_that_are_no_scale_files_are_refused(tmp_path, data, rule):
    with pytest.raises(RecipeError, match=f"KVX109.*s.json.*{rule}"):
        read_kv_scales(write(tmp_path / "s.json", data))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"KVX109.*No such file"):
        read_kv_scales(tmp_path / "s.json")
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(RecipeError, match=r"KVX109.*no JSON"):
        read_kv_scales(tmp_path / "s.json")


def test_recipes_without_a_place_for_scales_are_refused():
    scales = KvScales({"key": {0: (1.0,)}, "value": {0: (1.0,)}})
    for other in (
        load_recipe("kv4"),
        load_recipe("exact"),
        recipe(value=None),
        recipe(layers={"0": {"key": {**STATIC, "bits": 4}}}),
    ):
        with pytest.raises(RecipeError, match=r"KVX109.*need a quantize-kv with codec static-int"):
            with_kv_scales(other, scales)


def test_scales_of_another_model_are_refused():
    given = {**STATIC, "axis": "channel", "scale": [1.0] * (3 * WIDTH)}
    with pytest.raises(PassError, match=r"KVX203 \[quantize-kv\] scale of codec .* 2 x 16"):
        QuantizeKv(given, given).match(cached_program())
