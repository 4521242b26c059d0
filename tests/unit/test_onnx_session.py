"""OnnxSession: lengths, bytes, generation, and one clear error for every bad input or folder."""

from __future__ import annotations

import dataclasses
import json

import onnx
import pytest
import torch
from cached import cached_program
from onnx_tools import open_export
from programs import token_ids

from kvxform.codegen.onnx import export_onnx
from kvxform.codegen.onnx.forms import OnnxOptions
from kvxform.errors import ArtifactError, CacheFullError, KvxformError
from kvxform.ir.checksums import hash_file, sealed
from kvxform.ir.schema import canonical_json
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.onnx_session import OnnxSession

INT4 = {"key": {"codec": "int", "bits": 4}, "value": {"codec": "int", "bits": 4}}


def toy(options=None, **model):
    return cached_program(options, None, dtype=torch.float32, layers=1, **model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_onnx(toy(INT4), tmp_path_factory.mktemp("package") / "out")


@pytest.fixture
def session(folder):
    return OnnxSession(folder, threads=1)


@pytest.fixture
def copy(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_lengths_and_bytes_follow_the_cache(session):
    assert session.sequence_lengths() == ()
    assert session.cache_bytes() == 0
    ids = token_ids(toy(), 2, 6)
    session.prefill(ids)
    session.decode(ids[:, 0])
    assert session.sequence_lengths() == (7, 7)
    assert session.cache_bytes() == toy(INT4).plan.bytes_per_token * 7 * 2
    session.reset()
    assert (session.sequence_lengths(), session.cache_bytes()) == ((), 0)


def test_generate_equals_the_eager_lowering(tmp_path):
    program = toy(INT4)
    session, model = open_export(program, tmp_path / "out"), OptimizedModel(program)
    ids = token_ids(program, 2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = session.generate(ids, mask, max_new_tokens=12)
    assert torch.equal(found, model.generate(ids, mask, max_new_tokens=12))
    again = session.generate(ids, mask, max_new_tokens=12)
    assert torch.equal(found, again)


BUFFERS = {
    "L1": (None, OnnxOptions("L1", 24)),
    "L2": (INT4, OnnxOptions("L2", 24)),
    "L3": (None, OnnxOptions("L3", logits="last")),
}


@pytest.mark.parametrize("level", BUFFERS)
def test_rows_in_buffers_are_those_of_the_eager_lowering(level, tmp_path):
    plan, options = BUFFERS[level]
    program = toy(plan)
    session = OnnxSession(export_onnx(program, tmp_path / "out", options), threads=1)
    eager = OptimizedModel(program).new_session(max_batch_size=2, max_seq_len=64)
    ids = token_ids(program, 2, 6)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    calls = [
        lambda s: s.prefill(ids, mask, chunk_size=4, all_logits=True),
        lambda s: s.decode(ids[:, 0]),
        lambda s: s.prefill(ids),
        lambda s: s.prefill(ids, mask.flip(1), chunk_size=2),
        lambda s: s.decode(ids[:, 1]),
    ]
    for call in calls:
        torch.testing.assert_close(call(session), call(eager), rtol=0, atol=1e-4)
    assert session.sequence_lengths() == eager.sequence_lengths() == (14, 20)
    assert session.cache_bytes() == program.plan.bytes_per_token * 256 * 2


def test_generation_stops_at_the_end_token(session):
    ids = token_ids(toy(), 1, 5)
    free = session.generate(ids, max_new_tokens=8, eos_token_id=())
    stop = int(free[0, 7])
    ended = session.generate(ids, max_new_tokens=8, eos_token_id=stop)
    first = free[0, 5:].tolist().index(stop)
    assert ended.tolist() == free[:, : 5 + first + 1].tolist()


def test_chunks_give_what_one_piece_gives(session):
    ids = token_ids(toy(), 2, 9)
    whole = session.prefill(ids, all_logits=True)
    session.reset()
    parts = session.prefill(ids, chunk_size=4, all_logits=True)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)


BAD_CALLS = {
    "decode of nothing": lambda s: s.decode(torch.tensor([1])),
    "id out of range": lambda s: s.prefill(torch.tensor([[48]])),
    "wrong shape": lambda s: s.prefill(torch.tensor([1, 2])),
    "mask with a hole": lambda s: s.prefill(torch.ones(1, 3).long(), torch.tensor([[1, 0, 1]])),
    "no chunk": lambda s: s.prefill(torch.ones(1, 3).long(), chunk_size=0),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_is_refused(name, session):
    with pytest.raises(KvxformError, match=r"^KVX704"):
        BAD_CALLS[name](session)
    assert session.sequence_lengths() == ()


def test_the_number_of_rows_stays(session):
    session.prefill(torch.ones(2, 3).long())
    with pytest.raises(KvxformError, match=r"^KVX704.*2 rows"):
        session.prefill(torch.ones(1, 3).long())
    with pytest.raises(KvxformError, match=r"^KVX704.*2 rows"):
        session.decode(torch.tensor([1, 2, 3]))


def test_a_session_has_room_for_what_was_asked(folder):
    session = OnnxSession(folder, threads=1, max_length=4)
    session.prefill(torch.ones(1, 4).long())
    with pytest.raises(
        CacheFullError, match=r"^KVX703 .*the session's 4 tokens; got 5.*max_length"
    ):
        session.decode(torch.tensor([1]))
    with pytest.raises(KvxformError, match=r"^KVX704 .*max_length must be at least 1; got 0"):
        OnnxSession(folder, max_length=0)


def test_graphs_are_for_cuda(folder):
    with pytest.raises(KvxformError, match=r"^KVX704 .*cuda_graph needs .* got cache grow on cpu"):
        OnnxSession(folder, cuda_graph=True)


def test_pages_are_for_cuda(copy):
    onnx_entry = json.loads((copy / "kvxform.json").read_text())["onnx"]
    edit_description(copy, onnx=onnx_entry | {"cache": "paged"})
    with pytest.raises(KvxformError, match=r"^KVX704 .*pages runs on CUDA alone; got cpu"):
        OnnxSession(copy)


def test_a_sequence_longer_than_the_context_is_refused(tmp_path):
    program = toy()
    program.info = dataclasses.replace(program.info, context_length=6)
    session = open_export(program, tmp_path / "out")
    with pytest.raises(CacheFullError, match=r"^KVX703.*got 7"):
        session.prefill(torch.ones(1, 7).long())
    session.prefill(torch.ones(1, 6).long())
    with pytest.raises(CacheFullError, match=r"^KVX703"):
        session.decode(torch.tensor([1]))
    assert session.sequence_lengths() == (6,)


def test_rows_of_different_length_are_refused_where_planes_would_hold_padding(tmp_path):
    program = toy({**INT4, "regions": {"sink": 2}})
    session = open_export(program, tmp_path / "out")
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(KvxformError, match=r"^KVX704 \[onnx\] rows must be equally long"):
        session.prefill(torch.ones(2, 3).long(), mask)


def remove(folder, name):
    (folder / name).unlink()


def cut(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])


def edit_description(folder, **changes):
    path = folder / "kvxform.json"
    path.write_bytes(canonical_json(sealed(json.loads(path.read_text()) | changes)))


def edit_unsealed(folder, **changes):
    path = folder / "kvxform.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def point_to(folder, location):
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    files = json.loads((folder / "kvxform.json").read_text())["files"]
    edit_description(folder, files=files | {"model.onnx": hash_file(folder / "model.onnx")})


def flip(folder, name, place):
    content = bytearray((folder / name).read_bytes())
    content[place] ^= 1
    (folder / name).write_bytes(content)


DAMAGE = {
    "no graph": (lambda f: remove(f, "model.onnx"), "KVX601"),
    "no data": (lambda f: remove(f, "model.onnx.data"), "KVX601"),
    "no description": (lambda f: remove(f, "kvxform.json"), "KVX601"),
    "half a graph": (lambda f: cut(f, "model.onnx"), "KVX602"),
    "half the data": (lambda f: cut(f, "model.onnx.data"), "KVX602"),
    "half a description": (lambda f: cut(f, "kvxform.json"), "KVX602"),
    "an empty graph": (lambda f: (f / "model.onnx").write_bytes(b""), "KVX602"),
    "noise": (lambda f: (f / "model.onnx").write_bytes(bytes(range(256)) * 9), "KVX602"),
    "another version": (lambda f: edit_description(f, version=99), "KVX604"),
    "no model": (lambda f: edit_description(f, model=None), "KVX602"),
    "no vocabulary": (lambda f: edit_description(f, model={}), "KVX602"),
    "a weight with another bit": (lambda f: flip(f, "model.onnx.data", -1), "KVX602"),
    "an entry of another value": (lambda f: edit_unsealed(f, passes=["x"]), "KVX602"),
    "no padding": (lambda f: edit_description(f, onnx={}), "KVX602"),
    "a parent folder": (lambda f: point_to(f, "../model.onnx.data"), "KVX603"),
    "an absolute path": (lambda f: point_to(f, "/etc/hostname"), "KVX603"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_package_gives_one_coded_error(name, copy):
    damage, code = DAMAGE[name]
    damage(copy)
    with pytest.raises(ArtifactError, match=f"^{code}"):
        OnnxSession(copy)


def test_a_link_out_of_the_folder_is_refused(copy, folder):
    remove(copy, "model.onnx.data")
    (copy / "model.onnx.data").symlink_to(folder / "model.onnx.data")
    with pytest.raises(ArtifactError, match=r"^KVX603"):
        OnnxSession(copy)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ArtifactError, match=r"^KVX601"):
        OnnxSession(tmp_path / "nowhere")
