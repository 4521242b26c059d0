from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvxform.passes  # noqa: F401  (fills the registry)
from kvxform.errors import ArtifactError
from kvxform.ir.artifact import load_artifact, load_program, save_artifact, save_program
from kvxform.ir.program import Program
from kvxform.ir.text import format_program
from kvxform.pass_base import PASSES
from tests.programs import apply, gpt2_program, llama_program, run, token_ids

MEMBERS = ("program.json", "plan.json", "weights.safetensors")
EXTRA = {"report.json": "{}\n", "kernels/layer.py": "print('never run')\n", "logo.bin": b"\x00\xff"}


def quantised() -> Program:
    program = llama_program(layers=1, tied=True, dtype=torch.float32)
    options = {"codec": "int", "bits": 4}
    for name, fields in (
        ("rotate-v", {}),
        ("insert-cache", {}),
        ("page-cache", {"page_size": 16}),
        ("quantize-kv", {"key": options, "value": options}),
    ):
        program = apply(PASSES[name](**fields), program)[0]
    program.passes = ("rotate-v", "insert-cache", "page-cache", "quantize-kv")
    return program


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "out"
    save_artifact(folder, quantised(), EXTRA)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def edit(path: Path, change) -> None:
    data = json.loads(path.read_bytes())
    change(data)
    path.write_text(json.dumps(data))


# Round trip


@pytest.mark.parametrize(
    "program", [llama_program(), llama_program(dtype=torch.bfloat16), gpt2_program(), quantised()]
)
def test_a_loaded_program_is_the_program_that_was_saved(program, tmp_path):
    save_artifact(tmp_path / "out", program)
    loaded = load_artifact(tmp_path / "out")
    assert format_program(loaded) == format_program(program)
    assert (loaded.sites, loaded.info, loaded.plan) == (program.sites, program.info, program.plan)
    assert loaded.facts.changed() == program.facts.changed()
    assert loaded.passes == program.passes
    assert loaded.weights.keys() == program.weights.keys()
    assert all(torch.equal(loaded.weights[n], w) for n, w in program.weights.items())
    ids = token_ids(program)
    assert torch.equal(run(loaded, ids), run(program, ids))


def test_a_loaded_program_can_be_saved_over_itself(copy):
    before = content(copy)
    save_artifact(copy, load_artifact(copy), EXTRA)
    assert content(copy) == before


def test_an_artifact_holds_all_files_and_their_hashes(saved):
    files = content(saved)
    assert files.keys() == {*MEMBERS, *EXTRA, "checksums.json"}
    assert files["logo.bin"] == b"\x00\xff"
    checksums = json.loads(files["checksums.json"])
    assert checksums["files"].keys() == files.keys() - {"checksums.json"}
    assert checksums["made_with"].keys() == {"kvxform", "torch", "transformers"}


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    program = llama_program()
    program.weights["head.weight"] = program.weights["embed.weight"]
    save_program(program, tmp_path)
    table = json.loads((tmp_path / "program.json").read_bytes())["weights"]
    assert table["head.weight"]["stored"] == table["embed.weight"]["stored"]
    loaded = load_program(tmp_path).weights
    assert loaded["head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()
    size = sum(w.nbytes for n, w in program.weights.items() if n != "head.weight")
    assert (tmp_path / "weights.safetensors").stat().st_size < size + 4096


def test_weights_that_are_views_or_not_contiguous_are_saved(tmp_path):
    program = llama_program()
    big = torch.randn(96, 64, dtype=torch.float64)
    program.weights["head.weight"] = big[:64, :48].T[:, :32]
    program.weights["embed.weight"] = big[48:, :32]
    save_program(program, tmp_path)
    loaded = load_program(tmp_path).weights
    assert torch.equal(loaded["head.weight"], big[:32, :48].T)
    assert torch.equal(loaded["embed.weight"], big[48:, :32])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps shows what is mapped")
def test_weights_are_mapped_not_read(saved):
    loaded = load_program(saved)
    address = loaded.weights["embed.weight"].data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [m[0] for m in maps if m[-1] == str(saved / "weights.safetensors")]
    bounds = [tuple(int(end, 16) for end in span.split("-")) for span in mapped]
    assert any(low <= address < high for low, high in bounds)


# Determinism

SAVE = """
import sys
from pathlib import Path
from tests.unit.test_artifact import EXTRA, quantised
from kvxform.ir.artifact import save_artifact

save_artifact(Path(sys.argv[1]), quantised(), EXTRA)
"""


def test_equal_programs_give_equal_bytes_in_any_process(saved, tmp_path):
    root = Path(__file__).parents[2]
    processes = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", SAVE, str(tmp_path / seed)]
        processes.append(subprocess.Popen(command, env=environment, cwd=root))
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(saved)


def test_no_path_of_this_machine_is_saved(tmp_path):
    program = quantised()
    program.info = type(program.info)("toy", "toy", 48, "float32", tokenizer_path="/home/me")
    save_artifact(tmp_path / "out", program)
    assert not [n for n, data in content(tmp_path / "out").items() if b"/home/me" in data]


# Damage


def test_a_missing_folder(tmp_path):
    with pytest.raises(ArtifactError, match="KVX601"):
        load_artifact(tmp_path / "nothing")


@pytest.mark.parametrize("name", [*MEMBERS, *EXTRA, "checksums.json"])
def test_a_missing_file(copy, name):
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match=f"KVX601 .* no file {name}"):
        load_artifact(copy)


@pytest.mark.parametrize("name", [*MEMBERS, *EXTRA])
def test_one_changed_byte_is_found(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"KVX602 \[{name}\] .* as it was saved"):
        load_artifact(copy)


@pytest.mark.parametrize("name", ["program.json", "plan.json", "checksums.json"])
def test_another_version_is_refused_by_name(copy, name):
    edit(copy / name, lambda data: data.update(version=2))
    load = load_artifact if name == "checksums.json" else load_program
    with pytest.raises(ArtifactError, match=rf"KVX604 \[{name}\] .* got 2"):
        load(copy)


def test_checksums_must_name_the_program(copy):
    edit(copy / "checksums.json", lambda data: data["files"].pop("program.json"))
    expected = r"KVX602 \[checksums.json\] the checksums must name program"
    with pytest.raises(ArtifactError, match=expected):
        load_artifact(copy)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "kernels/../../secret"])
def test_a_lock_cannot_point_out_of_the_folder(copy, name):
    (copy.parent / "secret").write_text("s")
    edit(copy / "checksums.json", lambda data: data["files"].update({name: "0" * 64}))
    with pytest.raises(ArtifactError, match="KVX603"):
        load_artifact(copy)


@pytest.mark.parametrize("name", [*MEMBERS, "checksums.json", "report.json"])
def test_links_out_of_the_folder_are_not_followed(copy, name):
    shutil.move(copy / name, copy.parent / "elsewhere")
    (copy / name).symlink_to(copy.parent / "elsewhere")
    with pytest.raises(ArtifactError, match="KVX603"):
        load_artifact(copy)


def test_a_pipe_is_not_read(copy):
    (copy / "report.json").unlink()
    os.mkfifo(copy / "report.json")
    with pytest.raises(ArtifactError, match="KVX601"):
        load_artifact(copy)


@pytest.mark.parametrize("name", ["program.json", "checksums.json", "a/../b", "/tmp/x"])
def test_extra_files_keep_to_themselves(tmp_path, name):
    with pytest.raises(ArtifactError, match="KVX603"):
        save_artifact(tmp_path / "out", quantised(), {name: "x"})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["weights"]["norm.weight"].update(shape=[33]), "norm.weight must be"),
        (lambda d: d["weights"]["norm.weight"].update(dtype="float64"), "norm.weight must be"),
        (lambda d: d["weights"]["norm.weight"].update(shape=[-1]), "weights.norm.weight.shape"),
        (lambda d: d["weights"]["norm.weight"].update(stored="embed.weight"), "weights on disk"),
        (lambda d: d["weights"].pop("norm.weight"), "weights on disk must be those"),
        (lambda d: d.update(weights={}), "weights on disk must be those"),
        (lambda d: d.update(extra=1), "at extra"),
        (lambda d: d.pop("sites"), "at sites"),
        (lambda d: d["sites"][0].update(head_dim="16"), "sites.0.head_dim"),
        (lambda d: d["sites"][0].update(head_dim=8), "q must be [B, 4, S, 8]"),
        (lambda d: d["sites"][0]["q"].update(start=10**6), "all heads of q must lie inside"),
        (lambda d: d["info"].update(vocab_size=49), "the logits must be"),
        (lambda d: d["facts"].update({"k.basis": "hadamard(16)"}), "the fact k.basis"),
        (lambda d: d["graph"].pop(), "must end with a return line"),
        (lambda d: d["graph"].insert(0, "# comment"), "saved as it is printed"),
        (lambda d: d["graph"].__setitem__(3, "%3 = os.system(%0)"), "may call only"),
    ],
)
def test_lies_in_program_json_are_found(copy, change, words):
    edit(copy / "program.json", change)
    with pytest.raises(ArtifactError, match="KVX602") as caught:
        load_program(copy)
    assert words in str(caught.value)


def test_a_plan_that_its_codec_does_not_have_is_found(copy):
    edit(copy / "plan.json", lambda d: d["plan"]["sites"][0]["key"]["codec"].update(bits=8))
    with pytest.raises(ArtifactError, match=r"KVX602 .* the planes of the key of layer 0"):
        load_program(copy)


def test_deep_json_is_refused(copy):
    (copy / "plan.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match="KVX602"):
        load_program(copy)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_random_damage_is_a_program_or_a_clear_error(saved, copy, data):
    name = data.draw(st.sampled_from(MEMBERS))
    original = (saved / name).read_bytes()
    damaged = bytearray(original)
    # The first part of a weight file is its header; the rest is values, where all bytes are fine.
    last = min(len(damaged), 3000) if name == "weights.safetensors" else len(damaged)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, last - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, last)) :]
    (copy / name).write_bytes(damaged)
    with contextlib.suppress(ArtifactError):
        load_program(copy)
    if damaged != original:
        with pytest.raises(ArtifactError):
            load_artifact(copy)
    (copy / name).write_bytes(original)
