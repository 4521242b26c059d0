"""What a package needs from the installed runtime: one clear error for each missing thing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from buffer_graphs import FORM, write_graph

from kvxform.errors import ArtifactError, KvxformError
from kvxform.runtime import onnx_engine
from kvxform.runtime.onnx_engine import Engine, Port
from kvxform.runtime.onnx_runtime import CUDA, NO_TILES, SIZE_OPS, import_runtime

CPU = "CPUExecutionProvider"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_graph(tmp_path_factory.mktemp("graph"))


class FakeRuntime:
    """A build for CUDA, by default one that works.

    `placed` are nodes as (provider, operator); `fails` is what the runtime says of the graph.
    """

    def __init__(
        self, available=(CUDA, CPU), loaded=(CUDA, CPU), placed=(), fails="", version="1.31.0"
    ) -> None:
        self.__version__ = version
        self.available, self.loaded = list(available), list(loaded)
        self.placed, self.fails = placed, fails
        self.entries, self.settings = {}, {}

    def get_available_providers(self):
        return self.available

    def SessionOptions(self):  # noqa: N802
        return SimpleNamespace(add_session_config_entry=self.entries.__setitem__)

    def InferenceSession(self, path, options, providers):  # noqa: N802
        self.settings = dict(providers)
        if self.fails:
            raise RuntimeError(self.fails)
        parts = [
            SimpleNamespace(ep_name=ep, get_nodes=lambda op=op: [SimpleNamespace(op_type=op)])
            for ep, op in self.placed
        ]
        logits = SimpleNamespace(name="logits", shape=["b", "s", 9], type="tensor(float16)")
        return SimpleNamespace(
            get_providers=lambda: self.loaded,
            get_provider_graph_assignment_info=lambda: parts,
            get_inputs=list,
            get_outputs=lambda: [logits],
        )


def load(monkeypatch, runtime, provider="cuda", has_gpu=True, **options):
    monkeypatch.setattr(onnx_engine, "import_runtime", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    return Engine(Path("somewhere"), FORM | {"runtime": "1.20"}, provider, **options)


def test_a_build_that_fits_is_taken_with_the_settings_that_were_asked_for(monkeypatch):
    runtime = FakeRuntime(placed=[(CUDA, "MatMul"), (CPU, "Squeeze")])
    engine = load(monkeypatch, runtime, cuda_graph=True)
    assert engine.device.type == "cuda"
    assert runtime.settings == {CUDA: {"enable_cuda_graph": "1"}}
    assert engine.logits.dtype is torch.float16
    load(monkeypatch, runtime, cuda_graph=False)
    assert runtime.settings == {CUDA: {"enable_cuda_graph": "0"}}


REFUSED = {
    "no build for CUDA": (FakeRuntime(available=[CPU]), True, r"KVX704 .*build.*for CUDA; got CPU"),
    "an old build": (
        FakeRuntime(version="1.29.2"),
        True,
        r"KVX704 .*provider cuda needs ONNX Runtime 1\.30 or newer; got 1\.29\.2",
    ),
    "no GPU": (FakeRuntime(), False, r"KVX704 .*a GPU that torch can use"),
    "no libraries": (FakeRuntime(loaded=[CPU]), True, r"KVX704 .*load its CUDA provider"),
    "a node on the CPU": (
        FakeRuntime(placed=[(CPU, "Shape"), (CPU, "BitShift")]),
        True,
        r"KVX704 .*every node must run on CUDA; got BitShift on the CPU",
    ),
    "no graph": (
        FakeRuntime(fails="cannot use the graph capture feature as all nodes are elsewhere"),
        True,
        r"KVX704 .*CUDA graph needs every node on CUDA; got nodes are elsewhere",
    ),
    "another fault": (FakeRuntime(fails="no such op\nsecond line"), True, "KVX602.*no such op"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_needs(name, monkeypatch):
    runtime, has_gpu, message = REFUSED[name]
    with pytest.raises(KvxformError, match=f"^{message}") as caught:
        load(monkeypatch, runtime, has_gpu=has_gpu)
    assert "\n" not in str(caught.value)


def test_sizes_may_be_computed_on_the_cpu_and_nothing_else():
    heavy = {"MatMul", "Attention", "Softmax", "Floor", "GroupQueryAttention", "TensorScatter"}
    assert not SIZE_OPS & heavy


def test_an_unknown_provider(folder):
    with pytest.raises(KvxformError, match=r"^KVX704 .*cpu or cuda; got tpu"):
        Engine(folder, FORM, "tpu")


def test_an_old_runtime(folder):
    with pytest.raises(KvxformError, match=r"^KVX704 .*needs ONNX Runtime 9\.2 or newer; got 1\."):
        Engine(folder, FORM | {"runtime": "9.2"}, "cpu")
    assert Engine(folder, FORM | {"runtime": "1.9"}, "cpu").level == "L3", "numbers, not text"


def test_no_runtime_at_all(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(KvxformError, match=r"^KVX704 .*needs the package onnxruntime"):
        import_runtime()


def test_a_graph_without_logits(tmp_path):
    write_graph(tmp_path)
    model = onnx.load(str(tmp_path / "model.onnx"))
    del model.graph.output[0]
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(ArtifactError, match=r"^KVX602 .*output logits; got present"):
        Engine(tmp_path, FORM, "cpu")


def test_an_input_of_another_dtype(tmp_path):
    write_graph(tmp_path)
    model = onnx.load(str(tmp_path / "model.onnx"))
    extra = onnx.helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [1])
    model.graph.input.append(extra)
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(ArtifactError, match=r"^KVX602 .*flag must have a dtype.*tensor\(bool\)"):
        Engine(tmp_path, FORM, "cpu")


def test_a_graph_that_the_runtime_cannot_load(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match=r"^KVX602"):
        Engine(tmp_path, FORM, "cpu")


@pytest.mark.parametrize("given", [None, "0"])
def test_scores_are_worked_out_in_one_piece_unless_the_environment_says_otherwise(
    tmp_path, monkeypatch, given
):
    write_graph(tmp_path)
    if given is None:
        monkeypatch.delenv(NO_TILES, raising=False)
    else:
        monkeypatch.setenv(NO_TILES, given)
    seen, make = [], onnxruntime.InferenceSession

    def watch(*args, **options):
        seen.append(os.environ[NO_TILES])
        return make(*args, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watch)
    Engine(tmp_path, FORM, "cpu")
    assert seen == [given or "1"]
    assert os.environ.get(NO_TILES) == given


@pytest.mark.parametrize("shape", [("B", None, "T", 4), ("B", 2, "T", "D"), ("B", 2, 4)])
def test_a_plane_declares_heads_and_width(shape):
    assert Port("past", ("B", 2, "T", 4), torch.int8).sizes(3, 5) == [3, 2, 5, 4]
    with pytest.raises(ArtifactError, match="must declare its heads and its width") as caught:
        Port("past", shape, torch.int8).sizes(3, 5)
    assert caught.value.code == "KVX602"
