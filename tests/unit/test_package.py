"""The files of a package: names, metadata, configuration; equal input gives equal bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import onnx
import pytest
import torch
from cached import cached_program
from programs import apply, llama_program

from kvxform.codegen.onnx import export_onnx
from kvxform.codegen.onnx.forms import OnnxOptions
from kvxform.ir.plan import CachePlan
from kvxform.ir.program import Program
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.recipe import load_recipe
from kvxform.runtime.onnx_session import OnnxSession

INT4 = {"key": {"codec": "int", "bits": 4}, "value": {"codec": "int", "bits": 4}}
WITH_ENDS = {**INT4, "regions": {"sink": 2, "recent": 4}}


STREAM = {"codec": "static-int", "bits": 8, "scale": [0.1]}
STATIC = {"key": STREAM, "value": STREAM}


def toy(options=None, **model) -> Program:
    return cached_program(options, None, **{"dtype": torch.float32, **model})


def read(folder, name):
    return json.loads((folder / name).read_text())


def load(folder):
    return onnx.load(str(folder / "model.onnx"), load_external_data=False)


def shape_of(value):
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_an_unquantised_cache_has_the_usual_names_and_symbols(tmp_path):
    graph = load(export_onnx(toy(), tmp_path / "out")).graph
    inputs = {x.name: shape_of(x) for x in graph.input}
    assert list(inputs) == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.key",
        "past_key_values.1.value",
    ]
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert inputs["past_key_values.1.key"] == ["batch_size", 2, "past_sequence_length", 16]
    outputs = {x.name: shape_of(x) for x in graph.output}
    assert list(outputs)[:2] == ["logits", "present.0.key"]
    assert outputs["logits"] == ["batch_size", "sequence_length", 48]
    assert outputs["present.1.value"] == ["batch_size", 2, "total_sequence_length", 16]


def test_every_plane_of_a_quantised_cache_is_an_input_and_an_output(tmp_path):
    graph = load(export_onnx(toy(WITH_ENDS, layers=1), tmp_path / "out")).graph
    names = [x.name for x in graph.input][3:]
    planes = ["codes", "scale", "zero", "sink", "recent"]
    wanted = [f"past_key_values.0.{s}_{plane}" for s in ("key", "value") for plane in planes]
    assert sorted(names) == sorted(wanted)
    present = [x.name.replace("present", "past_key_values") for x in graph.output][1:]
    assert sorted(present) == sorted(wanted)
    shapes = {x.name: shape_of(x) for x in graph.input}
    assert shapes["past_key_values.0.key_codes"] == ["batch_size", 2, "past_key_body_length", 8]
    assert shapes["past_key_values.0.key_sink"] == ["batch_size", 2, "past_key_sink_length", 16]


def test_nodes_are_named_after_layer_and_role_and_know_their_origin(tmp_path):
    nodes = {n.name: n for n in load(export_onnx(toy(), tmp_path / "out")).graph.node}
    attention = nodes["/layers.1/attn/attention"]
    assert attention.op_type == "Attention"
    found = {p.key: p.value for p in attention.metadata_props}
    assert found.pop("kvxform.origin").startswith("attention")
    assert found == {
        "kvxform.also": "1/kvx.cache_append/0",
        "kvxform.layer": "1",
        "kvxform.module": "layers.1.attn",
        "kvxform.node": "1/kvx.cached_attention/0",
        "kvxform.via": "insert-cache",
    }
    assert len(nodes) == len(load(tmp_path / "out").graph.node)


@pytest.mark.parametrize("options", [None, INT4, WITH_ENDS])
def test_every_operation_has_a_cuda_kernel(options, tmp_path):
    graph = load(export_onnx(toy(options), tmp_path / "out")).graph
    assert not {n.op_type for n in graph.node} & {"BitShift", "BitwiseAnd", "BitwiseOr"}
    assert {n.domain for n in graph.node} == {""}


def test_what_all_layers_need_is_there_once(tmp_path):
    graph = load(export_onnx(toy(layers=3), tmp_path / "out")).graph
    kinds = [n.op_type for n in graph.node]
    assert kinds.count("Attention") == 3
    for shared in ("Cos", "Sin", "LessOrEqual", "Or"):
        assert kinds.count(shared) == 1


def test_tied_embeddings_are_stored_once(tmp_path):
    sizes = {}
    for name, tied in (("tied", True), ("untied", False)):
        folder = export_onnx(toy(tied=tied), tmp_path / name)
        sizes[name] = (folder / "model.onnx.data").stat().st_size
    assert sizes["untied"] - sizes["tied"] == 48 * 32 * 4


def test_metadata_name_versions_and_recipe(tmp_path):
    model = load(export_onnx(toy(), tmp_path / "out", recipe=load_recipe("exact")))
    found = {p.key: p.value for p in model.metadata_props}
    assert found["kvxform.recipe"] == "exact"
    assert found["kvxform.opset"] == "23" == str(model.opset_import[0].version)
    assert found["kvxform.ir_version"] == str(model.ir_version)
    assert found["kvxform.minimum_onnxruntime"]


def test_the_description_has_plan_passes_and_recipe_but_no_path(tmp_path):
    program = toy(INT4)
    info = dataclasses.replace(
        program.info, name="/home/me/models/toy", tokenizer_path=str(tmp_path)
    )
    program.info = info
    folder = export_onnx(program, tmp_path / "out", recipe=load_recipe("kv4"))
    data = read(folder, "kvxform.json")
    assert CachePlan.from_json(data["plan"]) == program.plan
    assert data["recipe"]["name"] == "kv4"
    assert data["model"]["name"] == "toy"
    for path in folder.iterdir():
        content = path.read_bytes()
        assert b"/home/me" not in content
        assert str(tmp_path).encode() not in content


def test_the_description_has_the_seeds_of_steps_and_calibration(tmp_path):
    text = {"version": 1, "name": "mine", "passes": [{"rotate-qk": {"seed": 3}}, "rotate-v"]}
    recipe = load_recipe(text | {"calibration": {"tokens": 64, "window": 32, "seed": 5}})
    data = read(export_onnx(toy(), tmp_path / "out", recipe=recipe), "kvxform.json")
    assert data["seeds"] == {"calibration": 5, "0:rotate-qk": 3, "1:rotate-v": None}


def test_the_description_has_the_hash_of_every_file_that_is_not_to_be_edited(tmp_path):
    folder = export_onnx(toy(), tmp_path / "out")
    data = read(folder, "kvxform.json")
    assert data["files"] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model.onnx", "model.onnx.data")
    }
    path = folder / "genai_config.json"
    path.write_text(json.dumps(read(folder, path.name) | {"search": {"max_length": 9}}))
    OnnxSession(folder, threads=1)


def test_equal_programs_give_equal_files(tmp_path):
    for name in "ab":
        export_onnx(toy(WITH_ENDS), tmp_path / name, recipe=load_recipe("kv4"))
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["genai_config.json", "kvxform.json", "model.onnx", "model.onnx.data"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_exporting_again_replaces_the_folder(tmp_path):
    export_onnx(toy(), tmp_path / "out")
    first = (tmp_path / "out" / "model.onnx").read_bytes()
    export_onnx(toy(INT4), tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").read_bytes() != first


def test_tokenizer_files_are_copied_and_nothing_else(tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    for name in ("tokenizer.json", "merges.txt", "chat_template.jinja", "pytorch_model.bin"):
        (source / name).write_text(name)
    folder = export_onnx(toy(), tmp_path / "out", tokenizer_path=source)
    assert (folder / "tokenizer.json").read_text() == "tokenizer.json"
    assert (folder / "merges.txt").exists()
    assert (folder / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert "tokenizer.json" in read(folder, "kvxform.json")["files"]
    assert not (folder / "pytorch_model.bin").exists()


def test_genai_config_describes_geometry_and_a_plain_cache(tmp_path):
    program, _ = apply(InsertCache(), llama_program(dtype=torch.float32))
    program.info = dataclasses.replace(program.info, eos_token_ids=(7,), bos_token_id=1)
    config = read(export_onnx(program, tmp_path / "out"), "genai_config.json")
    decoder = config["model"]["decoder"]
    assert decoder["filename"] == "model.onnx"
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (4, 2)
    assert (decoder["head_size"], decoder["num_hidden_layers"]) == (16, 2)
    assert decoder["inputs"]["past_key_names"] == "past_key_values.%d.key"
    assert decoder["outputs"]["present_value_names"] == "present.%d.value"
    assert (config["model"]["eos_token_id"], config["model"]["pad_token_id"]) == (7, 7)
    assert config["search"]["past_present_share_buffer"] is False


def test_genai_config_names_no_cache_that_genai_cannot_keep(tmp_path):
    config = read(export_onnx(toy(INT4), tmp_path / "out"), "genai_config.json")
    decoder = config["model"]["decoder"]
    assert "past_key_names" not in decoder["inputs"]


FORMS = [
    (None, OnnxOptions(level="L1", opset=23), False, ".key"),
    (None, OnnxOptions(level="L1", opset=24), True, ".key"),
    (None, OnnxOptions(level="L3"), True, ".key"),
    (STATIC, OnnxOptions(level="L3"), True, ".key_codes"),
]


@pytest.mark.parametrize(("plan", "options", "is_shared", "suffix"), FORMS)
def test_genai_config_says_how_the_cache_is_kept(plan, options, is_shared, suffix, tmp_path):
    program = toy(plan)
    program.info = dataclasses.replace(program.info, context_length=64)
    folder = export_onnx(program, tmp_path / "out", options)
    config, graph = read(folder, "genai_config.json"), load(folder).graph
    decoder = config["model"]["decoder"]
    assert config["search"]["past_present_share_buffer"] is is_shared
    assert config["search"]["max_length"] == 64
    for side, ports in (("inputs", graph.input), ("outputs", graph.output)):
        names = {x.name for x in ports}
        told = set()
        for name in decoder[side].values():
            told |= {name % layer for layer in range(2)} if "%d" in name else {name}
        assert told == names, side
    assert decoder["inputs"]["past_key_names"] == f"past_key_values.%d{suffix}"
    assert decoder["session_options"]["provider_options"] == []
    assert decoder["hidden_size"] == 32


def test_genai_config_of_a_paged_cache(tmp_path):
    program = toy(dtype=torch.float16)
    program.info = dataclasses.replace(program.info, context_length=64)
    folder = export_onnx(program, tmp_path / "out", OnnxOptions(level="L4", provider="cuda"))
    config = read(folder, "genai_config.json")
    decoder = config["model"]["decoder"]
    assert decoder["inputs"] == {
        **{n: n for n in ("input_ids", "block_table", "cumulative_sequence_lengths")},
        **{n: n for n in ("past_sequence_lengths", "attention_metadata")},
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    assert decoder["session_options"]["provider_options"] == [{"cuda": {"enable_cuda_graph": "0"}}]
    assert config["engine"]["dynamic_batching"]["block_size"] == 256


@pytest.mark.parametrize(("family", "kind"), [("qwen3", "qwen3"), ("falcon", "llama")])
def test_genai_config_names_a_kind_of_decoder_that_genai_knows(family, kind, tmp_path):
    program = toy()
    program.info = dataclasses.replace(program.info, family=family)
    config = read(export_onnx(program, tmp_path / "out"), "genai_config.json")
    assert config["model"]["type"] == kind


def test_progress_is_told(tmp_path):
    told = []
    export_onnx(toy(), tmp_path / "out", progress=told.append)
    assert told == ["emit graph", "write package"]
