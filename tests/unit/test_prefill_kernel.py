"""What the dense kernels and gather are emitted as, what they refuse, and their machine code."""

from __future__ import annotations

import ast
import inspect

import pytest
from sass import Build, MachineCode, compile_kernels, count
from triton_cases import int_stream, make_site, plain_stream

from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.spec import (
    ColumnScoresSpec,
    GatherSpec,
    KernelSpec,
    PrefillSpec,
    SiteSpec,
)
from kvxform.errors import CodegenError

PLAIN = PrefillSpec(8, 2, 128, 128, "float16")
POINTERS = {
    "lse_ptr": "*fp32",
    "scores_ptr": "*fp32",
    "sink_logits_ptr": "*fp32",
    "alibi_slopes_ptr": "*fp32",
    "starts_ptr": "*i32",
    "counts_ptr": "*i32",
    "exact_start_ptr": "*i32",
    "lengths_ptr": "*i32",
    "block_table_ptr": "*i32",
    "pool_ptr": "*i32",
    "rows_ptr": "*i32",
    "key_codes_ptr": "*u8",
    "value_codes_ptr": "*u8",
}


def functions(spec: KernelSpec) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(emit(spec).text)
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def count_loops(spec: KernelSpec, kernel: str) -> int:
    return sum(isinstance(node, ast.For) for node in ast.walk(functions(spec)[kernel]))


def options(spec: KernelSpec, launcher: str) -> set[str]:
    """Return the keyword arguments of a launcher."""
    return {argument.arg for argument in functions(spec)[launcher].args.kwonlyargs}


def test_prefill_without_options_has_no_trace_of_them() -> None:
    tree = ast.parse(emit(PLAIN).text)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for word in ("exact", "sink", "slope", "lse", "turn", "seen", "begin"):
        assert not [name for name in names if word in name], word
    assert options(PLAIN, "prefill") == {"scale", "config"}
    assert count_loops(PLAIN, "prefill_kernel") == 2  # tiles that all queries see, and the diagonal


def test_a_window_adds_a_loop_over_its_far_edge() -> None:
    spec = PrefillSpec(8, 2, 128, 128, "float16", window=100)
    assert count_loops(spec, "prefill_kernel") == 3
    assert "positions - 99" in emit(spec).text


def test_only_streams_with_a_ring_have_exact_copies() -> None:
    keys_only = PrefillSpec(8, 2, 128, 128, "float16", key_chunk=32)
    assert options(keys_only, "prefill") == {"scale", "config", "exact_keys", "exact_start"}
    # Near miss: a sink alone needs no second copy, `keys` hold it exact for every query.
    sink_only = PrefillSpec(8, 2, 128, 128, "float16", key_sink=4, value_sink=4)
    assert options(sink_only, "prefill") == {"scale", "config"}


def test_options_are_arguments() -> None:
    spec = PrefillSpec(
        8, 2, 64, 64, "float16", has_sink_logits=True, has_alibi=True, has_lse=True, softcap=30.0
    )
    wanted = {"scale", "config", "sink_logits", "alibi_slopes", "lse"}
    assert options(spec, "prefill") == wanted
    assert "tanh" in emit(spec).text


def test_float32_products_are_not_rounded() -> None:
    text = emit(PrefillSpec(8, 2, 64, 64, "float32")).text
    assert text.count("tl.dot(") == text.count('input_precision="ieee"') == 4
    assert "input_precision" not in emit(PLAIN).text


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        (PrefillSpec(8, 2, 128, 128, "float64"), "the dtype must be one of"),
        (PrefillSpec(8, 2, 512, 128, "float16"), "head_dim must be at most 256; got 512"),
        (PrefillSpec(32, 1, 64, 64, "float16"), "at most 16 query heads may share a KV head"),
        (PrefillSpec(8, 2, 64, 64, "float16", key_sink=4), "the same number of sink tokens"),
        (ColumnScoresSpec(32, 1, 64, "float16"), "at most 16 query heads"),
        (ColumnScoresSpec(8, 2, 320, "float16"), "head_dim must be at most 256"),
        (
            GatherSpec(make_site(int_stream(64, axis="channel", group=24))),
            "multiple of the 24 tokens that share a scale; got 32. Hint: use page-cache with"
            " page_size 48",
        ),
        (
            GatherSpec(make_site(int_stream(64, 8, table=tuple(map(float, range(256)))))),
            "a table may have at most 16 values; got 256",
        ),
        (
            GatherSpec(make_site(int_stream(64, 4, keep=8), layout="fragment")),
            "fragment order; got key: some tokens stay exact. Hint: use layout rows",
        ),
    ],
)
def test_refusals(spec: KernelSpec, rule: str) -> None:
    with pytest.raises(CodegenError, match="KVX401") as error:
        emit(spec)
    assert rule in str(error.value)


def test_gather_takes_what_the_site_has() -> None:
    plain = GatherSpec(make_site(int_stream(64), plain_stream(64)))
    assert options(plain, "gather") == {"config"}
    assert load(emit(plain)).Cache._fields == ("key_codes", "key_scale", "key_zero", "value_value")
    exact = GatherSpec(make_site(int_stream(64, sink=4), int_stream(64, keep=8, sink=4)))
    assert options(exact, "gather") == {"rows", "config"}
    fields = load(emit(exact)).Cache._fields
    assert "key_sink" in fields
    assert "key_recent" not in fields
    assert "value_recent" in fields
    fragment = GatherSpec(make_site(int_stream(64), layout="fragment"))
    assert load(emit(fragment)).Cache._fields == ("pool",)


@pytest.mark.parametrize(
    "spec",
    [PLAIN, ColumnScoresSpec(8, 2, 64, "float16"), GatherSpec(make_site(int_stream(64)))],
    ids=lambda spec: spec.kind,
)
def test_modules_have_configurations_and_a_launcher(spec: KernelSpec) -> None:
    module = load(emit(spec))
    assert 1 <= len(module.CONFIGS) <= 8
    assert len(set(module.CONFIGS)) == len(module.CONFIGS)
    launcher = inspect.signature(getattr(module, spec.kind))
    assert launcher.parameters["config"].default == module.CONFIGS[0]


def build(spec: KernelSpec, config: int = 0) -> Build:
    """Return the compilation of the kernel of `spec` with one of its configurations."""
    source = emit(spec)
    kernel = f"{spec.kind}_kernel"
    arguments = functions(spec)[kernel].args.args
    constants = {a.arg for a in arguments if a.annotation is not None}
    dtype = {"float16": "*fp16", "bfloat16": "*bf16"}[getattr(spec, "dtype", "float16")]
    types = {}
    for name in (a.arg for a in arguments if a.arg not in constants):
        if name.endswith("_ptr"):
            types[name] = POINTERS.get(name, dtype)
        elif name == "scale":
            types[name] = "fp32"
        else:
            types[name] = "i32:16" if "stride" in name else "i32"
    chosen = load(source).CONFIGS[config]._asdict()
    launch = {k: chosen.pop(k) for k in ("num_warps", "num_stages") if k in chosen}
    return Build(
        source.text,
        kernel,
        tuple(types.items()),
        tuple((name.upper(), value) for name, value in chosen.items()),
        **launch,
    )


def compile_one(spec: KernelSpec, config: int = 0) -> MachineCode:
    return compile_kernels(build(spec, config))[0]


def test_prefill_runs_on_tensor_cores_and_gather_moves_sixteen_bytes() -> None:
    gather = GatherSpec(make_site(int_stream(128), layout="fragment", page_size=64))
    code, copy = compile_kernels(build(PLAIN), build(gather))  # one child for both
    assert code.spills == copy.spills == 0
    products = [count(loop, "HGMMA") for loop in code.loops]
    assert len([n for n in products if n > 0]) >= 2  # tiles that all queries see, and the diagonal
    assert count(code.whole, "HMMA") == 0
    assert count(copy.whole, "LDG", "128") > 0
    assert count(copy.whole, "STG", "128") > 0


@pytest.mark.slow
@pytest.mark.parametrize("config", range(len(load(emit(PLAIN)).CONFIGS)))
def test_no_configuration_spills(config: int) -> None:
    assert compile_one(PLAIN, config).spills == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        PrefillSpec(8, 2, 128, 128, "bfloat16", key_chunk=32, value_keep=32, has_lse=True),
        PrefillSpec(8, 1, 64, 64, "float16", window=512, softcap=30.0),
        PrefillSpec(8, 2, 96, 96, "float16", has_alibi=True),
        PrefillSpec(8, 2, 256, 256, "float16"),
        ColumnScoresSpec(8, 2, 128, "float16"),
    ],
    ids=lambda spec: f"{spec.kind}-{spec.__dict__.get('key_dim', 0)}",
)
def test_tensor_cores_and_no_spills(spec: KernelSpec) -> None:
    code = compile_one(spec)
    assert code.spills == 0
    assert any(count(loop, "HGMMA") for loop in code.loops)


@pytest.mark.slow
@pytest.mark.parametrize(
    "site",
    [
        make_site(int_stream(80, 3, sink=4, keep=64), int_stream(96, 4, group=32, sink=4)),
        make_site(int_stream(128, 2, axis="channel", zero="float"), plain_stream(64)),
    ],
    ids=lambda site: f"{site.key.bits}-{site.value.bits}",
)
def test_gather_of_rows_compiles(site: SiteSpec) -> None:
    assert compile_one(GatherSpec(site)).spills == 0


@pytest.mark.slow
def test_rows_of_odd_bytes_are_read_byte_by_byte() -> None:
    """Rows of 15 bytes: two bytes at a time would be misaligned in every other row."""
    code = compile_one(GatherSpec(make_site(int_stream(40, 3))))
    assert count(code.whole, "LDG", "U8") > 0
    assert count(code.whole, "LDG", "64") == count(code.whole, "LDG", "128") == 0
